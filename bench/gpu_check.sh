#!/usr/bin/env bash
# Everything that needs a GPU, within 9 minutes and without a network: build, tests on CUDA, compute-sanitizer,
# bitwise repeatability, benchmarks. One JSON file, a table and a roofline in bench/results.
#   bench/gpu_check.sh                     # on a machine with a GPU and torch, triton, pytest
#   bench/gpu_check.sh --seconds 150 --stages build,tests,repeatability,benchmarks
#   SCULPT_DEVICE=cpu bench/gpu_check.sh   # tiny sizes on the CPU, to try the script: its figures mean nothing
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" bench/gpu/check.py "$@"

"""Elementwise CUDA kernels compiled for the CPU, where their threads run one after the other (tests/cuda/emulated)."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
# glibc's checked longjmp takes a jump to another stack for an error; unique symbols would be shared between libraries.
FLAGS = ("-O2", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE")


def library(kernel: str, entry: str, folder: Path, launches: int) -> ctypes.CDLL:
    """csrc/cuda/`kernel`.cu, which has so many launches, with the functions of `entry`; no product and sum fused."""
    source = (ROOT / "csrc" / "cuda" / f"{kernel}.cu").read_text()
    # Blocks take turns.
    source = re.sub(r"__shared__ (\w+) shared;", r"static \1 shared;", source)
    assert "__shared__" not in source
    launch = r"(\w+)<<<(.*?), (\w+), 0, stream>>>\((.*?)\);"
    source, found = re.subn(launch, r"emulated::launch(\2, \3, 0, [=] { \1(\4); });", source, flags=re.DOTALL)
    assert found == launches
    (folder / f"{kernel}.cpp").write_text(source + entry)
    includes = [f"-I{ROOT / 'tests' / 'cuda' / 'emulated'}", f"-I{ROOT / 'csrc'}"]
    target = folder / f"{kernel}.so"
    command = ["g++", *FLAGS, "-fno-gnu-unique", *includes, str(folder / f"{kernel}.cpp"), "-o", str(target)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return ctypes.CDLL(str(target))

#!/usr/bin/env bash
# Builds OUTPUT from project.cpp with the headers and libraries of the torch that PYTHON imports, its CUDA build or not.
#   ./build.sh OUTPUT
set -euo pipefail
root=$("${PYTHON:-python3}" -c "import torch; print(torch.__path__[0])")
abi=$("${PYTHON:-python3}" -c "import torch; print(int(torch.compiled_with_cxx11_abi()))")
# Nothing in the program names the CUDA library, which has to be loaded all the same.
cuda=()
[ -e "$root/lib/libtorch_cuda.so" ] && cuda=(-Wl,--no-as-needed -ltorch_cuda -lc10_cuda -Wl,--as-needed)
"${CXX:-g++}" -O1 -std=c++20 -D_GLIBCXX_USE_CXX11_ABI="$abi" "$(dirname "$0")/project.cpp" -o "$1" \
  -isystem "$root/include" -L"$root/lib" -Wl,-rpath,"$root/lib" -ltorch -ltorch_cpu -lc10 "${cuda[@]}" -ldl

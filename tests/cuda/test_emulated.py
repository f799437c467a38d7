"""The two-sided CUDA kernel's own code on an emulated GPU (tests/cuda/emulation), against float64.

Index arithmetic, fragment layouts, barriers and waits for copies are those that will run; speed, and whether the real
instructions do what the emulation says, are not tested here.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "csrc" / "cuda"
EMULATION = Path(__file__).parent / "emulation"
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(NVCC is None or shutil.which("g++") is None, reason="needs CUDA's headers and g++")


def library(name: str, kernel: str, folder: Path) -> ctypes.CDLL:
    (folder / "cuda").mkdir()
    for file in (CUDA / f"{kernel}.cu", CUDA / "both_thin.h"):
        text = file.read_text()
        text, count = re.subn(
            r"extern __shared__ __align__\(128\) unsigned char memory\[\];",
            "unsigned char* memory = emulated::current->block->memory.data();",
            text,
        )
        assert count
        text = re.sub(r"__shared__ float4 runs\[.*\];", "float4* runs = emulated::current->block->fixed.data();", text)
        assert "__shared__" not in text
        (folder / "cuda" / file.name.replace(".cu", ".inc")).write_text(text)
    assert NVCC is not None
    said = subprocess.run(
        [NVCC, "--dryrun", "-x", "cu", "-c", "/dev/null", "-o", "/dev/null"], capture_output=True, text=True, check=True
    ).stderr
    toolkit = re.findall(r'"-I([^"]+)"', said)
    includes = [f"-I{path}" for path in (EMULATION, folder, ROOT / "csrc", *toolkit)]
    target = folder / f"{name}.so"
    flags = ["-O1", "-std=c++17", "-fPIC", "-shared", "-w", "-fno-gnu-unique", f"-D{name.upper()}"]
    run = subprocess.run(
        ["g++", *flags, *includes, str(EMULATION / "driver.cpp"), "-o", str(target)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return ctypes.CDLL(str(target))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return library("both", "project_both", tmp_path_factory.mktemp("both"))


def aligned(tensor: Tensor) -> Tensor:
    room = torch.empty(tensor.numel() * tensor.element_size() + 16, dtype=torch.uint8)
    begin = -room.data_ptr() % 16
    return room[begin : begin + room.numel() - 16].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def basis(rows: int, rank: int, dtype: torch.dtype) -> Tensor:
    return aligned(torch.linalg.qr(torch.randn(rows, rank, dtype=torch.float64)).Q.to(dtype))


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def sizes(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


def near(out: Tensor, exact: Tensor, given: Tensor) -> None:
    """Within the rounding of the result and 8e-6 of what was given: a coefficient in one part leaves 6e-4 of it."""
    rounding = (exact.bfloat16().double() - exact).norm()
    assert float((out.double() - exact).norm()) <= 1.02 * float(rounding) + 8e-6 * float(given.double().norm())


def spanned(left: Tensor | None, right: Tensor | None, m: int, n: int) -> Tensor:
    """A matrix of which next to nothing is left, so that errors are not lost in the rounding of what is."""
    grad = torch.zeros(m, n, dtype=torch.float64)
    if left is not None:
        grad += left.double() @ torch.randn(left.shape[1], n, dtype=torch.float64)
    if right is not None:
        grad += torch.randn(m, right.shape[1], dtype=torch.float64) @ right.double().mT
    return aligned(grad.bfloat16())


FLOAT, HALF = torch.float32, torch.bfloat16


# The last two: multiprocessors and capability.
@pytest.mark.parametrize(
    ("m", "n", "r", "s", "dtypes", "block", "device"),
    [
        (1, 1, 1, 1, (FLOAT, FLOAT), False, (2, 9)),
        (70, 131, 7, 13, (HALF, FLOAT), False, (2, 9)),
        (200, 300, 33, 20, (HALF, HALF), False, (4, 9)),
        (130, 264, 64, 40, (FLOAT, FLOAT), False, (2, 9)),
        (70, 300, 20, 64, (HALF, HALF), True, (4, 8)),
        (130, 136, 128, 100, (HALF, HALF), False, (2, 9)),
        (130, 130, 100, 128, (FLOAT, FLOAT), True, (2, 9)),
        (40, 1800, 16, 16, (HALF, HALF), False, (4, 9)),
    ],
)
def test_both(
    both: ctypes.CDLL,
    m: int,
    n: int,
    r: int,
    s: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    block: bool,
    device: tuple[int, int],
) -> None:
    torch.manual_seed(m + n)
    L, R = basis(m, r, dtypes[0]), basis(n, s, dtypes[1])
    grads = [aligned(torch.randn(m, n).bfloat16())]
    # What `block` removes is of rank 16 and far below what is left; the other case has something to lose.
    grads += [] if block else [spanned(L, R, m, n)]
    for given in grads:
        grad = aligned(given)
        G, U, V = given.double(), L.double(), R.double()
        once = G - U @ (U.mT @ G)
        exact = G - U @ (U.mT @ G @ V) @ V.mT if block else once - (once @ V) @ V.mT
        floats = [dtype == FLOAT for dtype in dtypes]
        assert both.both(pointer(grad), pointer(L), pointer(R), *sizes(m, n, r, s), *floats, block, *device) == 0
        near(grad, exact, given)


def test_two_runs_are_the_same_to_the_bit(both: ctypes.CDLL) -> None:
    torch.manual_seed(0)
    given, L, R = aligned(torch.randn(100, 136).bfloat16()), basis(100, 16, HALF), basis(136, 32, FLOAT)
    outs = []
    for _ in range(2):
        grad = aligned(given)
        both.both(pointer(grad), pointer(L), pointer(R), *sizes(100, 136, 16, 32), 0, 1, 0, 2, 9)
        outs.append(grad)
    assert torch.equal(outs[0], outs[1])

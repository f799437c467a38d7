"""The two-sided CUDA kernel's own code on an emulated GPU (tests/cuda/gpu), against float64.

Index arithmetic, fragment layouts, barriers and waits for copies are those that will run; speed, and whether the real
instructions do what the emulation says, are not tested here.
"""

from __future__ import annotations

import ctypes
import shutil

import pytest
import torch

from .emulated_gpu import aligned, basis, library, near, pointer, sizes, spanned

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return library("project_both", "both", tmp_path_factory.mktemp("both"))


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
        error = both.both(
            pointer(grad), pointer(L), pointer(R), *sizes(m, n, r, s), *floats, block, *device, len(grads)
        )
        assert error == 0, both.wrong()
        assert near(grad, exact, given)


def test_two_runs_are_the_same_to_the_bit(both: ctypes.CDLL) -> None:
    torch.manual_seed(0)
    given, L, R = aligned(torch.randn(100, 136).bfloat16()), basis(100, 16, HALF), basis(136, 32, FLOAT)
    outs = []
    for seed in range(6):
        grad = aligned(given)
        assert both.both(pointer(grad), pointer(L), pointer(R), *sizes(100, 136, 16, 32), 0, 1, 0, 2, 9, seed) == 0
        outs.append(grad)
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("dtype", [HALF, FLOAT])
@pytest.mark.parametrize(("m", "n", "r", "s"), [(96, 160, 16, 32), (70, 45, 7, 5), (130, 600, 40, 70)])
@pytest.mark.parametrize("block", [False, True])
def test_small_shapes_as_an_h200_divides_them(
    both: ctypes.CDLL, m: int, n: int, r: int, s: int, dtype: torch.dtype, block: bool
) -> None:
    """The shapes of bench/gpu/small_shapes.py: nothing is read or written outside of the arrays."""
    torch.manual_seed(m + n)
    L, R = basis(m, r, dtype), basis(n, s, dtype)
    given = aligned(torch.randn(m, n).bfloat16())
    grad, G, U, V = aligned(given), given.double(), L.double(), R.double()
    once = G - U @ (U.mT @ G)
    exact = G - U @ (U.mT @ G @ V) @ V.mT if block else once - (once @ V) @ V.mT
    wide = dtype == FLOAT
    error = both.both(pointer(grad), pointer(L), pointer(R), *sizes(m, n, r, s), wide, wide, block, 132, 9, 0)
    assert error == 0, both.wrong()
    assert near(grad, exact, given)

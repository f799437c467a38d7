"""How the left projection's CUDA kernel divides a matrix, and its index arithmetic on an emulation in numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sculpt_ops import _host

Array = npt.NDArray[np.float64]
COLUMNS, SHARED = 64, 227 * 1024
SIZES = st.integers(1, 20000)


@given(SIZES, SIZES, st.integers(1, 200), st.booleans(), st.integers(1, 200))
def test_every_row_is_in_one_block_and_all_fits(m: int, n: int, r: int, split: bool, multiprocessors: int) -> None:
    plan = _host.left_panels(m, n, r, split, multiprocessors)
    if r > min(m, 128):
        assert plan is None
        return
    if plan is None:
        # Not even the largest cluster's blocks have the room for their rows of panel and basis.
        assert m / 16 * (144 + 2 * (r + 8) * (2 if split else 1)) > SHARED - 132 * 1024
        return
    cluster, rows, ranks, size = plan
    assert cluster in (1, 2, 4, 8, 16)
    assert rows % 16 == 0
    assert (cluster - 1) * rows < m <= cluster * rows
    assert ranks in (16, 32, 64, 128)
    assert r <= ranks
    assert ranks * COLUMNS % cluster == 0
    assert size <= SHARED
    assert size % 4 == 0


@pytest.mark.parametrize(
    ("m", "n", "r", "split", "fits"),
    [
        (4096, 4096, 64, True, True),
        (4096, 4096, 128, False, True),
        (4096, 11008, 64, True, True),
        (11008, 4096, 64, False, False),
        (11008, 4096, 32, False, True),
        (4096, 4096, 256, False, False),
        (2**31, 64, 16, False, False),
        (576, 2**40, 16, True, True),
    ],
)
def test_shapes_of_models(m: int, n: int, r: int, split: bool, fits: bool) -> None:
    assert (_host.left_panels(m, n, r, split, 132) is not None) == fits


def fragment_rows(x: Array, matrices: int, lane_address: list[tuple[int, int]], *, trans: bool) -> Array:
    """What ldmatrix leaves in the registers of 32 lanes: [lane, matrix, 2]; addresses are (row, column) by lane."""
    out = np.zeros((32, matrices, 2), x.dtype)
    for matrix in range(matrices):
        block = np.stack([x[row, column : column + 8] for row, column in lane_address[8 * matrix : 8 * matrix + 8]])
        block = block.T if trans else block
        for lane in range(32):
            out[lane, matrix] = block[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]
    return out


def multiply(a: Array, b: Array) -> Array:
    """mma.m16n8k16 from fragments, as the PTX ISA lays them out; c [16, 8]."""
    A, B = np.zeros((16, 16)), np.zeros((16, 8))
    for lane in range(32):
        row, column = lane // 4, 2 * (lane % 4)
        for j in range(2):
            A[row, column + j], A[row + 8, column + j] = a[lane, 0, j], a[lane, 1, j]
            A[row, column + 8 + j], A[row + 8, column + 8 + j] = a[lane, 2, j], a[lane, 3, j]
            B[column + j, row], B[column + 8 + j, row] = b[lane, 0, j], b[lane, 1, j]
    return A @ B


def test_operands_come_from_shared_memory_as_the_products_take_them() -> None:
    """The lane addresses of csrc/cuda/mma.h."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 24)), rng.normal(size=(16, 16))
    rows = [(lane & 15, (lane >> 4) * 8) for lane in range(32)]
    transposed = [((lane & 7) + (lane >> 4) * 8, ((lane >> 3) & 1) * 8) for lane in range(32)]
    columns = [(lane & 15, 0) for lane in range(32)]
    b = fragment_rows(y, 2, columns, trans=True)
    a = fragment_rows(x, 4, rows, trans=False)
    np.testing.assert_allclose(multiply(a, b), x[:, :16] @ y[:, :8])
    a = fragment_rows(x, 4, transposed, trans=True)
    np.testing.assert_allclose(multiply(a, b), x[:, :16].T @ y[:, :8])


@pytest.mark.parametrize("rank_tiles", [1, 2, 4, 8])
def test_the_warps_have_every_tile_of_the_coefficients_once(rank_tiles: int) -> None:
    tiles = [(warp % rank_tiles, warp // rank_tiles * rank_tiles + t) for warp in range(8) for t in range(rank_tiles)]
    assert sorted(tiles) == [(row, column) for row in range(rank_tiles) for column in range(8)]


@pytest.mark.parametrize(("ranks", "blocks"), [(16, 1), (16, 16), (32, 2), (64, 8), (128, 16)])
def test_the_sums_of_the_parts_are_shared_out_and_read_back(ranks: int, blocks: int) -> None:
    rng = np.random.default_rng(1)
    parts = rng.normal(size=(blocks, ranks, COLUMNS + 4))
    part_slice = ranks * COLUMNS // blocks
    sums = np.zeros((blocks, part_slice))
    for block in range(blocks):
        for i in range(part_slice):
            at = block * part_slice + i
            place = at // COLUMNS * (COLUMNS + 4) + at % COLUMNS
            sums[block, i] = sum(parts[other].reshape(-1)[place] for other in range(blocks))
    found = np.array([sums[i // part_slice, i % part_slice] for i in range(ranks * COLUMNS)]).reshape(ranks, COLUMNS)
    np.testing.assert_allclose(found, parts[:, :, :COLUMNS].sum(0), atol=1e-12)

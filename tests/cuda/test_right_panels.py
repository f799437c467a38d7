"""How the right and the two-sided projections' CUDA kernels divide a matrix, and where their elements lie."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sculpt_ops import _host

SHARED, HALF = 227 * 1024, 113 * 1024
SIZES = st.integers(1, 20000)
RANKS = (16, 32, 64, 128)


@given(SIZES, SIZES, st.integers(1, 200), st.booleans(), st.integers(1, 200))
def test_every_column_is_in_one_block_and_all_fits(m: int, n: int, s: int, split: bool, multiprocessors: int) -> None:
    plan = _host.right_panels(m, n, s, split, multiprocessors)
    if s > min(n, 128):
        assert plan is None
        return
    if plan is None:
        # Not even the largest cluster's blocks have the room for 32 rows and their part of the basis.
        assert (n / 16 + 64) * (64 + 2 * 2 * s * (2 if split else 1)) > SHARED - 32 * 1024
        return
    cluster, columns, rows, ranks = plan["cluster"], plan["columns"], plan["rows"], plan["ranks"]
    assert cluster in (1, 2, 4, 8, 16)
    assert columns % 64 == 0
    assert (cluster - 1) * columns < n <= cluster * columns
    assert rows in (32, 64)
    assert ranks in RANKS
    assert s <= ranks
    # The slices of the sums, which a thread takes by four.
    assert rows * ranks // 4 % cluster == 0
    used = columns * ranks * 2 * (2 if split else 1) + plan["buffers"] * rows * columns * 2
    assert plan["bytes"] == used + 4 * rows * ranks + 4 * rows * ranks // cluster <= SHARED
    assert plan["bytes"] % 16 == 0


@pytest.mark.parametrize(
    ("m", "n", "s", "split", "two_blocks", "buffers"),
    [
        (4096, 4096, 64, False, True, 2),
        (4096, 4096, 64, True, True, 2),
        (4096, 4096, 128, False, True, 2),
        (11008, 4096, 64, False, True, 2),
        (4096, 8192, 64, False, True, 1),
        (4096, 11008, 64, False, False, 2),
        (4096, 11008, 32, False, True, 1),
        (2**35, 64, 16, False, True, 2),
    ],
)
def test_shapes_of_models(m: int, n: int, s: int, split: bool, two_blocks: bool, buffers: int) -> None:
    plan = _host.right_panels(m, n, s, split, 132)
    assert (plan["bytes"] <= HALF, plan["buffers"]) == (two_blocks, buffers)


@pytest.mark.parametrize(
    ("m", "n", "s", "split"),
    [
        (4096, 11008, 64, True),
        (4096, 4096, 129, False),
        (4, 2**31, 16, False),
        (2**36, 64, 16, False),
        (0, 8, 1, False),
    ],
)
def test_what_does_not_fit(m: int, n: int, s: int, split: bool) -> None:
    assert _host.right_panels(m, n, s, split, 132) is None


@given(
    SIZES, SIZES, st.integers(1, 140), st.integers(1, 140), st.booleans(), st.booleans(), st.integers(1, 200),
    st.sampled_from([(SHARED, True), (163 * 1024, False)]),
)  # fmt: skip
def test_the_passes_cover_the_matrix_and_scratch_has_room(
    m: int, n: int, r: int, s: int, split: bool, block: bool, multiprocessors: int, device: tuple[int, bool]
) -> None:
    shared, clusters = device
    plan = _host.both_panels(m, n, r, s, split, block, multiprocessors, shared, clusters)
    if r > min(m, 128) or s > min(n, 128):
        assert plan is None
        return
    if plan is None:
        assert max(r, s) > 64
        assert not clusters or split
        return
    ranks, cluster, thin, update = plan["ranks"], plan["cluster"], plan["thin"], plan["update"]
    assert ranks in RANKS
    assert max(r, s) <= ranks
    assert cluster in ((1, 2, 4, 8) if clusters else (1,))
    assert plan["groups"] * cluster == thin["slices"]
    assert thin["rows"] * ranks // 4 % cluster == 0
    for one, spare in ((thin, cluster), (update, 1)):
        assert (one["slices"] - spare) * one["columns"] < n <= one["slices"] * one["columns"]
        # No block below the last row.
        assert (one["chunks"] - 1) * one["panels"] * one["rows"] < m <= one["chunks"] * one["panels"] * one["rows"]
        assert one["bytes"] <= shared
        assert one["chunks"] <= 65535
    # As the kernels count them when they are compiled.
    assert thin["rows"] == (64 if ranks * (2 if split else 1) <= 64 else 32)
    assert update["columns"] == (256 if ranks <= 64 else 128)
    assert update["rows"] == 32 or (ranks == 64 and not split)
    sides = 2 if split else 1
    sizes = [
        *(2 * m * ranks, (sides - 1) * 2 * m * ranks, 2 * n * ranks, (sides - 1) * 2 * n * ranks),
        *(2 * m * ranks, 2 * m * ranks, *([0] * 4 if block else [2 * n * ranks] * 2)),
        *([] if block else [4 * plan["groups"] * m * ranks, 4 * thin["chunks"] * n * ranks]),
        *(4 * thin["slices"] * thin["chunks"] * ranks**2, 4 * ranks**2),
    ]
    assert len(plan["offsets"]) == len(sizes) + 1
    for (begin, end), size in zip(pairwise(plan["offsets"]), sizes, strict=True):
        assert begin % 256 == 0
        assert size <= end - begin < size + 256


@pytest.mark.parametrize("ranks", RANKS)
def test_rows_read_together_lie_in_different_banks(ranks: int) -> None:
    """The exchanges of csrc/cuda/row_panels.h, in groups of 16 bytes (bases, panels) and 32 (float32 sums)."""
    chunks = ranks // 8
    shift, mask = (0, 7) if ranks >= 64 else (1, 3) if ranks == 32 else (2, 1)

    def place(row: int, chunk: int) -> int:
        return row * chunks + (chunk ^ ((row >> shift) & mask))

    def sums(row: int, group: int) -> int:
        return row * chunks + (group ^ ((row >> 1 & 1) if ranks == 16 else row & 3))

    for first in range(0, 64, 8):
        for chunk in range(chunks):
            assert len({place(first + i, chunk) % 8 for i in range(8)}) == 8
            for half in (0, 4):
                assert len({sums(first + half + i, chunk) % 4 for i in range(4)}) == 4
    for where in (place, sums):
        assert sorted(where(row, chunk) for row in range(64) for chunk in range(chunks)) == list(range(64 * chunks))
    # Eight rows on, the exchange is the same.
    assert all(place(row + 8, c) == place(row, c) + 8 * chunks for row in range(32) for c in range(chunks))

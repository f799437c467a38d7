"""How the one-pass projection of one side divides a matrix, and where its shared memory has what."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sculpt_ops import _host
from sculpt_ops.ops.cuda_limits import BasisForm

HALF, FLOAT, METRIC, _ = BasisForm
SHARED, TILE = 227 * 1024, 64
SIZES = st.integers(1, 20000)


def needed(width: int, rows: int, ranks: int, slots: int, stages: int, form: BasisForm) -> int:
    """Bytes: the basis' rows, panels, factors and parts of the exchanges under way, and barriers."""
    parts = 2 if form in (FLOAT, METRIC) else 1
    basis, slot, stage = rows * ranks * 2 * parts, rows * width * 2, ranks * width * (4 + 2 * parts)
    return basis + slots * slot + stages * stage + 3 * 8 * (12 + 3)


@given(SIZES, SIZES, st.integers(1, 200), st.sampled_from(BasisForm), st.integers(1, 200))
def test_every_row_is_in_one_block_and_all_fits(m: int, n: int, r: int, form: BasisForm, multiprocessors: int) -> None:
    plan = _host.side_panels(m, n, r, form, multiprocessors)
    if r > min(m, 64 if form == BasisForm.FLOAT32 else 128):
        assert plan is None
        return
    if plan is None:
        ranks = max(16, 1 << (r - 1).bit_length())
        for cluster in (2, 4, 8, 16):
            rows = math.ceil(math.ceil(m / cluster) / TILE) * TILE
            assert needed(16, rows, ranks, 2, 2, form) > SHARED or (cluster - 1) * rows >= m
        return
    cluster, width, rows, ranks, owned, slots, stages, size = plan
    assert cluster in (2, 4, 8, 16)
    assert width in (16, 32)
    assert rows % TILE == 0
    assert m <= cluster * rows
    assert cluster == 2 or (cluster - 1) * rows < m
    assert ranks in (16, 32, 64, 128)
    assert r <= ranks == cluster * owned
    assert slots >= 2
    assert stages >= 2
    assert size == needed(width, rows, ranks, slots, stages, form) <= SHARED
    assert width == 32 or slots >= 4 or needed(32, rows, ranks, 3, 2, form) > SHARED


@pytest.mark.parametrize(
    ("m", "n", "r", "form", "fits"),
    [
        (4096, 4096, 64, FLOAT, True),
        (4096, 4096, 128, HALF, True),
        (4096, 4096, 128, FLOAT, False),
        (4096, 11008, 64, FLOAT, True),
        (5120, 13824, 64, HALF, True),
        (11008, 4096, 64, HALF, True),
        (11008, 4096, 64, FLOAT, False),
        (11008, 4096, 32, FLOAT, True),
        (28672, 8192, 16, HALF, True),
        (4096, 4096, 256, HALF, False),
        (4096, 4096, 128, METRIC, True),
        (11008, 4096, 64, METRIC, False),
        (11008, 4096, 32, METRIC, True),
        (2**31, 64, 16, HALF, False),
        (576, 2**31, 16, FLOAT, False),
    ],
)
def test_shapes_of_models(m: int, n: int, r: int, form: BasisForm, fits: bool) -> None:
    assert (_host.side_panels(m, n, r, form, 132) is not None) == fits


@pytest.mark.parametrize("width", [16, 32, 64])
def test_pieces_change_places_within_their_row_and_eight_rows_lie_in_different_banks(width: int) -> None:
    places = np.array([[_host.swizzled(width, row, column) for column in range(width)] for row in range(64)])
    assert sorted(places.ravel()) == list(range(64 * width))
    assert (places // width == np.arange(64)[:, None]).all()
    pieces = places[:, ::8]
    # Sixteen bytes stay together.
    assert (places.reshape(64, -1, 8) == pieces[:, :, None] + np.arange(8)).all()
    banks = pieces * 2 // 16 % 8
    for first in range(0, 64, 8):
        assert all(len(set(banks[first : first + 8, piece])) == 8 for piece in range(width // 8))


@pytest.mark.parametrize("width", [16, 32, 64])
def test_places_are_those_of_the_products_swizzling_modes(width: int) -> None:
    """Bits 4 and up of a byte's address are changed by bits 7 and up: by one, two or three of them."""
    bits = {16: 1, 32: 2, 64: 3}[width]
    for row in range(32):
        for column in range(0, width, 8):
            address = 2 * (row * width + column)
            moved = address ^ ((address >> 7 & (1 << bits) - 1) << 4)
            assert 2 * _host.swizzled(width, row, column) == moved

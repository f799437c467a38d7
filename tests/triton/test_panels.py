"""Tile sizes and limits of the Triton kernels: pure functions, so no GPU, and no triton, is asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sculpt_ops.triton_kernels.panels import (
    L2_SHARE,
    MAX_WIDTH,
    MIN_WIDTH,
    Device,
    chunk_columns,
    coefficient_limit,
    max_rank,
    pad_rank,
    panel_config,
    panel_width,
    why_not,
)

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
H100 = Device()
PAIRS = [(BF16, BF16), (BF16, F32), (F16, F16), (F16, F32), (F32, F32)]


@given(
    length=st.integers(0, 200_000),
    extent=st.integers(1, 1_000_000),
    itemsize=st.sampled_from([2, 4]),
    l2_bytes=st.integers(2**20, 2**28),
    multiprocessors=st.integers(1, 304),
)
def test_panels_in_flight_fit_l2_and_fill_the_gpu(
    length: int, extent: int, itemsize: int, l2_bytes: int, multiprocessors: int
) -> None:
    width = panel_width(length, extent, itemsize, Device(l2_bytes, multiprocessors))
    assert width in (MIN_WIDTH, MAX_WIDTH)
    if width > MIN_WIDTH:
        assert extent / width > multiprocessors - 1
        assert multiprocessors * length * width * itemsize <= L2_SHARE * l2_bytes


@pytest.mark.parametrize(
    ("length", "extent", "itemsize", "width"),
    [
        (1024, 16384, 2, 64),  # 132 panels of 64 columns take 17 MB of the 31 MB share
        (4096, 16384, 2, 32),  # 69 MB, too much
        (1024, 4096, 2, 32),  # fits, but 64 panels would leave half the multiprocessors idle
        (1024, 16384, 4, 32),  # 35 MB
        (0, 16384, 4, 64),  # read once: L2 sets no bound
        (128256, 4096, 2, 32),  # nothing fits: the narrowest
    ],
)
def test_panel_width_on_an_h100(length: int, extent: int, itemsize: int, width: int) -> None:
    assert panel_width(length, extent, itemsize, H100) == width


@pytest.mark.parametrize(("rank", "padded"), [(1, 16), (16, 16), (17, 32), (64, 64), (100, 128), (129, 256)])
def test_pad_rank(rank: int, padded: int) -> None:
    assert pad_rank(rank) == padded


@given(
    pair=st.sampled_from(PAIRS),
    rank=st.integers(1, 256),
    length=st.integers(1, 50_000),
    extent=st.integers(1, 200_000),
    is_hip=st.booleans(),
)
def test_config_holds_the_coefficients_in_registers(
    pair: tuple[torch.dtype, torch.dtype], rank: int, length: int, extent: int, is_hip: bool
) -> None:
    if rank > max_rank(*pair, is_hip):
        return
    config = panel_config(length, extent, rank, *pair, Device(is_hip=is_hip))
    assert config.rank >= rank
    assert config.rank * config.width <= coefficient_limit(*pair, is_hip)
    assert config.depth in (16, 32, 64, 128)


@pytest.mark.parametrize(("pair", "limit"), list(zip(PAIRS, [256, 128, 64, 32, 128], strict=True)))
def test_largest_ranks(pair: tuple[torch.dtype, torch.dtype], limit: int) -> None:
    assert max_rank(*pair, is_hip=False) == limit
    assert max_rank(*pair, is_hip=True) == limit // 2


@given(
    m=st.integers(1, 200_000),
    n=st.integers(1, 200_000),
    s=st.integers(1, 128),
    itemsize=st.sampled_from([2, 4]),
    width=st.sampled_from([32, 64]),
)
def test_chunks_fit_l2_unless_their_partial_sums_would_outweigh_them(
    m: int, n: int, s: int, itemsize: int, width: int
) -> None:
    columns = chunk_columns(m, n, s, itemsize, width, H100)
    assert columns % width == 0
    assert width <= columns < n + width
    chunks = -(-n // columns)
    assert (chunks - 1) * 8 * m * s <= m * n * itemsize / 4
    if chunks > 1 and columns > 32 * s / itemsize + width:
        assert m * columns * itemsize <= L2_SHARE * H100.l2_bytes


def test_a_square_llama_matrix_is_two_even_chunks_on_an_h100() -> None:
    assert chunk_columns(4096, 4096, 64, 2, 32, H100) == 2048


def test_why_not_names_what_was_given_and_wanted() -> None:
    assert why_not(256, BF16, BF16, 256) is None
    assert why_not(257, BF16, BF16, 256) == (
        "given rank 257, wanted at most 256 for a torch.bfloat16 grad and a torch.bfloat16 basis"
    )
    assert why_not(1, F64, F64, 256) == "given a torch.float64 grad, wanted bfloat16, float16 or float32"
    assert why_not(1, F32, BF16, 256) == "given a torch.bfloat16 basis, wanted torch.float32 like grad, or float32"

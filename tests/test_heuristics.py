"""The choice of a variant on a GPU: a pure function, so no GPU is asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sculpt_ops import _host
from sculpt_ops.ops.heuristics import H100, Gpu, choose, gpu_of, stacked
from sculpt_ops.triton_kernels.panels import max_rank

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
A100, MI300X, V100 = Gpu(80, False, 108, 40 * 2**20), Gpu(94, True, 304, 4 * 2**20), Gpu(70, False, 80, 6 * 2**20)


@pytest.mark.parametrize(
    ("m", "n", "r", "s", "dtype", "basis", "wanted"),
    [
        (4096, 11008, 64, None, BF16, BF16, "triton"),
        (4096, 11008, None, 128, BF16, BF16, "cublas"),  # 4096 rows are fewer panels than multiprocessors
        (11008, 4096, None, 128, BF16, BF16, "triton"),
        (4096, 11008, 144, None, BF16, BF16, "cublas"),  # arithmetic is the limit
        (8192, 11008, 64, 80, BF16, BF16, "cublas"),
        (8192, 11008, 64, 64, BF16, BF16, "triton"),
        (8192, 11008, 80, None, BF16, F32, "cublas"),
        (8192, 11008, 64, None, F32, F32, "cublas"),  # 23 % of the second read from L2
        (4096, 11008, 64, None, F32, F32, "triton"),
        (8192, 11008, 32, 32, F32, F32, "triton"),  # chunks of columns fit L2 whatever the size
        (4096, 11008, 48, None, F16, F16, "cublas"),
        (4096, 11008, 32, None, F16, F16, "triton"),
        (8192, 11008, 16, None, F64, F64, "cublas"),
        (8192, 11008, 50, None, BF16, BF16, "cublas"),  # spills registers
        (28672, 8192, 64, None, BF16, BF16, "cublas"),  # 13 % of the second read from L2
        (64, 64, 16, None, BF16, BF16, "cublas"),  # two panels
        (8192, 11008, 0, None, BF16, BF16, "cublas"),
    ],
)
def test_the_choice_on_an_h100(
    m: int, n: int, r: int | None, s: int | None, dtype: torch.dtype, basis: torch.dtype, wanted: str
) -> None:
    assert choose(m, n, r, s, dtype, basis) == wanted


def test_many_small_matrices_fill_a_gpu() -> None:
    assert choose(64, 64, 16, None, BF16, BF16, batch=65) == "cublas"
    assert choose(64, 64, 16, None, BF16, BF16, batch=66) == "triton"


def test_the_choice_by_device() -> None:
    work = (4096, 11008, 64, None, BF16, BF16)
    assert choose(*work, gpu=A100) == "triton"
    assert choose(*work, gpu=V100) == "cublas"  # no bfloat16 tensor cores
    assert choose(*work, gpu=MI300X) == "cublas"  # 4 MB of L2
    assert choose(11008, 11008, 32, 32, BF16, BF16, gpu=MI300X) == "triton"
    assert choose(11008, 11008, 64, 64, BF16, BF16, gpu=MI300X) == "cublas"  # half the ranks
    assert gpu_of(None) == H100


@given(
    m=st.integers(1, 60_000),
    n=st.integers(1, 60_000),
    r=st.one_of(st.none(), st.integers(0, 512)),
    s=st.one_of(st.none(), st.integers(0, 512)),
    dtypes=st.sampled_from([(BF16, BF16), (BF16, F32), (F16, F16), (F16, F32), (F32, F32), (F64, F64)]),
    batch=st.integers(1, 300),
    gpu=st.sampled_from([H100, A100, MI300X, V100]),
)
def test_no_choice_that_cannot_run(
    m: int, n: int, r: int | None, s: int | None, dtypes: tuple[torch.dtype, torch.dtype], batch: int, gpu: Gpu
) -> None:
    """No CUDA kernel before it has passed on a GPU, none of Triton without it, none of a rank that it refuses."""
    assert choose(m, n, r, s, *dtypes, batch=batch, gpu=gpu, triton=False, cuda=True) == "cublas"
    if choose(m, n, r, s, *dtypes, batch=batch, gpu=gpu, cuda=True) == "triton":
        assert max(r or 0, s or 0) <= max_rank(*dtypes, gpu.hip)


def test_an_unproven_kernel_is_what_stands_in_the_header() -> None:
    assert not _host.thresholds["cuda_proven"]
    with pytest.raises(ValueError, match="dtype: given 'int8', wanted bfloat16"):
        choose(8, 8, 1, 1, torch.int8, torch.int8)


@pytest.mark.parametrize(
    ("m", "n", "rank", "dtype", "wanted"),
    [
        (4096, 4096, 256, BF16, True),  # 2.8 against 4 reads of the matrix's time
        (4096, 4096, 400, BF16, True),
        (4096, 4096, 512, BF16, False),  # more operations, no fewer bytes that count
        (4096, 4096, 2048, BF16, False),
        (4096, 4096, 128, F32, False),
    ],
)
def test_both_sides_at_once_while_bytes_are_the_limit(
    m: int, n: int, rank: int, dtype: torch.dtype, wanted: bool
) -> None:
    assert stacked(m, n, rank, rank, dtype) is wanted

"""The choice of a variant on a GPU: a pure function, so no GPU is asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sculpt_ops.ops.heuristics import H100, Gpu, choose, gpu_of, stacked
from sculpt_ops.triton_kernels.panels import max_rank

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
H200 = Gpu(90, False, 132, 60 * 2**20)
A100, MI300X, V100 = Gpu(80, False, 108, 40 * 2**20), Gpu(94, True, 304, 4 * 2**20), Gpu(70, False, 80, 6 * 2**20)


@pytest.mark.parametrize(
    ("m", "n", "r", "s", "dtypes", "wanted"),
    [
        (4096, 11008, 16, None, (BF16, BF16), "cuda"),
        (4096, 11008, 64, None, (BF16, BF16), "cuda"),
        (4096, 11008, 65, None, (BF16, BF16), "cublas"),
        (11008, 4096, 16, None, (BF16, BF16), "cuda"),
        (11008, 4096, 64, None, (BF16, BF16), "cuda"),
        (4096, 11008, None, 64, (BF16, BF16), "cuda"),
        (4096, 11004, 16, None, (BF16, BF16), "cublas"),  # rows that do not begin at multiples of 16 bytes
        (4096, 11008, None, 16, (BF16, F32), "cuda"),
        (4096, 11008, 64, None, (BF16, F32), "cuda"),
        (11008, 4096, 64, None, (BF16, F32), "cublas"),  # its two parts fit no cluster
        (4096, 4096, 16, 16, (BF16, BF16), "cuda"),
        (4096, 4096, 64, 16, (BF16, BF16), "cuda"),
        (4096, 4096, 65, 16, (BF16, BF16), "cublas"),
        (1024, 1024, 32, None, (BF16, BF16), "cuda"),
        (1024, 1024, 32, 16, (BF16, BF16), "cuda"),
        (1024, 1024, 33, None, (BF16, BF16), "cublas"),  # as long as its launches
        (576, 576, 16, None, (BF16, BF16), "cublas"),
        (576, 576, 32, 16, (BF16, F32), "cuda"),
        (576, 576, 33, None, (BF16, F32), "cublas"),  # not measured
        (4096, 4096, 16, 16, (BF16, F32), "cuda"),
        (4096, 4096, 64, 64, (BF16, F32), "cuda"),
        (4096, 11008, 16, 16, (BF16, F32), "cuda"),
        (4096, 11008, 17, 16, (BF16, F32), "cublas"),  # both sides at once
        (4096, 11008, 64, 64, (BF16, F32), "cublas"),
        (28672, 8192, 16, 16, (BF16, BF16), "cuda"),
        (28672, 8192, 32, None, (BF16, BF16), "cublas"),  # it fits no cluster
        (4096, 4096, 16, 16, (F16, F16), "cublas"),  # no such kernel
        (4096, 4096, 16, 16, (F32, F32), "cublas"),
        (4096, 4096, 16, 16, (F64, F64), "cublas"),
        (4096, 4096, 0, None, (BF16, BF16), "cublas"),
    ],
)
def test_the_choice_for_one_matrix(
    m: int, n: int, r: int | None, s: int | None, dtypes: tuple[torch.dtype, torch.dtype], wanted: str
) -> None:
    assert choose(m, n, r, s, *dtypes, cuda=True) == wanted
    assert choose(m, n, r, s, *dtypes) == "cublas"
    for gpu in (A100, MI300X, V100):
        assert choose(m, n, r, s, *dtypes, gpu=gpu, cuda=True) == "cublas"


@pytest.mark.parametrize("basis", [BF16, F32])
def test_the_choice_for_a_block(basis: torch.dtype) -> None:
    assert choose(4096, 11008, 16, 16, BF16, basis, cuda=True, block=True) == "cuda"
    assert choose(4096, 11008, 16, 17, BF16, basis, cuda=True, block=True) == "cublas"
    assert choose(1024, 4096, 16, 16, BF16, basis, cuda=True, block=True) == "cublas"
    # A list of large ones goes one by one, of small ones in Triton's four launches.
    assert choose(4096, 11008, 16, 16, BF16, basis, cuda=True, block=True, batch=224) == "cuda"
    assert choose(576, 1536, 16, 16, BF16, basis, cuda=True, block=True, batch=210) == "triton"


@pytest.mark.parametrize(
    ("m", "n", "r", "s", "dtypes", "batch", "wanted"),
    [
        (576, 1536, 64, 64, (BF16, BF16), 210, "triton"),
        (1024, 1024, 64, None, (BF16, BF16), 288, "triton"),
        (576, 1536, 64, 80, (BF16, BF16), 210, "cublas"),  # arithmetic is the limit
        (576, 1536, 64, 16, (BF16, F32), 210, "cublas"),
        (576, 1536, 16, 16, (F16, F16), 210, "triton"),
        (576, 1536, 16, 32, (F16, F16), 210, "cublas"),
        (576, 1536, 64, 64, (BF16, BF16), 7, "cublas"),  # too few
        (64, 64, 16, None, (BF16, BF16), 65, "cublas"),  # two panels each, fewer than multiprocessors
        (64, 64, 16, None, (BF16, BF16), 66, "triton"),
        (4096, 4096, 16, None, (BF16, BF16), 224, "cublas"),  # the library is faster
        (4096, 4096, 16, 16, (BF16, BF16), 224, "cublas"),
    ],
)
def test_the_choice_for_many_without_cuda_kernels(
    m: int, n: int, r: int | None, s: int | None, dtypes: tuple[torch.dtype, torch.dtype], batch: int, wanted: str
) -> None:
    assert choose(m, n, r, s, *dtypes, batch=batch) == wanted
    assert choose(m, n, r, s, *dtypes, batch=batch, gpu=V100, cuda=True) == "cublas"  # no bfloat16 tensor cores
    assert gpu_of(None) == H100


@pytest.mark.parametrize(
    ("m", "n", "r", "s", "dtypes", "batch", "wanted"),
    [
        (4096, 11008, 64, None, (BF16, BF16), 224, "cuda"),
        (11008, 4096, 64, None, (BF16, BF16), 224, "cuda"),
        (4096, 11008, 16, 16, (BF16, BF16), 224, "cuda"),
        (4096, 11008, 64, 64, (BF16, BF16), 224, "cuda"),
        (4096, 4096, 64, 64, (BF16, F32), 224, "cuda"),
        (4096, 11008, 64, 64, (BF16, F32), 224, "cublas"),  # 11008 rows in two parts fit no cluster
        (1024, 1024, 64, None, (BF16, BF16), 288, "cuda"),
        (576, 1536, 16, None, (BF16, BF16), 210, "cuda"),
        (576, 1536, 16, 16, (BF16, BF16), 210, "cuda"),
        (576, 1536, 64, 64, (BF16, BF16), 7, "cublas"),  # too few for a list
        (4096, 11008, 32, 32, (BF16, F32), 224, "cuda"),
        (576, 1536, 64, 64, (F16, F16), 210, "cublas"),
    ],
)
def test_the_choice_for_many(
    m: int, n: int, r: int | None, s: int | None, dtypes: tuple[torch.dtype, torch.dtype], batch: int, wanted: str
) -> None:
    assert choose(m, n, r, s, *dtypes, batch=batch, gpu=H200, cuda=True) == wanted


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
    """None of Triton or CUDA without it, none of a rank that it refuses."""
    assert choose(m, n, r, s, *dtypes, batch=batch, gpu=gpu, triton=False) == "cublas"
    chosen = choose(m, n, r, s, *dtypes, batch=batch, gpu=gpu, cuda=True)
    if chosen == "triton":
        assert max(r or 0, s or 0) <= max_rank(*dtypes, gpu.hip)
    if chosen == "cuda":
        assert gpu == H100
        assert max(r or 0, s or 0) <= 64


def test_unknown_types_are_refused() -> None:
    with pytest.raises(ValueError, match="dtype: given 'int8', wanted bfloat16"):
        choose(8, 8, 1, 1, torch.int8, torch.int8)


@pytest.mark.parametrize(
    ("m", "n", "rank", "dtype", "wanted"),
    [
        (4096, 4096, 64, BF16, True),
        (4096, 4096, 128, BF16, False),  # in L2 when the second side reads it
        (4096, 11008, 256, BF16, True),  # 2.8 against 4 reads of the matrix's time
        (4096, 11008, 400, BF16, True),
        (4096, 11008, 600, BF16, False),  # more operations, no fewer bytes that count
        (4096, 4096, 2048, BF16, False),
        (4096, 4096, 128, F32, False),
    ],
)
def test_both_sides_at_once_while_bytes_are_the_limit(
    m: int, n: int, rank: int, dtype: torch.dtype, wanted: bool
) -> None:
    assert stacked(m, n, rank, rank, dtype) is wanted

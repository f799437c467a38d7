"""Which variant projects a matrix on a GPU. The choice itself is csrc/common/heuristics.h: pure functions of sizes,
dtypes and the device, whose thresholds were measured on an H100 and an H200. Here are the device's facts and
``SCULPT_BACKEND``.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Literal, NamedTuple

import torch

from .._host import choose as _choose
from .._host import left_first
from .._host import stacked as _stacked

__all__ = [
    "BACKENDS",
    "H100",
    "Backend",
    "Gpu",
    "choose",
    "forced_backend",
    "gpu_of",
    "left_first",
    "stacked",
    "triton_missing",
]

Backend = Literal["cublas", "triton", "cuda"]
BACKENDS: tuple[Backend, ...] = ("cublas", "triton", "cuda")


class Gpu(NamedTuple):
    """What the choice depends on. capability: 10 major + minor."""

    capability: int
    hip: bool
    multiprocessors: int
    l2_bytes: int


H100 = Gpu(90, False, 132, 50 * 2**20)


@cache
def gpu_of(index: int | None) -> Gpu:
    """CUDA or HIP device `index`; an H100 for None (a tensor that is on no GPU)."""
    if index is None:
        return H100
    properties = torch.cuda.get_device_properties(index)
    capability = 10 * properties.major + properties.minor
    return Gpu(
        capability, torch.version.hip is not None, properties.multi_processor_count, int(properties.L2_cache_size)
    )


@cache
def triton_missing() -> str | None:
    """Why there is no Triton; None if there is."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


@cache
def choose(
    m: int,
    n: int,
    r: int | None,
    s: int | None,
    dtype: torch.dtype,
    basis_dtype: torch.dtype,
    *,
    batch: int = 1,
    gpu: Gpu = H100,
    triton: bool = True,
    cuda: bool = False,
    block: bool = False,
) -> Backend:
    """The variant that is expected to be the fastest.

    Args:
        m, n: rows and columns of the matrix.
        r, s: ranks of the left and right basis; None for a side that is left alone.
        dtype, basis_dtype: of the matrix and of its bases.
        batch: matrices of about this size in the call.
        gpu: the device.
        triton, cuda: whether Triton, and the CUDA C++ kernels, are there.
        block: whether only what is in both spaces at once is meant.
    """
    names = (str(dtype).removeprefix("torch."), str(basis_dtype).removeprefix("torch."))
    return _choose(m, n, r or 0, s or 0, batch, *names, **gpu._asdict(), triton=triton, cuda=cuda, block=block)


@cache
def stacked(m: int, n: int, r: int, s: int, dtype: torch.dtype) -> bool:
    """Whether library products remove both sides at once and not one after the other."""
    return _stacked(m, n, r, s, str(dtype).removeprefix("torch."))


def forced_backend() -> Backend | None:
    """What ``SCULPT_BACKEND`` asks for; None if it is unset.

    Raises:
        ValueError: for a name that is no backend.
    """
    name = os.environ.get("SCULPT_BACKEND", "")
    if not name:
        return None
    if name not in BACKENDS:
        raise ValueError(f"SCULPT_BACKEND: given '{name}', wanted 'cublas', 'triton' or 'cuda'")
    return name

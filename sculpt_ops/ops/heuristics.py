"""Which variant projects a matrix on a GPU: one pure function of sizes and dtypes.

The thresholds are calculated from an H100's published figures (3.0 TB/s, 790 TFLOP/s in bf16), not measured: no kernel
here has run on a GPU yet. They are set below the calculated crossovers (docs/kernels.md), so that a wrong estimate
costs a missed gain and not a loss.
"""

from __future__ import annotations

import os
from typing import Literal

import torch

__all__ = ["Backend", "choose", "forced_backend"]

Backend = Literal["triton", "cublas"]

# Calculated crossovers: one side 175 (own dtype) and 105 (float32 operand); the next power of two below.
MAX_RANK = 128
MAX_RANK_FLOAT32 = 64
# Two sides, both thin products from one read: r + s up to the same bounds. Ranks that are no multiple of 16 spill 56 to
# 240 bytes of registers in some variants when compiled; they go to the library until a measurement says otherwise.
RANK_UNIT = 16
# A panel is at least 32 wide, and one program a multiprocessor keeps it busy: fewer panels leave the GPU idle.
PANEL = 32


def choose(
    m: int,
    n: int,
    r: int | None,
    s: int | None,
    dtype: torch.dtype,
    basis_dtype: torch.dtype,
    *,
    batch: int = 1,
    multiprocessors: int = 132,
) -> Backend:
    """The faster of the Triton kernels and two library products (mm + addmm_) for one matrix.

    Args:
        m, n: rows and columns of the matrix.
        r, s: ranks of the left and right basis; None for a side that is left alone.
        dtype, basis_dtype: of the matrix and of its bases.
        batch: matrices of this size in the call.
        multiprocessors: of the device.
    """
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return "cublas"
    limit = MAX_RANK_FLOAT32 if torch.float32 in (dtype, basis_dtype) else MAX_RANK
    if dtype is torch.float16:
        limit = MAX_RANK_FLOAT32 // 2  # its second product runs in float32 altogether
    if (r or 0) + (s or 0) > limit or (r or 0) % RANK_UNIT or (s or 0) % RANK_UNIT:
        return "cublas"
    extent = min(n if r is not None else m, m if s is not None else n) * batch
    return "triton" if extent >= PANEL * multiprocessors else "cublas"


def forced_backend() -> Backend | None:
    """What ``SCULPT_BACKEND`` asks for; None if it is unset.

    Raises:
        ValueError: for a name that is no backend.
    """
    name = os.environ.get("SCULPT_BACKEND", "")
    if name in ("triton", "cublas"):
        return name  # type: ignore[return-value]
    if name:
        raise ValueError(f"SCULPT_BACKEND: given '{name}', wanted 'triton' or 'cublas'")
    return None

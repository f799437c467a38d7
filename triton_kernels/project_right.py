"""Projection of the right side: G - (G R) Rᵀ, or (G R) Rᵀ with `keep`.

It is the left projection of Gᵀ: `project_left.project_one_side` on transposed views, whose strides triton specialises,
so a program owns a panel of rows, walks it along the contiguous dimension and reads whole cache lines. Bytes,
operations, the in-place guarantee and when not to use it are the same with n and m exchanged: R has n rows, and few
rows (m x batch below 32 x multiprocessors) leave a part of the GPU idle.

Tests passed on an H200 (torch 2.11, Triton 3.6); compiled, not run, for sm_80, sm_100 and gfx942.
"""

import torch
from torch import Tensor

from .launch import check_operands
from .project_left import project_one_side, why_not_left

__all__ = ["can_use_right", "project_right", "why_not_right"]


def why_not_right(m: int, n: int, s: int, dtype: torch.dtype, basis_dtype: torch.dtype) -> str | None:
    """Why `project_right` cannot take an m x n gradient with a basis of rank s, or None if it can."""
    return why_not_left(n, m, s, dtype, basis_dtype)


def can_use_right(m: int, n: int, s: int, dtype: torch.dtype, basis_dtype: torch.dtype) -> bool:
    """Whether `project_right` can run; the ranks are those of `can_use_left`."""
    return why_not_right(m, n, s, dtype, basis_dtype) is None


def project_right(grad: Tensor, basis: Tensor, out: Tensor, *, keep: bool) -> None:
    """out = grad - (grad R) Rᵀ, or (grad R) Rᵀ with `keep`, in one launch and without scratch memory.

    Args:
        grad: (m, n) or (batch, m, n), bfloat16, float16 or float32, any strides.
        basis: R, (n, s) or (batch, n, s), orthonormal columns, grad's dtype or float32. Rank 0 is taken: nothing is
            removed, or nothing kept.
        out: Like grad; may be grad itself.
        keep: Keep the span of R instead of removing it.

    Raises:
        ValueError: Operands that do not fit each other or `can_use_right`; nothing has been written then.
    """
    check_operands("project_right", grad, out, right=basis)
    m, n = grad.shape[-2:]
    reason = why_not_right(m, n, basis.shape[-1], grad.dtype, basis.dtype)
    if reason is not None:
        raise ValueError(f"project_right: {reason}")
    project_one_side(grad.mT, basis, out.mT, keep=keep)

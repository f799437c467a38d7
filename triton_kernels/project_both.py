"""Both sides removed, (I - L Lᵀ) G (I - R Rᵀ), in two passes over G.

Pass 1 (`thin_products`) reads G once for A = Lᵀ G, B = G R and the core A R. Pass 2 (`rank_update`) reads and writes it
once: G - L A - (B - L core) Rᵀ. 3 m n elements, against 6 m n of two one-sided expressions in mm and addmm_.
Operations: 2 m n (r + s) in pass 1 and, in bfloat16 with split coefficients, 4 m n (r + s) in pass 2.

When not to use it: one rank far above the other or both above 128, where two one-sided library products are the limit;
matrices of a few hundred kB, where its five launches cost more than the bytes they save.

Tests passed on an H200 (torch 2.11, Triton 3.6); compiled, not run, for sm_80, sm_100 and gfx942.
"""

import torch
from torch import Tensor

from .launch import check_operands
from .project_left import project_one_side
from .rank_update import rank_update
from .thin_products import thin_products, why_not_two_sided

__all__ = ["can_use_both", "project_both", "why_not_both"]


def why_not_both(
    m: int, n: int, r: int, s: int, dtype: torch.dtype, left_dtype: torch.dtype, right_dtype: torch.dtype
) -> str | None:
    """Why `project_both` cannot take an m x n gradient with bases of ranks r and s, or None if it can."""
    return why_not_two_sided(r, s, dtype, left_dtype, right_dtype)


def can_use_both(
    m: int, n: int, r: int, s: int, dtype: torch.dtype, left_dtype: torch.dtype, right_dtype: torch.dtype
) -> bool:
    """Whether `project_both` can run: ranks up to 128, 32 for float16; half of that on HIP.

    It says nothing of speed; the module docstring does.
    """
    return why_not_both(m, n, r, s, dtype, left_dtype, right_dtype) is None


def project_both(grad: Tensor, left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = (I - L Lᵀ) grad (I - R Rᵀ). Scratch: that of `thin_products`, fp32, small beside grad while r and s are.

    Args:
        grad: (m, n) or (batch, m, n), bfloat16, float16 or float32, any strides.
        left: L, (m, r) or (batch, m, r), orthonormal columns, grad's dtype or float32. A rank of 0 is taken.
        right: R, (n, s) or (batch, n, s), likewise.
        out: Like grad; may be grad itself.

    Raises:
        ValueError: Operands that do not fit each other or `can_use_both`; nothing has been written then.
    """
    check_operands("project_both", grad, out, left=left, right=right)
    m, n = grad.shape[-2:]
    reason = why_not_both(m, n, left.shape[-1], right.shape[-1], grad.dtype, left.dtype, right.dtype)
    if reason is not None:
        raise ValueError(f"project_both: {reason}")
    if left.shape[-1] == 0:
        project_one_side(grad.mT, right, out.mT, keep=False)
    elif right.shape[-1] == 0:
        project_one_side(grad, left, out, keep=False)
    elif grad.numel() > 0:
        # Chunks run along the longer dimension, so that their partial sums are of the shorter one.
        if m > n:
            grad, left, right, out = grad.mT, right, left, out.mT
        left_product, right_product, core = thin_products(grad, left, right)
        rank_update(right_product, ((left, core),), right_product)
        rank_update(grad, ((left, left_product), (right_product, right.mT)), out)

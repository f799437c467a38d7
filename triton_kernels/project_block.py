"""The block form, G - L (Lᵀ G R) Rᵀ: one read for the core, then one read and one write.

`thin_products` reads G once for the core Lᵀ G R and stores nothing else; L core is m x s; `rank_update` subtracts
(L core) Rᵀ. 3 m n elements; 2 m n r + 4 m n s operations in bfloat16, or, transposed, with r and s exchanged.

When not to use it: ranks above 128; matrices of a few hundred kB, where its four launches cost more than the bytes.

Tests passed on an H200 (torch 2.11, Triton 3.6); compiled, not run, for sm_80, sm_100 and gfx942.
"""

import torch
from torch import Tensor

from .launch import batch_of, check_operands
from .rank_update import rank_update
from .thin_products import core_product, why_not_two_sided

__all__ = ["can_use_block", "project_block", "why_not_block"]


def why_not_block(
    m: int, n: int, r: int, s: int, dtype: torch.dtype, left_dtype: torch.dtype, right_dtype: torch.dtype
) -> str | None:
    """Why `project_block` cannot take an m x n gradient with bases of ranks r and s, or None if it can."""
    return why_not_two_sided(r, s, dtype, left_dtype, right_dtype)


def can_use_block(
    m: int, n: int, r: int, s: int, dtype: torch.dtype, left_dtype: torch.dtype, right_dtype: torch.dtype
) -> bool:
    """Whether `project_block` can run; the ranks are those of `can_use_both`."""
    return why_not_block(m, n, r, s, dtype, left_dtype, right_dtype) is None


def project_block(grad: Tensor, left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = grad - L Lᵀ grad R Rᵀ. Scratch: the core's partial sums and an m x s matrix, fp32.

    Args:
        grad: (m, n) or (batch, m, n), bfloat16, float16 or float32, any strides.
        left: L, (m, r) or (batch, m, r), orthonormal columns, grad's dtype or float32. A rank of 0 is taken.
        right: R, (n, s) or (batch, n, s), likewise.
        out: Like grad; may be grad itself.

    Raises:
        ValueError: Operands that do not fit each other or `can_use_block`; nothing has been written then.
    """
    check_operands("project_block", grad, out, left=left, right=right)
    m, n = grad.shape[-2:]
    reason = why_not_block(m, n, left.shape[-1], right.shape[-1], grad.dtype, left.dtype, right.dtype)
    if reason is not None:
        raise ValueError(f"project_block: {reason}")
    if left.shape[-1] == 0 or right.shape[-1] == 0:
        if out is not grad:
            out.copy_(grad)
    elif grad.numel() > 0:
        # Panels cut the longer dimension, so that there are enough of them, and L core is of the shorter one.
        if m > n:
            grad, left, right, out = grad.mT, right, left, out.mT
        core = core_product(grad, left, right)
        image = core.new_empty(batch_of(grad), grad.shape[-2], right.shape[-1])
        rank_update(None, ((left, core),), image)
        rank_update(grad, ((image, right.mT),), out)

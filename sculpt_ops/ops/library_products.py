"""The projections in library products: the path of a GPU where arithmetic is the limit, and of what no kernel takes.

Single matrices with bases of their own dtype go through the C++ op, a list of them in one call
(csrc/linalg/project_products.cpp). Here are batches, which take the two sides one after the other, and bases of another
dtype. A kept side goes first, so that the other one is applied to its thin factor and not to the matrix.

Tested on the CPU too, where the formulas are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .heuristics import left_first
from .library import LIBRARY  # noqa: F401  (the op exists once the library is loaded)
from .metric_products import project_metrics
from .split_products import can_split, project_split

__all__ = ["form_of", "is_product", "project_cublas", "project_products"]

_PRODUCTS = torch.ops.sculpt._foreach_project_products_.default
_NO_BASIS = torch.empty(0, device="cpu")


def is_product(grad: Tensor, left: Tensor | None, right: Tensor | None) -> bool:
    """Whether :func:`project_products` takes it: one matrix, bases of its dtype."""
    dtype = grad.dtype
    return grad.dim() == 2 and (left is None or left.dtype is dtype) and (right is None or right.dtype is dtype)


def form_of(keep_left: bool, keep_right: bool, block: bool) -> int:
    """The flags of one matrix as :func:`project_products` takes them."""
    return keep_left + 2 * keep_right + 4 * block


def project_products(
    grads: Sequence[Tensor],
    lefts: Sequence[Tensor | None],
    rights: Sequence[Tensor | None],
    outs: Sequence[Tensor],
    forms: Sequence[int],
) -> None:
    """Write the projections of matrices, checked, that `is_product` takes into outs, which may be grads."""
    bases = [[_NO_BASIS if basis is None else basis for basis in side] for side in (lefts, rights)]
    _PRODUCTS(grads, *bases, outs, forms)


def _subtract(source: Tensor, thin: Tensor, wide: Tensor, out: Tensor) -> None:
    """out = source - thin wide."""
    torch.sub(source, thin @ wide, out=out)


def _through_thin(
    grad: Tensor, left: Tensor | None, right: Tensor | None, out: Tensor, keep_left: bool, keep_right: bool, block: bool
) -> None:
    """A kept side, or the block form: the product with the other side is of a thin factor. Never wider than min(r, s)
    where both sides are kept or block is set."""
    both = block or (keep_left and keep_right)
    if both:
        assert left is not None
        assert right is not None
        m, n = grad.shape[-2:]
        keep_left = left_first(m, n, left.shape[-1], right.shape[-1])
        keep_right = True
    if keep_left:
        assert left is not None
        thin, wide = left, left.mT @ grad
        if right is not None:
            project_cublas(wide, None, right, wide, False, keep_right, False)
    else:
        assert right is not None
        thin, wide = grad @ right, right.mT
        if left is not None:
            project_cublas(thin, left, None, thin, both, False, False)
    if block:
        _subtract(grad, thin, wide, out)
    elif out.is_contiguous():
        torch.matmul(thin, wide, out=out)
    else:
        out.copy_(thin @ wide)


def project_cublas(
    grad: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    out: Tensor,
    keep_left: bool,
    keep_right: bool,
    block: bool,
    left_metric: Tensor | None = None,
    right_metric: Tensor | None = None,
) -> None:
    """Write the projection of grad into out, which may be grad itself.

    A bfloat16 matrix with float32 bases goes through bfloat16 parts of them, another half-precision one through a
    float32 copy.
    """
    if left_metric is not None or right_metric is not None:
        project_metrics(grad, left, right, left_metric, right_metric, out, keep_left, keep_right, block)
        return
    if is_product(grad, left, right):
        project_products([grad], [left], [right], [out], [form_of(keep_left, keep_right, block)])
        return
    if can_split(grad, left, right):
        project_split(grad, left, right, out, keep_left, keep_right, block)
        return
    if any(basis is not None and basis.dtype is not grad.dtype for basis in (left, right)):
        work = grad.float()
        bases = [None if basis is None else basis.float() for basis in (left, right)]
        project_cublas(work, bases[0], bases[1], work, keep_left, keep_right, block)
        out.copy_(work)
        return
    if keep_left or keep_right or block:
        _through_thin(grad, left, right, out, keep_left, keep_right, block)
        return
    source = grad
    if left is not None:
        _subtract(source, left, left.mT @ source, out)
        source = out
    if right is not None:
        _subtract(source, source @ right, right.mT, out)

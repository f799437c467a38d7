"""Projections with metrics, P = L M Lᵀ, in library products.

A bfloat16 matrix goes through bfloat16 tensor cores: the coefficients Lᵀ G in float32, M times those, and their two
parts against the basis (`split_products.py`). With a bfloat16 basis and M = (LᵀL)⁻¹ that is the exact projector onto
the span of its columns in 1 + 2 products of rank r, where a float32 basis takes 2 + 3; M takes three products of r x r
with the coefficients besides, and a side seven launches. Less than 2e-5 of the matrix is left in the protected space
before the result itself is rounded. Two sides that are removed go one after the other, and round in between.

When not to use it: with a float32 basis of rank 64 or less, which the one-pass kernel takes where it fits, without a
metric. Batches and other dtypes take the plain twin. Its tests passed on an H200, where it was no faster than float32
bases (docs/kernels.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .split_products import coefficients_of, parts_of, through_thin_order, wide_mm, write_projection

__all__ = ["project_metrics"]


def _fine_mm(a: Tensor, b: Tensor) -> Tensor:
    """a b of float32 factors to 2^-17, whatever is set for float32 products: by parts."""
    return wide_mm(parts_of(a, 1), parts_of(b.mT, 2).mT)


def _coefficients(grad: Tensor, basis: Tensor, metric: Tensor | None, turned: bool) -> Tensor:
    """M Lᵀ G turned, (n, r), or G R M, (m, r), in float32."""
    if basis.dtype is torch.bfloat16:
        found = coefficients_of(grad, basis, turned)
    else:
        rank = basis.shape[1]
        halves = coefficients_of(grad, parts_of(basis, 1)[:, : 2 * rank], turned)
        found = halves[:, :rank] + halves[:, rank:]
    return found if metric is None else _fine_mm(found, metric if turned else metric.mT)


def _write(grad: Tensor, basis: Tensor, coefficients: Tensor, out: Tensor, turned: bool, keeps: bool) -> None:
    """out = grad - X Cᵀ, or X Cᵀ alone where it keeps."""
    parts = parts_of(coefficients, 2)
    if basis.dtype is torch.bfloat16:
        parts, near = parts[:, basis.shape[1] :], torch.cat([basis, basis], dim=1)
    else:
        near = parts_of(basis, 1)
    write_projection(grad, near, parts, out, turned, keeps)


def _two(
    grad: Tensor,
    bases: tuple[Tensor, Tensor],
    metrics: tuple[Tensor | None, Tensor | None],
    out: Tensor,
    turned: bool,
    spanned: bool,
    keeps: bool,
) -> None:
    """The near side and, applied to its coefficients alone, the far one: as `split_products._through_thin`."""
    near, far = bases
    coefficients = _coefficients(grad, near, metrics[0], turned)
    wide = far.float()
    core = _fine_mm(wide.mT, coefficients)
    if metrics[1] is not None:
        core = _fine_mm(metrics[1] if turned else metrics[1].mT, core)
    inside = _fine_mm(wide, core)
    _write(grad, near, inside if spanned else coefficients - inside, out, turned, keeps)


def project_metrics(
    grad: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    left_metric: Tensor | None,
    right_metric: Tensor | None,
    out: Tensor,
    keep_left: bool,
    keep_right: bool,
    block: bool,
) -> None:
    """Write the projection of grad into out, which may be grad itself."""
    flags = {"keep_left": keep_left, "keep_right": keep_right, "block": block}
    if grad.dtype is not torch.bfloat16 or any(x is not None and x.dim() > 2 for x in (grad, left, right)):
        out.copy_(reference.project(grad, left, right, **flags, left_metric=left_metric, right_metric=right_metric))
    elif left is not None and right is not None and (keep_left or keep_right or block):
        turned, spanned = through_thin_order(grad, left, right, keep_left, keep_right, block)
        bases, metrics = (left, right), (left_metric, right_metric)
        if turned:
            bases, metrics = bases[::-1], metrics[::-1]
        _two(grad, bases, metrics, out, turned, spanned, not block)
    else:
        for basis, metric, keeps, turned in (
            (left, left_metric, keep_left, False),
            (right, right_metric, keep_right, True),
        ):
            if basis is not None:
                _write(grad, basis, _coefficients(grad, basis, metric, turned), out, turned, keeps)
                grad = out

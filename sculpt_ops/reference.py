"""Plain torch twins of every op, for any floating dtype: what tests and benchmarks compare the kernels with.

A half-precision matrix with an fp32 basis is computed in fp32 and rounded once; otherwise the arithmetic is that of the
matrix's own dtype. Nothing here is fast and nothing here validates: the ops in :mod:`sculpt_ops.ops` do both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["foreach_project_", "project", "project_", "restore_"]


def _one_side(matrix: Tensor, basis: Tensor | None, *, keep: bool, right: bool) -> Tensor:
    if basis is None:
        return matrix
    inside = (matrix @ basis) @ basis.mT if right else basis @ (basis.mT @ matrix)
    return inside if keep else matrix - inside


def project(
    grad: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
    *,
    keep_left: bool = False,
    keep_right: bool = False,
    block: bool = False,
) -> Tensor:
    """``(I - L Lᵀ) grad (I - R Rᵀ)``; see :func:`sculpt_ops.project` for shapes, flags and sources."""
    dtype = grad.dtype
    for basis in (left, right):
        if basis is not None:
            dtype = torch.promote_types(dtype, basis.dtype)
    matrix = grad.to(dtype)
    left = None if left is None else left.to(dtype)
    right = None if right is None else right.to(dtype)
    if block:
        inside = _one_side(_one_side(matrix, left, keep=True, right=False), right, keep=True, right=True)
        return (matrix - inside).to(grad.dtype)
    matrix = _one_side(matrix, left, keep=keep_left, right=False)
    matrix = _one_side(matrix, right, keep=keep_right, right=True)
    return matrix.to(grad.dtype, copy=matrix is grad)


def project_(
    grad: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
    *,
    keep_left: bool = False,
    keep_right: bool = False,
    block: bool = False,
) -> Tensor:
    """In-place :func:`project`; returns ``grad``."""
    return grad.copy_(project(grad, left, right, keep_left=keep_left, keep_right=keep_right, block=block))


def foreach_project_(
    grads: Sequence[Tensor],
    lefts: Sequence[Tensor | None],
    rights: Sequence[Tensor | None],
    *,
    keep_lefts: Sequence[bool] = (),
    keep_rights: Sequence[bool] = (),
    block: bool = False,
) -> None:
    """:func:`project_` on every entry; empty flag lists mean ``False`` throughout."""
    for i, (grad, left, right) in enumerate(zip(grads, lefts, rights, strict=True)):
        keep_left = keep_lefts[i] if keep_lefts else False
        keep_right = keep_rights[i] if keep_rights else False
        project_(grad, left, right, keep_left=keep_left, keep_right=keep_right, block=block)


def restore_(
    weight: Tensor,
    left: Tensor | None,
    left_image: Tensor | None,
    right: Tensor | None,
    right_image: Tensor | None,
    *,
    core: Tensor | None = None,
    reference: Tensor | None = None,
    keep_left: bool = False,
    keep_right: bool = False,
    block: bool = False,
) -> Tensor:
    """Put the protected part of ``weight`` back; see :func:`sculpt_ops.restore_`. Returns ``weight``."""
    dtype = weight.dtype
    for basis in (left, right):
        if basis is not None:
            dtype = torch.promote_types(dtype, basis.dtype)
    cast = [None if t is None else t.to(dtype) for t in (left, left_image, right, right_image, core, reference)]
    left, left_image, right, right_image, core, reference = cast
    matrix = weight.to(dtype)
    if block:
        assert left is not None
        assert right is not None
        assert core is not None
        return weight.copy_(matrix - left @ (left.mT @ matrix @ right - core) @ right.mT)
    if left is not None:
        if keep_left:
            assert reference is not None
            matrix = reference + left @ (left.mT @ (matrix - reference))
        else:
            assert left_image is not None
            matrix = matrix - left @ (left.mT @ matrix - left_image)
    if right is not None:
        if keep_right:
            assert reference is not None
            matrix = reference + (matrix - reference) @ right @ right.mT
        else:
            assert right_image is not None
            matrix = matrix - (matrix @ right - right_image) @ right.mT
    return weight.copy_(matrix)

"""``project``, ``project_``, ``foreach_project_`` and ``restore_`` on DTensors.

A side whose rows (of the left basis) or columns (of the right) are whole on every rank is projected where it lies, by
the kernels of one rank and without communication; it comes first. Then the others, all matrices together
(op_sides.py). The sides commute; in ``restore_`` they do where the images are those of one start weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..ops.checks import check_foreach_apart
from .op_layout import CORE, LEFT, LEFT_IMAGE, RIGHT, RIGHT_IMAGE, SAME, Layout, common_mesh, local_of, wrap
from .op_sides import BlockSide, OneSide, Summed, project_sides

__all__ = ["foreach_project_", "project", "project_", "restore_"]

_FOREACH_ = torch.ops.sculpt.foreach_project_.default
_RESTORE_ = torch.ops.sculpt.restore_.default
_PRODUCT = torch.ops.sculpt._product.default
_THIN = ("left", "right", "left_metric", "right_metric")


def project(grad: Tensor, *thin: Tensor | None, **flags: Any) -> Tensor:
    mesh, bases = _single("project", grad, thin)
    Layout.of("project", "grad", grad)
    result = wrap(local_of(grad).clone(), mesh, grad.placements, grad.shape)  # type: ignore[attr-defined]
    _project("project", mesh, [_Matrix("grad", result, **bases, **flags)])
    return result


def project_(grad: Tensor, *thin: Tensor | None, **flags: Any) -> None:
    mesh, bases = _single("project_", grad, thin)
    _project("project_", mesh, [_Matrix("grad", grad, **bases, **flags)])


def _single(op: str, grad: Tensor, thin: Sequence[Tensor | None]) -> tuple[DeviceMesh, dict[str, Any]]:
    bases: dict[str, Any] = {"left": None, "right": None, **dict(zip(_THIN, thin, strict=False))}
    return common_mesh(op, {"grad": grad, **bases}), bases


def foreach_project_(
    grads: Sequence[Tensor],
    lefts: Sequence[Tensor | None],
    rights: Sequence[Tensor | None],
    left_metrics: Sequence[Tensor | None] | None = None,
    right_metrics: Sequence[Tensor | None] | None = None,
    *,
    keep_lefts: Sequence[bool] = (),
    keep_rights: Sequence[bool] = (),
    block: bool = False,
) -> None:
    none, off = [None] * len(grads), [False] * len(grads)
    lists = {
        "grads": grads,
        "lefts": lefts,
        "rights": rights,
        "left_metrics": left_metrics or none,
        "right_metrics": right_metrics or none,
    }
    tensors = {f"{name}[{i}]": tensor for name, entries in lists.items() for i, tensor in enumerate(entries)}
    mesh = common_mesh("foreach_project_", tensors)
    matrices = [
        _Matrix(f"grads[{i}]", grad, left, right, keep_left, keep_right, block, one, other)
        for i, (grad, left, right, one, other, keep_left, keep_right) in enumerate(
            zip(*lists.values(), keep_lefts or off, keep_rights or off, strict=True)
        )
    ]
    _project("foreach_project_", mesh, matrices)


def restore_(
    weight: Tensor,
    left: Tensor | None,
    left_image: Tensor | None,
    right: Tensor | None,
    right_image: Tensor | None,
    *,
    core: Tensor | None = None,
    reference: Tensor | None = None,
    **flags: Any,
) -> None:
    start = {"left_image": left_image, "right_image": right_image, "core": core, "reference": reference}
    mesh = common_mesh("restore_", {"weight": weight, "left": left, "right": right, **start})
    _project("restore_", mesh, [_Matrix("weight", weight, left, right, **flags, start=start)])


@dataclass(frozen=True)
class _Matrix:
    """A DTensor to be written and its bases; `start`: what `restore_` restores, by argument."""

    name: str
    matrix: Tensor
    left: Tensor | None
    right: Tensor | None
    keep_left: bool = False
    keep_right: bool = False
    block: bool = False
    left_metric: Tensor | None = None
    right_metric: Tensor | None = None
    start: Mapping[str, Tensor | None] | None = None


@dataclass(frozen=True)
class _Side:
    """This rank's part of a basis and of its image, the mesh dimensions over which its `rows` are split, all of the
    basis where that is at hand, and its metric."""

    basis: Tensor
    keep: bool
    dims: tuple[int, ...]
    rows: int
    whole: Tensor | None
    image: Tensor | None
    metric: Tensor | None


@dataclass(frozen=True)
class _Part:
    """This rank's part of a matrix and of all that belongs to it."""

    matrix: Tensor
    left: _Side | None
    right: _Side | None
    block: bool
    restored: bool
    core: Tensor | None
    reference: Tensor | None

    @property
    def dims(self) -> tuple[int, ...]:
        """Mesh dimensions to sum over."""
        return tuple(dim for side in (self.left, self.right) if side is not None for dim in side.dims)


def _project(op: str, mesh: DeviceMesh, matrices: Sequence[_Matrix]) -> None:
    layouts = [Layout.of(op, each.name, each.matrix) for each in matrices]
    parts = [_part(each, layout) for each, layout in zip(matrices, layouts, strict=True)]
    if not torch.compiler.is_compiling():
        check_foreach_apart(
            op,
            [part.matrix for part in parts],
            [_basis(part.left) for part in parts],
            [_basis(part.right) for part in parts],
            [_metric(part.left) for part in parts],
            [_metric(part.right) for part in parts],
        )
    carried = [_carried(part) for part in parts]
    _project_local([_local_sides(part, thin is not None) for part, thin in zip(parts, carried, strict=True)])
    first: list[Summed] = []
    second: list[Summed] = []
    for part, thin in zip(parts, carried, strict=True):
        sides = [thin] if thin is not None else _summed_sides(part)
        first += sides[:1]
        second += sides[1:]
    for stage in (first, second):
        project_sides(op, mesh, stage)


def _part(each: _Matrix, layout: Layout) -> _Part:
    start = each.start or {}
    axes = {"left_image": LEFT_IMAGE, "right_image": RIGHT_IMAGE, "core": CORE, "reference": SAME}
    cut = {name: None if tensor is None else layout.part(tensor, axes[name]) for name, tensor in start.items()}

    def side(basis: Tensor | None, metric: Tensor | None, keep: bool, left: bool) -> _Side | None:
        if basis is None:
            return None
        assert isinstance(basis, DTensor)
        span = layout.rows if left else layout.columns
        at_hand = (
            all(isinstance(placement, Replicate) for placement in basis.placements)
            and all(type(layout.placements[dim]) is Shard for dim in span.dims)
            and (basis.ndim == 2 or not layout.batch_dims)
        )
        image = None if keep else cut.get("left_image" if left else "right_image")
        own = layout.part(basis, LEFT if left else RIGHT)
        whole = local_of(basis) if at_hand else None
        metric = None if metric is None else layout.part(metric, CORE)
        return _Side(own, keep, span.dims, span.size, whole, image, metric)

    left = side(each.left, each.left_metric, each.keep_left, True)
    right = side(each.right, each.right_metric, each.keep_right, False)
    matrix, core, reference = local_of(each.matrix), cut.get("core"), cut.get("reference")
    return _Part(matrix, left, right, each.block, each.start is not None, core, reference)


def _local_sides(part: _Part, carried: bool) -> _Part:
    """Of `part` the sides that need no sum."""
    if part.block or carried:
        return replace(part, left=None, right=None) if part.dims or carried else part
    kept = [side if side is not None and not side.dims else None for side in (part.left, part.right)]
    return replace(part, left=kept[0], right=kept[1])


def _project_local(parts: Sequence[_Part]) -> None:
    parts = [part for part in parts if (part.left or part.right) and part.matrix.numel()]
    for block in (False, True):
        plain = [part for part in parts if part.block is block and not part.restored]
        if plain:
            _FOREACH_(
                [part.matrix for part in plain],
                [_basis(part.left) for part in plain],
                [_basis(part.right) for part in plain],
                [_metric(part.left) for part in plain],
                [_metric(part.right) for part in plain],
                keep_lefts=[part.left is not None and part.left.keep for part in plain],
                keep_rights=[part.right is not None and part.right.keep for part in plain],
                block=block,
            )
    for part in parts:
        if part.restored:
            left, right = part.left, part.right
            _RESTORE_(
                part.matrix,
                _basis(left),
                None if left is None else left.image,
                _basis(right),
                None if right is None else right.image,
                core=part.core,
                reference=part.reference,
                keep_left=left is not None and left.keep,
                keep_right=right is not None and right.keep,
                block=part.block,
            )


def _basis(side: _Side | None) -> Tensor | None:
    return None if side is None else side.basis


def _metric(side: _Side | None) -> Tensor | None:
    return None if side is None else side.metric


def _summed_sides(part: _Part) -> list[Summed]:
    left, right, matrix = part.left, part.right, part.matrix
    if part.block:
        assert left is not None
        assert right is not None
        if not part.dims:
            return []
        return [BlockSide(matrix, left.basis, right.basis, part.core, part.dims, left.metric, right.metric)]
    sides: list[Summed] = []
    for side, transposed in ((left, False), (right, True)):
        if side is not None and side.dims:
            view, image, reference, metric = (
                tensor.mT if transposed and tensor is not None else tensor
                for tensor in (matrix, side.image, part.reference if side.keep else None, side.metric)
            )
            assert view is not None
            thin = image, reference, side.whole, metric
            sides.append(OneSide(view, side.basis, side.keep, side.dims, side.rows, *thin))
    return sides


def _carried(part: _Part) -> OneSide | None:
    """Where one side needs a sum and the other keeps a narrow space: the coordinates in that space stand for the matrix
    until the sum is done, r x s numbers are summed instead of r x n."""
    left, right = part.left, part.right
    if part.block or part.restored or left is None or right is None or bool(left.dims) == bool(right.dims):
        return None
    turned = not left.dims
    summed, other, matrix = (right, left, part.matrix.mT) if turned else (left, right, part.matrix)
    if not other.keep or other.basis.shape[-1] >= matrix.shape[-1]:
        return None
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    wide = other.basis.to(dtype)
    thin = _PRODUCT(matrix, wide.expand(*matrix.shape[:-2], *wide.shape[-2:]))
    whole = None if summed.whole is None else summed.whole.to(dtype)
    of_summed, of_other = (
        side.metric.mT if turned and side.metric is not None else side.metric for side in (summed, other)
    )

    def spread() -> None:
        matrix.copy_((thin if of_other is None else thin @ of_other.to(dtype)) @ wide.mT)

    sums = summed.basis.to(dtype), summed.keep, summed.dims, summed.rows
    return OneSide(thin, *sums, whole_basis=whole, metric=of_summed, then=spread)

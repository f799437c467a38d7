"""One side of a projection where the basis and the matrix are split over ranks along the side that is summed.

Two ways, chosen by what each rank sends: the coefficients ``Lᵀ G`` are summed over the ranks (an all-reduce of r x n
numbers), or the matrix is exchanged into column shards, projected there and exchanged back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .agreement import Ranks
from .op_collectives import buckets, start_sums
from .op_exchange import chunk, swap

__all__ = ["BlockSide", "OneSide", "Summed", "cheaper_exchange", "project_sides"]

_PRODUCT = torch.ops.sculpt._product.default


def cheaper_exchange(
    m: int, n: int, r: int, ranks: int, itemsize: int, coefficient_itemsize: int
) -> Literal["coefficients", "matrix"]:
    """What to send to project an m x n matrix, split by rows over `ranks`, with a left basis of r columns.

    "coefficients": summed in a ring, 2 (ranks - 1) / ranks of r n numbers of `coefficient_itemsize` bytes leave each
    rank. "matrix": to column shards and back, 2 (ranks - 1) / ranks of m n / ranks numbers of `itemsize` bytes. A draw
    goes to the coefficients: one collective instead of two.
    """
    return "coefficients" if r * n * coefficient_itemsize * ranks <= m * n * itemsize else "matrix"


class Summed(Protocol):
    """A projection through coefficients that are sums over the ranks of the mesh dimensions `dims`."""

    matrix: Tensor
    dims: tuple[int, ...]

    def coefficients(self) -> Tensor:
        """This rank's share of them, float32 or wider."""

    def apply(self, coefficients: Tensor) -> None:
        """Write the matrix, given the sums."""


@dataclass
class OneSide:
    """``matrix -= basis (basisᵀ matrix - image)``, or with `keep` ``matrix = reference + basis basisᵀ (matrix -
    reference)``, where this rank has some of the rows. A right side is given transposed.

    matrix: (..., k, c), written; basis: (..., k, r); image: (..., r, c); reference: (..., k, c), None for zeros.
    metric: (..., r, r), ``basis metric basisᵀ`` then; neither image nor reference with it.
    rows: of the whole matrix. whole_basis: (..., rows, r) where it is at hand and the rows are split over one mesh
    dimension: then the matrix may be exchanged. then: called when the matrix is written.
    """

    matrix: Tensor
    basis: Tensor
    keep: bool
    dims: tuple[int, ...]
    rows: int
    image: Tensor | None = None
    reference: Tensor | None = None
    whole_basis: Tensor | None = None
    metric: Tensor | None = None
    then: Callable[[], None] | None = None

    def exchanged(self, mesh: DeviceMesh) -> bool:
        """Whether the matrix is sent, not the coefficients; the same on all ranks that share the columns."""
        if self.whole_basis is None or len(self.dims) != 1 or self.reference is not None:
            return False
        columns, ranks = self.matrix.shape[-1], mesh.size(self.dims[0])
        sizes = self.matrix.element_size(), _sum_dtype(self.matrix).itemsize
        return cheaper_exchange(self.rows, columns, self.basis.shape[-1], ranks, *sizes) == "matrix"

    def coefficients(self) -> Tensor:
        matrix, dtype = self.matrix, _sum_dtype(self.matrix)
        if self.reference is not None:
            matrix = matrix.to(dtype) - self.reference
        basis = self.basis.to(dtype).expand(*matrix.shape[:-2], *self.basis.shape[-2:])
        # (..., c, r): the kernel takes the matrix transposed as it lies.
        out: Tensor = _PRODUCT(matrix, basis, transpose=True)
        return out

    def apply(self, coefficients: Tensor) -> None:
        if self.image is not None:
            coefficients = coefficients - self.image.mT
        if self.metric is not None:
            coefficients = coefficients @ self.metric.mT.to(coefficients.dtype)
        _add_product(self.matrix, self.basis, coefficients.mT, self.keep, self.reference)
        if self.then is not None:
            self.then()


@dataclass
class BlockSide:
    """``matrix -= left (leftᵀ matrix right - core) rightᵀ`` where this rank has some of the rows, the columns or both.

    The coefficients are the r x s core alone, ``left_metric leftᵀ matrix right right_metric`` with metrics."""

    matrix: Tensor
    left: Tensor
    right: Tensor
    core: Tensor | None
    dims: tuple[int, ...]
    left_metric: Tensor | None = None
    right_metric: Tensor | None = None

    def coefficients(self) -> Tensor:
        dtype, batch = _sum_dtype(self.matrix), self.matrix.shape[:-2]
        left, right = (b.to(dtype).expand(*batch, *b.shape[-2:]) for b in (self.left, self.right))
        out: Tensor = _PRODUCT(left, _PRODUCT(self.matrix, right), transpose=True)
        return out

    def apply(self, coefficients: Tensor) -> None:
        if self.core is not None:
            coefficients = coefficients - self.core
        if self.left_metric is not None:
            coefficients = self.left_metric.to(coefficients.dtype) @ coefficients
        if self.right_metric is not None:
            coefficients = coefficients @ self.right_metric.to(coefficients.dtype)
        thin = self.right.to(coefficients.dtype) @ coefficients.mT
        _add_product(self.matrix, self.left, thin.mT, keep=False, reference=None)


def project_sides(op: str, mesh: DeviceMesh, sides: Sequence[Summed]) -> None:
    """Project in place, of all the matrices together: a few collectives, whatever their number."""
    moved = [side for side in sides if isinstance(side, OneSide) and side.exchanged(mesh)]
    summed = [side for side in sides if not any(side is other for other in moved)]
    _sum_coefficients(op, mesh, summed)
    _exchange(op, mesh, moved)


def _sum_coefficients(op: str, mesh: DeviceMesh, sides: Sequence[Summed]) -> None:
    def nbytes(side: Summed) -> int:
        r = side.basis.shape[-1] if isinstance(side, OneSide) else side.right.shape[-1]  # type: ignore[attr-defined]
        return r * side.matrix[..., :1, :].numel() * _sum_dtype(side.matrix).itemsize

    # A bucket is on its way while the coefficients of the next one are computed.
    sent: tuple[list[Summed], Callable[[], list[Tensor]]] | None = None
    for bucket in buckets(sides, lambda side: (side.dims, _sum_dtype(side.matrix)), nbytes):
        wait = start_sums(op, mesh, bucket[0].dims, [side.coefficients() for side in bucket])
        _finish(sent)
        sent = bucket, wait
    _finish(sent)


def _finish(sent: tuple[list[Summed], Callable[[], list[Tensor]]] | None) -> None:
    if sent is not None:
        for side, coefficients in zip(sent[0], sent[1](), strict=True):
            side.apply(coefficients)


def _exchange(op: str, mesh: DeviceMesh, sides: Sequence[OneSide]) -> None:
    def nbytes(side: OneSide) -> int:  # of the largest shard: the same on every rank
        rows = chunk(side.rows, 0, mesh.size(side.dims[0]))[1]
        return rows * side.matrix[..., :1, :].numel() * side.matrix.element_size()

    for bucket in buckets(sides, lambda side: (side.dims, side.matrix.dtype), nbytes):
        ranks = Ranks.of(mesh.get_group(bucket[0].dims[0]))
        matrices = [side.matrix for side in bucket]
        parts = swap(op, ranks, matrices, [side.rows for side in bucket], joined=-2, split=-1)
        _project_columns(bucket, parts, ranks)
        back = swap(op, ranks, parts, [matrix.shape[-1] for matrix in matrices], joined=-1, split=-2)
        for side, result in zip(bucket, back, strict=True):
            side.matrix.copy_(result)
            if side.then is not None:
                side.then()


def _project_columns(sides: Sequence[OneSide], parts: Sequence[Tensor], ranks: Ranks) -> None:
    """Of each side's matrix all rows of some columns."""
    plain = [i for i, side in enumerate(sides) if side.image is None and parts[i].numel()]
    if plain:
        torch.ops.sculpt.foreach_project_(
            [parts[i] for i in plain],
            [sides[i].whole_basis for i in plain],
            [None] * len(plain),
            left_metrics=[sides[i].metric for i in plain],
            keep_lefts=[sides[i].keep for i in plain],
        )
    for side, part in zip(sides, parts, strict=True):
        if side.image is not None:
            image = side.image.narrow(-1, *chunk(side.matrix.shape[-1], ranks.rank, ranks.size))
            torch.ops.sculpt.restore_(part, side.whole_basis, image, None, None)


def _sum_dtype(matrix: Tensor) -> torch.dtype:
    return torch.promote_types(matrix.dtype, torch.float32)


def _add_product(matrix: Tensor, basis: Tensor, coefficients: Tensor, keep: bool, reference: Tensor | None) -> None:
    """``matrix -= basis @ coefficients``; with `keep` ``matrix = reference + basis @ coefficients``. Rounded once."""
    if matrix.dim() == 2 and matrix.dtype is basis.dtype is coefficients.dtype:
        if reference is not None:
            matrix.copy_(reference)
        add = not keep or reference is not None
        matrix.addmm_(basis, coefficients, beta=1 if add else 0, alpha=1 if keep else -1)
        return
    basis = basis.expand(*matrix.shape[:-2], *basis.shape[-2:])
    step = _PRODUCT(basis, coefficients)
    if keep:
        matrix.copy_(step if reference is None else step.add_(reference))
    else:
        matrix.sub_(step)

"""`top_subspace` of a DTensor: the Gram matrix of its smaller side is summed, the weight never gathered."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from ..bases import TopSubspace
from ..decompose import _scale_by, _Task
from ..linalg import complement, orthonormal
from .op_collectives import agreed, reduced
from .op_exchange import whole
from .op_layout import LEFT, Layout, common_mesh, local_of, wrap

__all__ = ["ShardedTopSubspace", "top_subspace_sharded"]


@dataclass(frozen=True, eq=False, repr=False)
class ShardedTopSubspace(TopSubspace):
    """The bases are DTensors: of the smaller side whole on every rank, of the longer side split along it as the matrix
    is, or would be with its longer side split. Each is computed when it is first read, on all ranks together.

    near, rest: plain, the same on every rank. matrix: with its longer side split.
    """

    @cached_property
    def singular_values(self) -> Tensor:
        layout = Layout.of("top_subspace", "matrix", self._image)
        squares = local_of(self._image).double().square().sum(0)
        values = reduced("top_subspace", layout.mesh, layout.rows.dims, squares).sqrt() / self.scale
        return self._everywhere(values.sort(descending=True).values.to(self._dtype))

    @cached_property
    def _near_basis(self) -> Tensor:
        return self._everywhere(orthonormal(self.near.to(self._dtype)))

    @cached_property
    def _far_basis(self) -> Tensor:
        basis: Tensor = torch.ops.sculpt.orthonormalize(self._image)
        return basis

    @cached_property
    def _near_free(self) -> Tensor:
        if self.rest is None:
            return self._everywhere(complement(self.near.double()).to(self._dtype))
        return self._everywhere(orthonormal(self.rest.to(self._dtype)))

    @cached_property
    def _far_free(self) -> Tensor:
        """Its own rows on every rank, from the reflectors of the whole basis: those are a thin matrix."""
        layout = Layout.of("top_subspace", "matrix", self._far_basis)
        size, start, length = layout.rows.size, layout.rows.start, layout.rows.length
        basis = local_of(self._far_basis.redistribute(placements=[Replicate()] * layout.mesh.ndim)).double()  # type: ignore[attr-defined]
        own = basis.new_zeros(size, length)
        own[start : start + length].fill_diagonal_(1.0)
        if self.rank and length:
            own = torch.ormqr(*torch.geqrf(basis), own, transpose=True)
        rows = own[self.rank :].mT.to(self._dtype).contiguous()
        return wrap(rows, layout.mesh, layout.placed(LEFT, 2), (size, size - self.rank))

    def _everywhere(self, tensor: Tensor) -> Tensor:
        assert isinstance(self.matrix, DTensor)
        mesh = self.matrix.device_mesh
        return wrap(tensor, mesh, [Replicate()] * mesh.ndim, tensor.shape)


@torch.no_grad()
def top_subspace_sharded(matrix: Tensor, rank: int | None, energy: float | None) -> ShardedTopSubspace:
    """Arguments as checked by `sculpt_ops.top_subspace`. Collective; the same on every rank.

    By the Gram matrix of the smaller side in float64, whatever the rank: singular values below 1.5e-6 of the largest
    are not told apart. A matrix split along its smaller side is first exchanged into one that is split along the other.
    """
    op = "top_subspace"
    mesh = common_mesh(op, {"matrix": matrix})
    matrix = matrix.detach()
    assert isinstance(matrix, DTensor)
    m, n = matrix.shape
    matrix = whole(op, matrix, -2, -1) if m < n else whole(op, matrix, -1, -2)
    layout, local = Layout.of(op, "matrix", matrix), local_of(matrix)
    dims = (layout.columns if m < n else layout.rows).dims
    peak = local.abs().amax().double() if local.numel() else local.new_zeros((), dtype=torch.float64)
    # The largest of NaN and a number is either, by the backend.
    peak = reduced(op, mesh, dims, peak.nan_to_num(nan=torch.inf), largest=True)
    local, scale = _scale_by(local, float(peak))
    if scale != 1.0:
        matrix = wrap(local, mesh, matrix.placements, matrix.shape)
    gram = reduced(op, mesh, dims, torch.ops.sculpt._gram(local, transpose=m < n, double=True))
    values, vectors = agreed(op, mesh, *torch.ops.sculpt._eigh(gram))
    squares = values.flip(0).clamp_(min=0)
    total = float(squares.sum())
    found = _Task(matrix, scale, energy if rank is None else rank, None).rank(squares, total)
    near, rest = vectors[:, len(squares) - found :].flip(1), vectors[:, : len(squares) - found]
    held = min(float(squares[:found].sum()) / total, 1.0) if total > 0 else 1.0
    arguments: dict[str, Any] = {"rank": found, "energy": held, "method": "gram", "matrix": matrix, "scale": scale}
    return ShardedTopSubspace(near=near, rest=rest, **arguments)

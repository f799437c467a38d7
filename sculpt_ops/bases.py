"""`TopSubspace`: what `top_subspace` returns, its bases computed when they are first read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from .linalg import complement, orthonormal

__all__ = ["Method", "TopSubspace"]

Method = Literal["rsvd", "gram", "svd"]


@dataclass(frozen=True, eq=False, repr=False)
class TopSubspace:
    """The spaces of the top `rank` singular vectors of a matrix (m, n), and what is orthogonal to them.

    Every basis is computed when it is first read and then kept, in float32 (float64 for a float64 matrix), orthonormal
    to 3e-7 by a last step in float64. The two sides are paired: the longer side's basis spans the image of the shorter
    side's (`left` that of `matrix @ right`, for m < n `right` that of `matrix.T @ left`), and where that image has a
    smaller rank it is completed. What is read first after the matrix was changed in place raises RuntimeError.

    rank: number of singular directions. energy: share of ||matrix||² that they hold, 1.0 for a matrix of zeros.
    method: "rsvd" (randomized block Krylov), "gram" (eigenvectors of the Gram matrix) or "svd".
    matrix: as given, no copy, but multiplied by `scale`, a power of two, where its squares would overflow or vanish.
    near: (min(m, n), rank), the shorter side's vectors as found; rest: those that remain, if they were found as well.
    far: the longer side's vectors and values: the singular values, where the method gives them.
    """

    rank: int
    energy: float
    method: Method
    matrix: Tensor
    scale: float
    near: Tensor
    rest: Tensor | None = None
    far: Tensor | None = None
    values: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "_version", self._current_version())

    @property
    def left(self) -> Tensor:
        """(m, rank) orthonormal basis of the top left singular space."""
        return self._near_basis if self._left_is_near else self._far_basis

    @property
    def right(self) -> Tensor:
        """(n, rank) orthonormal basis of the top right singular space."""
        return self._far_basis if self._left_is_near else self._near_basis

    @property
    def free_left(self) -> Tensor:
        """(m, m - rank) orthonormal basis of all that is orthogonal to `left`."""
        return self._near_free if self._left_is_near else self._far_free

    @property
    def free_right(self) -> Tensor:
        """(n, n - rank) orthonormal basis of all that is orthogonal to `right`."""
        return self._far_free if self._left_is_near else self._near_free

    @cached_property
    def singular_values(self) -> Tensor:
        """(rank,), descending: the lengths of the images of the shorter side's vectors, which keep the digits that a
        square root of an eigenvalue of the Gram matrix loses."""
        values = self._image.mT.contiguous().norm(dim=1) if self.values is None else self.values
        return (values.sort(descending=True).values.double() / self.scale).to(self._dtype)

    @cached_property
    def _near_basis(self) -> Tensor:
        return orthonormal(self.near.to(self._dtype))

    @cached_property
    def _far_basis(self) -> Tensor:
        return orthonormal(self._image if self.far is None else self.far.to(self._dtype))

    @cached_property
    def _near_free(self) -> Tensor:
        if self.rest is None:
            return complement(self._near_basis.double()).to(self._dtype)
        return orthonormal(self.rest.to(self._dtype))

    @cached_property
    def _far_free(self) -> Tensor:
        return complement(self._far_basis.double()).to(self._dtype)

    @cached_property
    def _image(self) -> Tensor:
        if self._current_version() != self.__dict__["_version"]:
            raise RuntimeError("top_subspace: matrix: changed in place before its bases were read")
        image: Tensor = torch.ops.sculpt._product(self.matrix, self._near_basis, transpose=self._left_is_near)
        return image

    @property
    def _left_is_near(self) -> bool:
        return self.matrix.shape[0] < self.matrix.shape[1]

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.matrix.dtype, torch.float32)

    def _current_version(self) -> int:
        return 0 if self.matrix.is_inference() else self.matrix._version

    def __repr__(self) -> str:
        return (
            f"TopSubspace({tuple(self.matrix.shape)}, rank={self.rank}, energy={self.energy:.4f}, method={self.method})"
        )

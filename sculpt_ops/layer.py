"""The protected subspace of one weight matrix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from .bases import TopSubspace
from .ops import foreach_project_, project

__all__ = ["LayerSubspace", "Sides", "check_sides", "project_each_"]

Sides = Literal["both", "left", "right", "block"]


def check_sides(sides: str) -> Sides:
    """`sides` if it is one of "both", "left", "right", "block"; otherwise a ValueError."""
    if sides not in get_args(Sides):
        raise ValueError(f"sides must be one of {', '.join(get_args(Sides))}; got {sides!r}")
    return cast(Sides, sides)


@dataclass(frozen=True, eq=False, repr=False)
class LayerSubspace:
    """Bases of what is protected in one parameter of `shape` (m, n), as stored.

    left: (m, r), right: (n, s), columns orthonormal to 3e-7, fp32 (float64 for a float64 parameter); None on a side
        that is not protected. With `keep_left` or `keep_right` that basis spans the free space instead of the
        protected one.
    block: only the product of the two spaces is protected, P_left W P_right.
    rank: number of protected singular directions, whatever is stored.
    energy: share of the squared singular values that they hold.
    """

    shape: tuple[int, int]
    rank: int
    energy: float
    left: Tensor | None = None
    right: Tensor | None = None
    keep_left: bool = False
    keep_right: bool = False
    block: bool = False

    @classmethod
    def from_top_subspace(cls, top: TopSubspace, sides: Sides) -> LayerSubspace:
        """Protect the directions of `top`.

        Where the free space is the narrower one its basis is stored and the keep flag set, except for sides="block".
        """
        m, n = top.matrix.shape
        with_left, with_right = sides != "right", sides != "left"
        keep_left = with_left and sides != "block" and m - top.rank < top.rank
        keep_right = with_right and sides != "block" and n - top.rank < top.rank
        left = (top.free_left if keep_left else top.left) if with_left else None
        right = (top.free_right if keep_right else top.right) if with_right else None
        return cls(
            shape=(m, n),
            rank=top.rank,
            energy=top.energy,
            left=None if left is None else left.contiguous(),
            right=None if right is None else right.contiguous(),
            keep_left=keep_left,
            keep_right=keep_right,
            block=sides == "block",
        )

    def protected_left(self, matrix: Tensor) -> Tensor:
        """P_left @ matrix (m, c), in the dtype of `matrix`. Needs a left basis."""
        assert self.left is not None
        return project(matrix, self.left.to(matrix.dtype), keep_left=not self.keep_left)

    def protected_right(self, matrix: Tensor) -> Tensor:
        """P_right @ matrix (n, c), in the dtype of `matrix`. Needs a right basis."""
        assert self.right is not None
        return project(matrix, self.right.to(matrix.dtype), keep_left=not self.keep_right)

    def to(self, device: torch.device | str) -> LayerSubspace:
        """The same subspace with its bases on `device`."""
        moved = (None if basis is None else basis.to(device) for basis in (self.left, self.right))
        left, right = moved
        return replace(self, left=left, right=right)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored bases."""
        return sum(basis.nbytes for basis in (self.left, self.right) if basis is not None)

    def __repr__(self) -> str:
        sides = [
            f"{side}={tuple(basis.shape)}{' (free space kept)' if keep else ''}"
            for side, basis, keep in (("left", self.left, self.keep_left), ("right", self.right, self.keep_right))
            if basis is not None
        ]
        block = ", block" if self.block else ""
        return f"LayerSubspace({self.shape}, rank={self.rank}, energy={self.energy:.3f}, {', '.join(sides)}{block})"


def project_each_(pairs: Iterable[tuple[Tensor, LayerSubspace]]) -> None:
    """Project every matrix in place onto the free space of its layer, in one grouped call a device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype, bool], list[tuple[Tensor, LayerSubspace]]] = {}
    for matrix, layer in pairs:
        groups.setdefault((matrix.device, matrix.dtype, layer.block), []).append((matrix, layer))
    for (_, _, block), group in groups.items():
        layers = [layer for _, layer in group]
        foreach_project_(
            [matrix for matrix, _ in group],
            [layer.left for layer in layers],
            [layer.right for layer in layers],
            keep_lefts=[] if block else [layer.keep_left for layer in layers],
            keep_rights=[] if block else [layer.keep_right for layer in layers],
            block=block,
        )

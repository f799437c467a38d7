"""Adam's moments in the coordinates of another free space."""

from __future__ import annotations

import torch
from torch import Tensor

from ..basis import Basis
from ..layer import LayerSubspace

__all__ = ["rebase_first", "rebase_second"]


def rebase_first(moment: Tensor, old: LayerSubspace | None, new: LayerSubspace | None) -> Tensor:
    """The mean gradient `moment` in the coordinates of `new`: what lies outside is dropped. None stands for the
    coordinates of the matrix itself."""
    full = moment.to(torch.promote_types(moment.dtype, torch.float32))
    full = full if old is None else old.from_coordinates(full)
    return (full if new is None else new.to_coordinates(full)).to(moment.dtype)


def rebase_second(moment: Tensor, old: LayerSubspace | None, new: LayerSubspace | None) -> Tensor:
    """The mean squares `moment` in the coordinates of `new`.

    Coordinates change as c' = A c Bᵀ. Uncorrelated ones of mean squares v then have (A ∘ A) v (B ∘ B)ᵀ. A direction
    that `old` did not hold brings no square: for its share, one minus the sum of its row, it takes the mean of v. With
    zero in its place its first steps would be larger than those of the others without bound.
    """
    v = moment.double()
    left = _change(None if old is None else old.left_basis, None if new is None else new.left_basis, v)
    right = _change(None if old is None else old.right_basis, None if new is None else new.right_basis, v)
    out, known = v, v.new_ones(1, 1)
    if left is not None:
        out, known = left @ out, left.sum(1, keepdim=True)
    if right is not None:
        out, known = out @ right.mT, known * right.sum(1)
    mean = v.mean() if v.numel() else v.new_zeros(())
    return (out + (1.0 - known).clamp_(min=0.0) * mean).to(moment.dtype)


def _change(old: Basis | None, new: Basis | None, like: Tensor) -> Tensor | None:
    """A ∘ A of one side in float64, (free of new, free of old); None if nothing changes."""
    if old is new:
        return None
    start = None if old is None else old.free_columns().to(like)
    end = None if new is None else new.free_columns().to(like)
    if start is None:
        assert end is not None
        return end.mT.square()
    return start.square() if end is None else (end.mT @ start).square()

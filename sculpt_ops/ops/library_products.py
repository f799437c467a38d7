"""The projections in library products: the path of a GPU where arithmetic is the limit, and of what no kernel takes.

A kept side goes first, so that the other one is applied to its thin factor and not to the matrix. Two sides that are
removed go together (:func:`stacked_into`) where that is calculated to be faster.

Tested on the CPU too, where the formulas are the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .heuristics import left_first, stacked
from .split_products import can_split, project_split

__all__ = ["Room", "project_cublas", "room_for", "stacked_into"]


def _subtract(source: Tensor, thin: Tensor, wide: Tensor, out: Tensor) -> None:
    """out = source - thin wide; one read and one write of a matrix."""
    if out.dim() == 2:
        torch.addmm(source, thin, wide, alpha=-1, out=out)
    else:
        torch.sub(source, thin @ wide, out=out)


class Room(NamedTuple):
    """The stacked factors [L, X] and [Y; Rᵀ] and views of their parts."""

    tall: Tensor
    left: Tensor
    of_right: Tensor
    flat: Tensor
    of_left: Tensor
    right: Tensor


def room_for(grad: Tensor, r: int, s: int) -> Room:
    m, n = grad.shape
    tall, flat = grad.new_empty(m, r + s), grad.new_empty(r + s, n)
    return Room(tall, tall[:, :r], tall[:, r:], flat, flat[:r], flat[r:])


def stacked_into(grad: Tensor, left: Tensor, right: Tensor, out: Tensor, room: Room | None = None) -> None:
    """Both sides removed from one (m, n) matrix: G - [L, B - L (Lᵀ B)] [Lᵀ G; Rᵀ] with B = G R.

    Reads G for each thin product, the second time from L2 as far as G fits (the 33 MB of a 4096 x 4096 in bf16 do in an
    H100's 50 MB), and reads and writes it once: 4 m n elements instead of the 6 m n of one side after the other, for
    4 min(m, n) r s operations more. room: `room_for` a matrix and ranks like these, for more than one; else made.
    """
    m, n = grad.shape
    room = room or room_for(grad, left.shape[-1], right.shape[-1])
    left_t, right_t = left.mT, right.mT
    torch.mm(left_t, grad, out=room.of_left)
    torch.mm(grad, right, out=room.of_right)
    # One of the thin factors is cleared of what both contain: the shorter one.
    if m <= n:
        _subtract(room.of_right, left, left_t @ room.of_right, room.of_right)
    else:
        _subtract(room.of_left, room.of_left @ right, right_t, room.of_left)
    room.left.copy_(left)
    room.right.copy_(right_t)
    _subtract(grad, room.tall, room.flat, out)


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
    rooms: dict[Any, Room] | None = None,
) -> None:
    """Write the projection of grad into out, which may be grad itself.

    A bfloat16 matrix with float32 bases goes through bfloat16 parts of them, another half-precision one through a
    float32 copy. rooms: those of other matrices of the same call; filled.
    """
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
    if left is not None and right is not None and grad.dim() == left.dim() == right.dim() == 2:
        m, n = grad.shape
        if stacked(m, n, left.shape[-1], right.shape[-1], grad.dtype):
            r, s = left.shape[-1], right.shape[-1]
            key = (m, n, r, s, grad.dtype, grad.device)
            room = None if rooms is None else rooms.get(key)
            if room is None:
                room = room_for(grad, r, s)
                if rooms is not None:
                    rooms[key] = room
            stacked_into(grad, left, right, out, room)
            return
    source = grad
    if left is not None:
        _subtract(source, left, left.mT @ source, out)
        source = out
    if right is not None:
        _subtract(source, source @ right, right.mT, out)

"""Shards of one dimension become shards of another, by an all-to-all: each rank sends what it does not keep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Shard

from .agreement import Ranks
from .op_collectives import all_to_all
from .op_layout import local_of, moved, sharded_dim, wrap

__all__ = ["chunk", "redistribute", "swap", "whole"]


def chunk(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """Start and length of what `Shard` gives to `rank`."""
    share = -(-size // ranks)
    start = min(share * rank, size)
    return start, min(share, size - start)


def swap(
    op: str, ranks: Ranks, tensors: Sequence[Tensor], sizes: Sequence[int], joined: int, split: int
) -> list[Tensor]:
    """Every tensor, this rank's chunk of a dimension `joined` of `sizes`, becomes all of that dimension and a chunk of
    the dimension `split`. One collective for tensors of one dtype; dimensions count from the end."""
    size = ranks.size
    pieces = [[t.narrow(split, *chunk(t.shape[split], rank, size)) for t in tensors] for rank in range(size)]
    lengths_of = [[chunk(length, rank, size)[1] for length in sizes] for rank in range(size)]
    shapes = [
        [_resized(own, joined, length) for own, length in zip(pieces[ranks.rank], lengths, strict=True)]
        for lengths in lengths_of
    ]
    flat = [torch.cat([piece.reshape(-1) for piece in group]) for group in pieces]
    received = all_to_all(op, ranks.group, flat, [sum(shape.numel() for shape in group) for group in shapes])
    parts = [
        [part.view(shape) for part, shape in zip(buffer.split([s.numel() for s in group]), group, strict=True)]
        for buffer, group in zip(received, shapes, strict=True)
    ]
    return [torch.cat(each, dim=joined) for each in zip(*parts, strict=True)]


def redistribute(op: str, tensor: DTensor, placements: Sequence[Placement]) -> DTensor:
    """`tensor` with other placements. From Shard to Shard torch gathers the whole tensor where the backend has no
    all-to-all of lists (gloo)."""
    changed = [i for i, (a, b) in enumerate(zip(tensor.placements, placements, strict=True)) if a != b]
    if not changed:
        return tensor
    mesh, i = tensor.device_mesh, changed[0]
    before, after = sharded_dim(tensor.placements[i]), sharded_dim(placements[i])
    # Both dimensions cut by this mesh dimension last: then a rank's part is a chunk of what the others leave it.
    others = [j for j, p in enumerate(tensor.placements) if j != i and sharded_dim(p) in (before, after)]
    plain = type(tensor.placements[i]) is type(placements[i]) is Shard and all(j < i for j in others)
    if len(changed) > 1 or not plain or before is None or after is None or mesh.get_coordinate() is None:
        return tensor.redistribute(placements=placements)
    size = tensor.shape[before]
    for j in others:
        if sharded_dim(tensor.placements[j]) == before:
            size = chunk(size, mesh.get_local_rank(j), mesh.size(j))[1]
    ranks = Ranks.of(mesh.get_group(i))
    (local,) = swap(op, ranks, [local_of(tensor)], [size], before - tensor.ndim, after - tensor.ndim)
    return wrap(local, mesh, placements, tensor.shape)


def whole(op: str, tensor: DTensor, dim: int, other: int) -> DTensor:
    """`tensor` with `dim` (negative) whole on every rank; shards of it become shards of `other`."""
    dim, other = dim + tensor.ndim, other + tensor.ndim
    return redistribute(op, tensor, [moved(p, other) if sharded_dim(p) == dim else p for p in tensor.placements])


def _resized(tensor: Tensor, dim: int, size: int) -> torch.Size:
    shape = list(tensor.shape)
    shape[dim] = size
    return torch.Size(shape)

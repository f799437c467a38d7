"""Matrices on their way between the shards on every rank and the one rank that has them whole.

Every matrix has an owner. A round trip of all matrices takes each rank's shards to the owners and what these make of
them back: m n / size numbers a rank and way, and two collectives a bucket, however many matrices there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .agreement import Ranks, collective
from .sharding import Sharding

__all__ = ["Place", "assign_owners", "broadcast", "gather", "round_trip", "scatter"]

# While one bucket is worked on the next one is on its way. More of them take less memory, fewer take fewer collectives.
BUCKETS = 4


@dataclass(frozen=True)
class Place:
    """Of a matrix: its shape, how it is split, and the rank of the group that owns it."""

    shape: tuple[int, int]
    sharding: Sharding
    owner: int

    def shard_shape(self, rank: int) -> tuple[int, int]:
        length = self.sharding.extent(self.shape[self.sharding.dim], rank)[1]
        return (length, self.shape[1]) if self.sharding.dim == 0 else (self.shape[0], length)

    def part(self, whole: Tensor, rank: int) -> Tensor:
        """The part of `whole` that is the shard of `rank`; a view."""
        return whole.narrow(self.sharding.dim, *self.sharding.extent(self.shape[self.sharding.dim], rank))


def assign_owners(shapes: Sequence[tuple[int, int]], size: int) -> list[int]:
    """An owner for every matrix, so that the ranks have about the same work: the costliest first, each to the rank with
    the least so far. Decomposing and projecting both cost about m n min(m, n)."""
    costs = [m * n * min(m, n) for m, n in shapes]
    load = [0] * size
    owners = [0] * len(shapes)
    for index in sorted(range(len(shapes)), key=lambda index: -costs[index]):
        owners[index] = min(range(size), key=load.__getitem__)
        load[owners[index]] += costs[index]
    return owners


class _Transfer:
    """One all-to-all of flat parts: `parts[rank]` of this rank go to `rank`, `sizes[rank]` numbers come from it."""

    def __init__(
        self, what: str, parts: Sequence[Sequence[Tensor]], sizes: Sequence[int], like: Tensor, ranks: Ranks
    ) -> None:
        sent = [part.reshape(-1) for group in parts for part in group]
        buffer = torch.cat(sent) if sent else like.new_empty(0)
        self._what = what
        self._sizes = list(sizes)
        self._received = like.new_empty(sum(sizes))
        with collective(what):
            self._work = dist.all_to_all_single(
                self._received,
                buffer,
                self._sizes,
                [sum(part.numel() for part in group) for group in parts],
                group=ranks.group,
                async_op=True,
            )

    def wait(self) -> list[Tensor]:
        """What came, by the rank it came from."""
        with collective(self._what):
            self._work.wait()
        return list(self._received.split(self._sizes))


def gather(
    what: str, shards: Sequence[Tensor], places: Sequence[Place], ranks: Ranks
) -> Callable[[], dict[int, Tensor]]:
    """Send every shard to its owner. The function returned waits, and gives the whole matrices that this rank owns, by
    their index."""
    transfers = []
    for chosen in _by_dtype([shard.dtype for shard in shards]):
        own = [i for i in chosen if places[i].owner == ranks.rank]
        parts = [[shards[i] for i in chosen if places[i].owner == rank] for rank in range(ranks.size)]
        sizes = [sum(math.prod(places[i].shard_shape(rank)) for i in own) for rank in range(ranks.size)]
        transfers.append((own, _Transfer(what, parts, sizes, shards[chosen[0]], ranks)))

    def wait() -> dict[int, Tensor]:
        wholes: dict[int, Tensor] = {}
        for own, transfer in transfers:
            received = transfer.wait()
            for i in own:
                wholes[i] = received[0].new_empty(places[i].shape)
            for rank, flat in enumerate(received):
                shapes = [places[i].shard_shape(rank) for i in own]
                for i, shape, part in zip(own, shapes, flat.split([math.prod(s) for s in shapes]), strict=True):
                    places[i].part(wholes[i], rank).copy_(part.view(shape))
        return wholes

    return wait


def scatter(
    what: str, wholes: Mapping[int, Tensor], places: Sequence[Place], likes: Sequence[Tensor], ranks: Ranks
) -> Callable[[], list[Tensor]]:
    """Send every rank its parts of the matrices that this rank owns: `wholes`, by their index in `places`, with the
    dtype and device of their entry in `likes`. The function returned waits, and gives this rank's shards of all."""
    transfers = []
    for chosen in _by_dtype([like.dtype for like in likes]):
        own = [i for i in chosen if places[i].owner == ranks.rank]
        parts = [[places[i].part(wholes[i], rank) for i in own] for rank in range(ranks.size)]
        coming = [[i for i in chosen if places[i].owner == rank] for rank in range(ranks.size)]
        sizes = [sum(math.prod(places[i].shard_shape(ranks.rank)) for i in group) for group in coming]
        transfers.append((coming, _Transfer(what, parts, sizes, likes[chosen[0]], ranks)))

    def wait() -> list[Tensor]:
        shards: dict[int, Tensor] = {}
        for coming, transfer in transfers:
            for group, flat in zip(coming, transfer.wait(), strict=True):
                shapes = [places[i].shard_shape(ranks.rank) for i in group]
                for i, shape, part in zip(group, shapes, flat.split([math.prod(s) for s in shapes]), strict=True):
                    shards[i] = part.view(shape)
        return [shards[i] for i in range(len(places))]

    return wait


def round_trip(
    what: str,
    rows: Sequence[Sequence[Tensor]],
    places: Sequence[Place],
    likes: Sequence[Tensor],
    work: Callable[[list[int], list[list[Tensor]]], list[Tensor]],
) -> Iterator[tuple[int, Tensor]]:
    """Take matrices to their owners, let these work on them, and give every rank its part of each result.

    rows: of every matrix the shards of all that its owner needs (gradient, weight), each of the matrix's shape.
    likes: dtype and device of the results.
    work: called with the indices of matrices that this rank owns and the whole of what is in their `rows`; returns the
        results. Called once a bucket, also on a rank that owns nothing in it.

    Yields index and shard of every result, a bucket at a time.
    """
    if not places:
        return
    ranks = places[0].sharding.ranks
    buckets = _buckets(places, ranks.size)

    def send(bucket: list[int]) -> Callable[[], dict[int, Tensor]]:
        shards = [shard for i in bucket for shard in rows[i]]
        return gather(what, shards, [places[i] for i in bucket for _ in rows[i]], ranks)

    arriving = send(buckets[0])
    returning: tuple[list[int], Callable[[], list[Tensor]]] | None = None
    for number, bucket in enumerate(buckets):
        wholes = iter(sorted(arriving().items()))
        if number + 1 < len(buckets):
            arriving = send(buckets[number + 1])
        own = [i for i in bucket if places[i].owner == ranks.rank]
        results = work(own, [[next(wholes)[1] for _ in rows[i]] for i in own])
        found = dict(zip([k for k, i in enumerate(bucket) if i in set(own)], results, strict=True))
        leaving = scatter(what, found, [places[i] for i in bucket], [likes[i] for i in bucket], ranks)
        if returning is not None:
            yield from zip(returning[0], returning[1](), strict=True)
        returning = bucket, leaving
    assert returning is not None
    yield from zip(returning[0], returning[1](), strict=True)


def broadcast(
    what: str, tensors: Sequence[Tensor], owners: Sequence[int], ranks: Ranks, device: torch.device
) -> list[Tensor]:
    """Every tensor whole on every rank. On ranks that are not its owner an entry of `tensors` gives shape and dtype
    only, and may be on the meta device. One broadcast an owner and dtype."""
    out = list(tensors)
    for owner in range(ranks.size):
        for chosen in _by_dtype([tensor.dtype for tensor in tensors]):
            chosen = [i for i in chosen if owners[i] == owner]
            sizes = [tensors[i].numel() for i in chosen]
            if not sum(sizes):
                continue
            dtype = tensors[chosen[0]].dtype
            flat = torch.empty(sum(sizes), dtype=dtype, device=device)
            if owner == ranks.rank:
                torch.cat([tensors[i].reshape(-1) for i in chosen], out=flat)
            with collective(what):
                dist.broadcast(flat, group=ranks.group, group_src=owner)
            if owner != ranks.rank:
                for i, part in zip(chosen, flat.split(sizes), strict=True):
                    out[i] = part.view(tensors[i].shape)
    return out


def _by_dtype(dtypes: Sequence[torch.dtype]) -> list[list[int]]:
    groups: dict[torch.dtype, list[int]] = {}
    for index, dtype in enumerate(dtypes):
        groups.setdefault(dtype, []).append(index)
    return list(groups.values())


def _buckets(places: Sequence[Place], size: int) -> list[list[int]]:
    """Indices in at most `BUCKETS` parts. Of every owner's matrices each has about the same share, so that all owners
    have something to do in each."""
    buckets: list[list[int]] = [[] for _ in range(BUCKETS)]
    for rank in range(size):
        own = [i for i, place in enumerate(places) if place.owner == rank]
        total, before = sum(math.prod(places[i].shape) for i in own), 0
        for i in own:
            buckets[min(BUCKETS * before // max(total, 1), BUCKETS - 1)].append(i)
            before += math.prod(places[i].shape)
    return [sorted(bucket) for bucket in buckets if bucket]

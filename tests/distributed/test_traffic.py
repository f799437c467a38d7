"""Bytes counted against numbers worked out by hand."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sculpt_ops.distributed.traffic import Collective, Traffic, all_gather_bytes, all_reduce_bytes

from .ranks import Ranks

N = 240  # bytes of a buffer of 60 float32 numbers, divisible by 2 and 4


def plain_collectives() -> list[Collective]:
    rank, size = dist.get_rank(), dist.get_world_size()
    whole, part = torch.ones(60), torch.ones(60 // size)
    parts = list(whole.clone().chunk(size))
    with Traffic() as traffic:
        dist.all_reduce(whole)
        dist.all_reduce(whole.bfloat16(), async_op=True).wait()
        dist.all_gather_into_tensor(whole, part)
        dist.all_gather(parts, part)
        dist.reduce_scatter_tensor(part, whole)
        dist.all_to_all_single(torch.empty_like(whole), whole)
        # Rank r sends r + 1 numbers to each rank.
        sent = torch.ones((rank + 1) * size)
        received = torch.empty(sum(range(size + 1)))
        splits = [other + 1 for other in range(size)], [rank + 1] * size
        dist.all_to_all_single(received, sent, *splits, async_op=True).wait()
        dist.broadcast(whole, 1)
        dist.reduce(whole, 1)
        dist.gather(part, parts if rank == 1 else None, 1)
        dist.scatter(part, parts if rank == 1 else None, 1)
        dist.barrier()
    assert dist.get_world_size() == size
    whole + 1  # outside of the block, and no collective
    return traffic.collectives


def test_plain_collectives_send_what_their_algorithms_do(ranks: Ranks) -> None:
    p = ranks.size
    for rank, counted in enumerate(ranks.run(plain_collectives)):
        wanted = [
            ("all_reduce", 2 * (p - 1) * N // p),
            ("all_reduce", (p - 1) * N // p),
            ("all_gather", (p - 1) * N // p),
            ("all_gather", (p - 1) * N // p),
            ("reduce_scatter", (p - 1) * N // p),
            ("all_to_all", (p - 1) * N // p),
            ("all_to_all", 4 * (p - 1) * (rank + 1)),
            ("broadcast", 0 if rank == 0 else N),
            ("reduce", 0 if rank == 1 else N),
            ("gather", 0 if rank == 1 else N // p),
            ("scatter", (p - 1) * N // p if rank == 1 else 0),
            ("barrier", 0),
        ]
        assert counted == [(*pair, p) for pair in wanted]


def in_a_pair() -> tuple[Traffic | None, int]:
    """Functional collectives in a group of two out of four ranks, and object collectives in all."""
    import torch.distributed._functional_collectives as functional

    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = pairs[dist.get_rank() // 2]
    data = torch.ones(60)
    with Traffic() as outer:
        with Traffic() as inner:
            functional.all_reduce(data, "sum", pair).sum().item()
            functional.all_gather_tensor(data, 0, pair).sum().item()
        dist.all_gather_object([None] * 4, "x" * 1000)
    return inner.collectives, [outer.of("all_reduce"), outer.of("all_gather")]


def test_functional_and_object_collectives_are_seen_by_nested_blocks(four_ranks: Ranks) -> None:
    for inner, (reduced, gathered) in four_ranks.run(in_a_pair):
        # Of two ranks each sends all of the buffer in an all-reduce, and its own half of what is gathered.
        assert inner == [("all_reduce", N, 2), ("all_gather", N, 2)]
        assert reduced == inner[:1]
        assert gathered[0] == inner[1]
        # The sizes of the objects, then the objects, pickled.
        sizes, objects = gathered[1:]
        assert sizes == ("all_gather", 3 * 8, 4)
        assert objects.size == 4
        assert 3 * 1000 < objects.bytes < 3 * 1100


def dtensor_redistributed() -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    matrix = distribute_tensor(torch.ones(12, 20), mesh, [Shard(0)])
    found = {}
    with Traffic() as traffic:
        matrix.redistribute(mesh, [Replicate()]).to_local().sum().item()
    found["whole"] = traffic.collectives
    with Traffic() as traffic:
        product = matrix.mT @ matrix
        assert product.placements == (Partial("sum"),)
        product.redistribute(mesh, [Replicate()]).to_local().sum().item()
    found["gram"] = traffic.collectives
    return found


def test_collectives_of_dtensors_are_counted_once(ranks: Ranks) -> None:
    p = ranks.size
    for found in ranks.run(dtensor_redistributed):
        assert found["whole"] == [("all_gather", all_gather_bytes(12 * 20 * 4, p), p)]
        assert found["gram"] == [("all_reduce", all_reduce_bytes(20 * 20 * 4, p), p)]


def fsdp_pass() -> tuple[list[Collective], list[Collective]]:
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 8))
    for module in model:
        fully_shard(module)
    fully_shard(model)
    with Traffic() as traffic:
        loss = model(torch.ones(2, 12)).sum()
    with Traffic() as backward:
        loss.backward()
    return traffic.collectives, backward.collectives


def test_hooks_of_fsdp_are_seen_in_both_passes(ranks: Ranks) -> None:
    p = ranks.size

    def padded(*shapes: tuple[int, ...]) -> int:
        """Bytes of a group of parameters: each has ceil(rows / p) rows on every rank."""
        return sum(4 * p * math.ceil(shape[0] / p) * math.prod(shape[1:]) for shape in shapes)

    groups = [padded((20, 12), (20,)), padded((8, 20), (8,))]
    for forward, backward in ranks.run(fsdp_pass):
        gathered = [("all_gather", all_gather_bytes(nbytes, p), p) for nbytes in groups]
        reduced = [("reduce_scatter", all_gather_bytes(nbytes, p), p) for nbytes in groups]
        assert forward == gathered
        assert sorted(backward) == sorted(gathered + reduced)


def test_bytes_that_cannot_be_divided_are_rounded_up() -> None:
    assert all_reduce_bytes(10, 4) == 15
    assert all_reduce_bytes(9, 4) == 14
    assert all_gather_bytes(9, 4) == 7
    assert all_reduce_bytes(10, 1) == 0


def test_nothing_is_counted_without_a_collective() -> None:
    with Traffic() as traffic:
        torch.ones(3) + 1
    assert traffic.bytes == 0
    assert traffic.collectives == []
    with pytest.raises(ValueError, match="in the block"), Traffic():
        raise ValueError("in the block")

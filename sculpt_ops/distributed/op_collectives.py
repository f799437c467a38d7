"""The collectives of the ops, of many tensors in few calls; functional ones under torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..buckets import in_buckets
from .agreement import collective

__all__ = ["BUCKET_BYTES", "agreed", "all_to_all", "buckets", "reduced", "start_sums"]

# What is sent at once. Two buckets exist at a time; up to this size one collective serves all matrices of a call.
BUCKET_BYTES = 64 * 2**20
_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}

Item = TypeVar("Item")


def buckets(
    items: Sequence[Item], key: Callable[[Item], Hashable], nbytes: Callable[[Item], int]
) -> Iterator[list[Item]]:
    """`items` of equal `key` together, in parts of at most `BUCKET_BYTES` (a larger one alone), the same on all ranks
    if `key` and `nbytes` are."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    for group in groups.values():
        yield from in_buckets(group, nbytes, BUCKET_BYTES)


def start_sums(op: str, mesh: DeviceMesh, dims: Sequence[int], parts: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Begin to sum each of `parts`, of one dtype, over the mesh dimensions `dims`, in one buffer. The function returned
    waits, and gives the sums."""
    flat = parts[0].reshape(-1) if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])
    total = reduced(op, mesh, dims[:-1], flat)
    wait = _start_reduce(op, mesh.get_group(dims[-1]), total, "sum")

    def split() -> list[Tensor]:
        sums = wait().split([part.numel() for part in parts])
        return [each.view(part.shape) for each, part in zip(sums, parts, strict=True)]

    return split


def reduced(op: str, mesh: DeviceMesh, dims: Sequence[int], tensor: Tensor, *, largest: bool = False) -> Tensor:
    """The sum (or the largest) of `tensor` over the mesh dimensions `dims`; written to where it is contiguous."""
    for dim in dims:
        tensor = _start_reduce(op, mesh.get_group(dim), tensor.contiguous(), "max" if largest else "sum")()
    return tensor


def agreed(op: str, mesh: DeviceMesh, *tensors: Tensor) -> list[Tensor]:
    """What the first rank of the mesh has, on all: decompositions of equal bits may differ between machines, in signs
    even, and between numbers of threads. One broadcast for tensors of one dtype."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    for dim in range(mesh.ndim):
        group = mesh.get_group(dim)
        if torch.compiler.is_compiling():
            flat = functional.broadcast(flat, 0, group)
            continue
        with collective(op):
            dist.broadcast(flat, group=group, group_src=0)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def all_to_all(op: str, group: Any, pieces: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Send `pieces[rank]`, flat, to each rank; returns the `counts[rank]` numbers that come from each."""
    sent, sizes = torch.cat(list(pieces)), [piece.numel() for piece in pieces]
    if torch.compiler.is_compiling():
        received = functional.all_to_all_single(sent, list(counts), sizes, group)
    else:
        received = sent.new_empty(sum(counts))
        with collective(op):
            dist.all_to_all_single(received, sent, list(counts), sizes, group=group)
    return list(received.split(list(counts)))


def _start_reduce(op: str, group: Any, tensor: Tensor, how: str) -> Callable[[], Tensor]:
    if not tensor.numel():  # on all of its ranks
        return lambda: tensor
    if torch.compiler.is_compiling():  # what is issued in place while tracing runs then, not in the graph
        summed = functional.all_reduce(tensor, how, group)
        return lambda: functional.wait_tensor(summed)
    with collective(op):
        work: Any = dist.all_reduce(tensor, _REDUCTIONS[how], group=group, async_op=True)

    def wait() -> Tensor:
        with collective(op):
            work.wait()
        return tensor

    return wait

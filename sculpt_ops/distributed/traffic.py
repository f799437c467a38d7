"""What collectives send: counted while they run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group as resolve  # type: ignore[attr-defined]
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Collective", "Traffic", "all_gather_bytes", "all_reduce_bytes", "reduce_scatter_bytes"]


def all_reduce_bytes(nbytes: int, size: int) -> int:
    """What each of `size` ranks sends to sum a buffer of `nbytes` in a ring: 2 (size - 1) / size of it."""
    return math.ceil(2 * (size - 1) * nbytes / size)


def all_gather_bytes(nbytes: int, size: int) -> int:
    """What each of `size` ranks sends until all have a result of `nbytes`, in a ring: (size - 1) / size of it."""
    return math.ceil((size - 1) * nbytes / size)


def reduce_scatter_bytes(nbytes: int, size: int) -> int:
    """What each of `size` ranks sends of an input of `nbytes` until it has the sum of its own part, in a ring."""
    return all_gather_bytes(nbytes, size)


class Collective(NamedTuple):
    """op: "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "reduce", "gather", "scatter",
    "send", "recv" or "barrier". bytes: that this rank sends. size: of the group."""

    op: str
    bytes: int
    size: int


class Traffic(TorchDispatchMode):
    """Counts, on this rank, the collectives issued inside of a `with` block and the bytes that they send.

        with Traffic() as traffic:
            optimizer.step()
        traffic.bytes, len(traffic.collectives), traffic.of("all_to_all")

    Seen are those of `torch.distributed` (asynchronous ones, coalesced ones and the `*_object_*` functions included),
    of functional collectives and so of DTensors, and of FSDP2's hooks in forward and backward pass; not what a compiled
    graph issues, nor barriers through the store. Blocks may be nested, each then counts for itself.

    bytes: sent by this rank, had the collectives run by the usual algorithms, whatever the backend does. With N bytes
    in a group of p ranks: ring all-reduce 2 (p - 1) / p N; all-gather (p - 1) / p of the result; reduce-scatter
    (p - 1) / p of the input; all-to-all what does not stay; broadcast N on all but the last rank of a chain, reduce N
    on all but the root, gather N on all but the root, scatter what the root does not keep; send N.
    collectives: of each its operation, bytes and group size, in the order of their calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []

    @property
    def bytes(self) -> int:
        return sum(collective.bytes for collective in self.collectives)

    def of(self, *ops: str) -> list[Collective]:
        """Those of `collectives` that are one of `ops`."""
        return [collective for collective in self.collectives if collective.op in ops]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # DTensor first makes its own collectives of the op, which come here in their turn. It tries the op on fake
        # tensors as well, which are let through.
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if (name := func._schema.name) in _COUNTED:
            given = _named_arguments(func, args, kwargs or {})
            op, sent = _COUNTED[name]
            group = _group(given)
            self.collectives.append(Collective(op, sent(given, group), group.size()))
        return func(*args, **(kwargs or {}))


_Given = dict[str, Any]


def _named_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Given:
    names = [argument.name for argument in func._schema.arguments]
    return dict(zip(names, args, strict=False)) | kwargs


def _group(given: _Given) -> dist.ProcessGroup:
    if "process_group" in given:
        return dist.ProcessGroup.unbox(given["process_group"])
    named: Any = given["group_name"]
    return cast(dist.ProcessGroup, resolve(named) if isinstance(named, str) else named)  # type: ignore[arg-type]


def _nbytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.nbytes
    return sum(map(_nbytes, tensors))


def _input_bytes(given: _Given) -> int:
    names = ("input", "inputs", "tensor", "tensors", "input_tensor", "input_tensors", "input_list")
    return _nbytes(next(given[name] for name in names if name in given))


def _all_reduce(given: _Given, group: dist.ProcessGroup) -> int:
    return all_reduce_bytes(_input_bytes(given), group.size())


def _all_gather(given: _Given, group: dist.ProcessGroup) -> int:
    # Parts may differ in size; where no result is given they do not.
    names = ("output_tensor", "output_tensors", "output_lists", "outputs", "out")
    results = [_nbytes(given[name]) for name in names if name in given]
    return all_gather_bytes(results[0] if results else group.size() * _input_bytes(given), group.size())


def _reduce_scatter(given: _Given, group: dist.ProcessGroup) -> int:
    return reduce_scatter_bytes(_input_bytes(given), group.size())


def _all_to_all(given: _Given, group: dist.ProcessGroup) -> int:
    if "input_tensors" in given:
        return sum(_nbytes(part) for rank, part in enumerate(given["input_tensors"]) if rank != group.rank())
    sent = _input_bytes(given)
    splits: Sequence[int] = given.get("input_split_sizes") or ()
    if splits:
        return sent - sent // max(1, sum(splits)) * splits[group.rank()]
    return sent - sent // group.size()


def _broadcast(given: _Given, group: dist.ProcessGroup) -> int:
    root = given["root_rank"] if "root_rank" in given else dist.get_group_rank(group, given["src"])
    return 0 if (group.rank() + 1) % group.size() == root else _input_bytes(given)


def _unless_root(given: _Given, group: dist.ProcessGroup) -> int:
    return 0 if group.rank() == given["root_rank"] else _input_bytes(given)


def _scatter(given: _Given, group: dist.ProcessGroup) -> int:
    return all_gather_bytes(_nbytes(given["input_tensors"]), group.size()) if group.rank() == given["root_rank"] else 0


def _send(given: _Given, group: dist.ProcessGroup) -> int:
    return _input_bytes(given)


def _nothing(given: _Given, group: dist.ProcessGroup) -> int:
    return 0


_COUNTED: dict[str, tuple[str, Callable[[_Given, dist.ProcessGroup], int]]] = {
    **dict.fromkeys(
        (
            "c10d::allreduce_",
            "c10d::allreduce_coalesced_",
            "_c10d_functional::all_reduce",
            "_c10d_functional::all_reduce_",
            "_c10d_functional::all_reduce_coalesced",
            "_c10d_functional::all_reduce_coalesced_",
        ),
        ("all_reduce", _all_reduce),
    ),
    **dict.fromkeys(
        (
            "c10d::allgather_",
            "c10d::allgather_coalesced_",
            "c10d::_allgather_base_",
            "c10d::allgather_into_tensor_coalesced_",
            "_c10d_functional::all_gather_into_tensor",
            "_c10d_functional::all_gather_into_tensor_out",
            "_c10d_functional::all_gather_into_tensor_coalesced",
        ),
        ("all_gather", _all_gather),
    ),
    **dict.fromkeys(
        (
            "c10d::reduce_scatter_",
            "c10d::_reduce_scatter_base_",
            "c10d::reduce_scatter_tensor_coalesced_",
            "_c10d_functional::reduce_scatter_tensor",
            "_c10d_functional::reduce_scatter_tensor_out",
            "_c10d_functional::reduce_scatter_tensor_coalesced",
        ),
        ("reduce_scatter", _reduce_scatter),
    ),
    **dict.fromkeys(
        (
            "c10d::alltoall_",
            "c10d::alltoall_base_",
            "_c10d_functional::all_to_all_single",
            "_dtensor::shard_dim_alltoall",
        ),
        ("all_to_all", _all_to_all),
    ),
    **dict.fromkeys(
        ("c10d::broadcast_", "_c10d_functional::broadcast", "_c10d_functional::broadcast_"),
        ("broadcast", _broadcast),
    ),
    "c10d::reduce_": ("reduce", _unless_root),
    "c10d::gather_": ("gather", _unless_root),
    "c10d::scatter_": ("scatter", _scatter),
    **dict.fromkeys(("c10d::send", "_c10d_functional::isend"), ("send", _send)),
    **dict.fromkeys(("c10d::recv_", "c10d::recv_any_source_", "_c10d_functional::irecv"), ("recv", _nothing)),
    "c10d::barrier": ("barrier", _nothing),
}

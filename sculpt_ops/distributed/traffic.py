"""What collectives send: counted while they run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
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
        # A subclass (DTensor) first makes its own collectives of the op, which come here in their turn.
        if types:
            return NotImplemented
        namespace, _, name = func._schema.name.partition("::")
        if namespace in _NAMESPACES and name in _COUNTED:
            given = _named_arguments(func, args, kwargs or {})
            op, sent = _COUNTED[name]
            group = _group(given)
            self.collectives.append(Collective(op, sent(given, group), group.size()))
        return func(*args, **(kwargs or {}))


_NAMESPACES = ("c10d", "_c10d_functional", "_dtensor")
_Given = dict[str, Any]


def _named_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Given:
    names = [argument.name for argument in func._schema.arguments]
    return dict(zip(names, args, strict=False)) | kwargs


def _group(given: _Given) -> dist.ProcessGroup:
    boxed = given.get("process_group")
    if boxed is not None:
        return dist.ProcessGroup.unbox(boxed)
    named = given["group_name"]
    return dist.distributed_c10d._resolve_process_group(named) if isinstance(named, str) else named


def _nbytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_nbytes, tensors))


def _inputs(given: _Given) -> Any:
    return next(given[name] for name in ("input", "inputs", "input_tensor", "input_tensors", "tensors") if name in given)

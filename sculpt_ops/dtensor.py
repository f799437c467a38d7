"""Telling a DTensor without importing `torch.distributed.tensor`, which takes longer than everything else here."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor

__all__ = ["is_dtensor", "is_fsdp", "local_nbytes", "stored_bytes", "version_of"]


def is_dtensor(tensor: object) -> bool:
    """Whether it is a `torch.distributed.tensor.DTensor`, a parameter of one included."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, Tensor) and isinstance(tensor, module.DTensor)


def is_fsdp(module: object) -> bool:
    """Whether `fully_shard` was called on it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def local_nbytes(tensor: Tensor) -> int:
    """Bytes on this rank."""
    return int(_local(tensor).nbytes)


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes on this rank that `tensors` keep alive: memory that several of them share counts once."""
    storages: dict[int, int] = {}
    for storage in (_local(tensor).untyped_storage() for tensor in tensors if not tensor.is_meta):
        # An empty tensor of a file has the address of the one after it.
        storages[storage.data_ptr()] = max(storage.nbytes(), storages.get(storage.data_ptr(), 0))
    return sum(storages.values())


def version_of(tensor: Tensor) -> int:
    """The count of writes to it. FSDP2 adds gradients to the local part, and a DTensor's own count does not move."""
    return cast(Any, tensor)._local_tensor._version if is_dtensor(tensor) else tensor._version


def _local(tensor: Tensor) -> Tensor:
    return cast(Tensor, cast(Any, tensor).to_local()) if is_dtensor(tensor) else tensor

"""Weights and optimizer state in safetensors shards, one file a rank (torch.distributed.checkpoint): written by any
number of ranks, read by any other."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

__all__ = ["fingerprint", "load_training", "load_weights", "save_training", "save_weights"]


def fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes and values of a model's parameters, tied ones once; of a model on one device."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_weights(folder: Path, model: nn.Module) -> None:
    """Write what `load_weights` reads."""
    _save(folder, _weights(model))


def load_weights(folder: Path, model: nn.Module) -> None:
    """Read what `save_weights` or `save_training` wrote into `model`; ValueError if it is of another one."""
    tensors = _weights(model)
    _check_fit(folder, tensors, _entries(folder))
    _load(folder, tensors)


def save_training(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write weights and optimizer state into safetensors shards, one file a rank."""
    tensors = _weights(model)
    state = optimizer.state_dict()
    for index, name in _names(state).items():
        for key, value in state["state"].get(index, {}).items():
            tensors[f"optimizer.{name}:{key}"] = value
    _save(folder, tensors)


def load_training(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read what `save_training` wrote, on any number of ranks, into a model and an optimizer made as they were then.

    ValueError if it is of another model.
    """
    found = _entries(folder)
    tensors = _weights(model)
    _check_fit(folder, tensors, found)
    state = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state["state"] = {}
    for index, name in _names(state).items():
        prefix = f"optimizer.{name}:"
        room = {
            key.removeprefix(prefix): _room(parameters[index], entry.size, entry.properties.dtype)
            for key, entry in found.items()
            if key.startswith(prefix)
        }
        if room:
            state["state"][index] = room
            tensors |= {prefix + key: value for key, value in room.items()}
    _load(folder, tensors)
    optimizer.load_state_dict(state)


def _save(folder: Path, tensors: dict[str, Tensor]) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        with _one_process():
            save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        # No Exception, and the fault (a full disk, for one) is inside.
        faults = [fault[0] for fault in error.failures.values()]
        raise OSError(f"{folder}: {faults[0] if faults else error}") from error


def _load(folder: Path, tensors: dict[str, Tensor]) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with _one_process():
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))


def _entries(folder: Path) -> dict[str, TensorStorageMetadata]:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    entries = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def _check_fit(folder: Path, tensors: Mapping[str, Tensor], found: Mapping[str, TensorStorageMetadata]) -> None:
    for name, tensor in tensors.items():
        if name not in found or found[name].size != tensor.shape:
            raise ValueError(f"{folder} does not fit the model: {name.removeprefix('model.')} is missing or differs")


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, tied ones once, and the buffers that a state dict has."""
    kept = model.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {f"model.{name}": value.detach() for name, value in (dict(model.named_parameters()) | buffers).items()}


def _names(state: Mapping[str, Any]) -> dict[int, str]:
    """Parameter names by their index in an optimizer's state dict."""
    return {
        index: name
        for group in state["param_groups"]
        for index, name in zip(group["params"], group["param_names"], strict=True)
    }


def _room(parameter: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Where an optimizer state of `shape` is loaded to: sharded by rows if the parameter is sharded."""
    from torch.distributed.tensor import DTensor, Shard, zeros

    if not isinstance(parameter, DTensor) or not shape:
        return torch.zeros(shape, dtype=dtype, device=parameter.device if shape else "cpu")
    placements = [Shard(0) if placement.is_shard() else placement for placement in parameter.placements]
    return zeros(shape, dtype=dtype, device_mesh=parameter.device_mesh, placements=placements)


@contextmanager
def _one_process() -> Iterator[None]:
    """torch warns on every save and load without a process group that it takes this for a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield

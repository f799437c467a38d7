"""The state of a run on disk, from which a run that was cut short goes on.

    checkpoint/task-2/                what stays the same while the second task is learned
        run.json predictions.jsonl    the results so far
        subspaces.safetensors         the protected subspaces, as they were derived from the weights at its start
        setup.json                    how long that took
        step-0/ step-40/              what changes: weights and optimizer state in safetensors shards, one file a rank
                                      (torch.distributed.checkpoint), scheduler, random numbers, trainer_state.json

A folder gets its name when it is whole. There is no pickle in it that is loaded without weights_only.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..subspaces import Subspaces
from .distributed import World
from .result import PREDICTIONS_FILE, RUN_FILE, RunResult

__all__ = ["Checkpoints", "Saved", "load_training", "save_training"]

FOLDER = "checkpoint"
SUBSPACES_FILE = "subspaces.safetensors"
SETUP_FILE = "setup.json"
# Of the settings, those that a run may go on with in another way; of the batch's parts only the product counts.
FREE = frozenset(
    {"output", "name", "save_every", "leak_every", "resume", "cpu", "eval_batch_size", "parallel", "processes"}
    | {"ddp_timeout", "batch_size", "gradient_accumulation_steps", "rows_per_step"}
)


@dataclass(frozen=True)
class Saved:
    """A state on disk. task: index of the task being learned. step: optimizer steps of it that were taken."""

    folder: Path
    task: int
    step: int

    @property
    def task_folder(self) -> Path:
        return self.folder.parent

    def result(self, output: str) -> RunResult:
        """The run as it was when the task began."""
        return replace(RunResult.load(self.task_folder), output=output)

    def subspaces(self, model: nn.Module) -> tuple[Subspaces | None, float]:
        """Those of the task, bound to `model`, and the seconds they took to derive."""
        path = self.task_folder / SUBSPACES_FILE
        seconds = json.loads((self.task_folder / SETUP_FILE).read_text(encoding="utf-8"))["derive_seconds"]
        return (Subspaces.load(path, model) if path.exists() else None), seconds


class Checkpoints:
    """The states of one run, in `output`/checkpoint. All methods are to be called by every rank."""

    def __init__(self, output: Path, world: World) -> None:
        self.folder = output / FOLDER
        self.world = world

    def latest(self) -> Saved | None:
        """The last state that is whole, None without one."""
        for task, folder in reversed(_numbered(self.folder, "task")):
            for step, state in reversed(_numbered(folder, "step")):
                return Saved(state, task - 1, step)
        return None

    def begin_task(self, index: int, result: RunResult, subspaces: Subspaces | None, seconds: float) -> None:
        """Keep what stays the same while the `index`-th task is learned; `save` must follow, at step 0."""
        folder = self.folder / f"task-{index + 1}.tmp"

        def write() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            replace(result, output=str(folder)).save()
            (folder / SETUP_FILE).write_text(json.dumps({"derive_seconds": seconds}), encoding="utf-8")

        self.world.on_first("starting a checkpoint", write)
        if subspaces is not None:
            subspaces.save(folder / SUBSPACES_FILE)

    def save(self, index: int, step: int, write: Callable[[Path], None]) -> None:
        """Have every rank `write` its part of the `index`-th task's state after `step` steps into one folder; what is
        older is removed once that is whole."""
        name = f"task-{index + 1}"
        task = self.folder / (name if (self.folder / name).exists() else f"{name}.tmp")
        folder = task / f"step-{step}.tmp"

        def prepare() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

        def finish() -> None:
            folder.replace(folder.with_suffix(""))
            task.replace(self.folder / name)
            older = [path for number, path in _numbered(self.folder, "task") if number <= index]
            older += [path for number, path in _numbered(self.folder / name, "step") if number < step]
            for path in older:
                shutil.rmtree(path)

        self.world.on_first("starting a checkpoint", prepare)
        write(folder)
        self.world.share("writing a checkpoint", None)
        self.world.on_first("finishing a checkpoint", finish)

    def remove(self) -> None:
        """At the end of the run, whose results and model are written."""
        self.world.on_first("removing the checkpoint", lambda: shutil.rmtree(self.folder, ignore_errors=True))


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """ValueError unless a run with the settings `now` continues one with the settings `saved`."""
    for name, value in now.items():
        if name not in FREE and json.loads(json.dumps(value)) != saved.get(name):
            raise ValueError(f"resume: the run was started with {name}={saved.get(name)}, this one has {value}")
    if saved.get("rows_per_step") != now.get("rows_per_step"):
        raise ValueError(
            f"resume: the run was started with {saved.get('rows_per_step')} rows an optimizer step, batch_size times "
            f"gradient_accumulation_steps times processes are {now.get('rows_per_step')}"
        )


def leftovers(output: Path) -> list[str]:
    """What lies in the output folder that no unfinished run of ours has put there."""
    ours = {FOLDER, RUN_FILE, PREDICTIONS_FILE, "model", "model.tmp", f"{RUN_FILE}.tmp", f"{PREDICTIONS_FILE}.tmp"}
    return sorted(path.name for path in output.iterdir() if path.name not in ours) if output.is_dir() else []


def save_training(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write weights and optimizer state into safetensors shards, one file a rank."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    tensors = _weights(model)
    state = optimizer.state_dict()
    for index, name in _names(state).items():
        for key, value in state["state"].get(index, {}).items():
            tensors[f"optimizer.{name}:{key}"] = value
    with _one_process():
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def load_training(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read what `save_training` wrote, on any number of ranks, into a model and an optimizer made as they were then.

    ValueError if it is of another model.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    entries = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    found = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    tensors = _weights(model)
    for name, tensor in tensors.items():
        if name not in found or found[name].size != tensor.shape:
            raise ValueError(f"{folder} does not fit the model: {name.removeprefix('model.')} is missing or differs")
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
    with _one_process():
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))
    optimizer.load_state_dict(state)


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


def _numbered(folder: Path, kind: str) -> list[tuple[int, Path]]:
    """The whole entries "kind-number" of `folder` in order."""
    entries = [(path.name.removeprefix(f"{kind}-"), path) for path in folder.glob(f"{kind}-*")]
    return sorted((int(number), path) for number, path in entries if number.isdigit())


@contextmanager
def _one_process() -> Iterator[None]:
    """torch warns on every save and load without a process group that it takes this for a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield

"""The state of a run on disk, from which a run that was cut short goes on.

    state.json                        finished tasks, accuracy rows, hashes of the first weights and of the tasks' rows
    checkpoint/task-2/                what the second task is learned from
        start/                        the run at the end of the first: results, weights/, what the method carries on
        subspaces.safetensors         the protected subspaces as they were derived, before the first step
        setup.json                    how long that took
        step-40/                      within the task: weights and optimizer state in safetensors shards, scheduler,
                                      random numbers, trainer_state.json
    carried/                          of a finished run, what its method would carry into one more task
    carried.next/                     the same of the model that is being written, until that has its name

A folder gets its name when it is whole, with the sizes of its files in manifest.json; the one before goes after that.
model/ and carried/ cannot get theirs at once: both say of which tasks they are, and at any moment there is a model and,
as carried/ or carried.next/, what goes with it.
There is no pickle in it that is loaded without weights_only.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..subspaces import Subspaces
from .distributed import World
from .modeling import load_model, read_about
from .result import GENERATED_FILE, PREDICTIONS_FILE, RUN_FILE, RunResult, resume_command, write_text
from .settings import SETTINGS_FILE
from .shards import load_weights, save_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Checkpoints", "Saved", "check_same_run", "has_states", "leftovers", "read_state", "write_state"]

FOLDER = "checkpoint"
CARRIED, NEXT = "carried", "carried.next"
MODEL, OLD_MODEL = "model", "model.old"
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
SUBSPACES_FILE = "subspaces.safetensors"
METHOD_FILE = "method.safetensors"
SETUP_FILE = "setup.json"
TASKS_FILE = "tasks.json"
_EARLIER = "remove {} to go on from what was saved before it"
# Of the settings, those that a run may go on with in another way; of the batch's parts only the product counts, the
# tasks are compared by their names and rows, and the model by its weights.
FREE = frozenset(
    {"output", "name", "save_every", "leak_every", "resume", "cpu", "eval_batch_size", "parallel", "processes"}
    | {"ddp_timeout", "batch_size", "gradient_accumulation_steps", "rows_per_step", "report_to", "tasks", "order"}
    | {"model"}
)


@dataclass(frozen=True)
class Saved:
    """A state on disk. task: index of the task to be learned next. step: optimizer steps of it that were taken; None
    where it has not begun. finished: of a run whose model is written; its folder is the run's."""

    folder: Path
    task: int
    step: int | None
    finished: bool = False

    @property
    def _start(self) -> Path:
        """What the task begins with: its own folder, or the run's, of a finished run that the task was added to."""
        start = self.folder.parent / "start"
        return self.folder if self.finished else start if start.is_dir() else self.folder.parents[2]

    @property
    def _from_model(self) -> bool:
        return self._start.name != "start"

    @property
    def _go_back(self) -> str:
        """What helps where the subspaces of a task are damaged: its start does without."""
        task = self.folder.parent
        return _EARLIER.format(task / "step-*" if (task / "start").is_dir() else task)

    def result(self, output: Path) -> RunResult:
        """The run at the end of the task before, or later: with its answers, if there are some already."""
        damaged = None
        if (output / RUN_FILE).exists():
            try:
                latest = RunResult.load(output)
            except ValueError as error:
                damaged = error
            else:
                if len(latest.learned) == self.task:
                    return latest
        if self.task == 0 or (damaged is not None and not (self._start / RUN_FILE).exists()):
            why = damaged or f"{output / RUN_FILE} is missing"
            raise ValueError(f"resume: {why}, which {self.folder} goes on from; name another output")
        return replace(RunResult.load(self._start).until(self.task), output=str(output))

    def load_weights(self, model: PreTrainedModel, world: World) -> None:
        """Those at the end of the task before, into `model`, which has those before the first. To be called by every
        rank."""
        if self.task and self._from_model:
            load_model(self._start / MODEL, model, world)
        elif self.task:
            load_weights(self._start / "weights", model)

    def carried(self, model: nn.Module) -> tuple[dict[str, Tensor], Subspaces | None]:
        """What the method carries on from the task before: its state and the subspaces of that task."""
        from safetensors.torch import load_file

        folder = self._start
        if self.task and self._from_model:
            about, folder = read_about(folder / MODEL), folder / CARRIED
            if about is not None and about["carried"]:
                _check_manifest(folder, "one more task cannot go on without it: name another output")
                of = json.loads((folder / TASKS_FILE).read_text(encoding="utf-8"))
                if of != about["tasks"]:
                    raise ValueError(f"resume: {folder} is of the tasks {', '.join(of)}, the model of others")
        method, subspaces = folder / METHOD_FILE, folder / SUBSPACES_FILE
        return (
            load_file(method) if method.exists() else {},
            Subspaces.load(subspaces, model) if subspaces.exists() else None,
        )

    def subspaces(self, model: nn.Module) -> tuple[Subspaces | None, float]:
        """Within a task: its subspaces, bound to `model`, and the seconds they took to derive."""
        path, setup = self.folder.parent / SUBSPACES_FILE, self.folder.parent / SETUP_FILE
        try:
            record = json.loads(setup.read_text(encoding="utf-8"))
            seconds, size = float(record["derive_seconds"]), record["subspaces_bytes"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"resume: {setup} is damaged ({error}); {self._go_back}") from error
        if size is None:
            return None, seconds
        _check_sizes(self.folder.parent, {path.name: size}, self._go_back)
        return Subspaces.load(path, model), seconds


class Checkpoints:
    """The states of one run, in `output`/checkpoint. All methods are to be called by every rank."""

    def __init__(self, output: Path, world: World) -> None:
        self.output = output
        self.folder = output / FOLDER
        self.world = world

    def latest(self) -> Saved | None:
        """The last state that is whole, None without one; ValueError if a file of it is missing or cut short."""
        for task, folder in reversed(_numbered(self.folder, "task")):
            steps: list[tuple[int | None, Path]] = [(None, folder / "start")] if (folder / "start").is_dir() else []
            steps += _numbered(folder, "step")
            if steps:
                step, state = steps[-1]
                _check_manifest(state, _EARLIER.format(state))
                if state != steps[0][1] and steps[0][0] is None:
                    _check_manifest(steps[0][1], f"nothing goes on without it: name another output than {self.output}")
                return Saved(state, task - 1, step)
        return None

    def end_task(
        self, index: int, result: RunResult, model: nn.Module, method: Mapping[str, Tensor], carried: Subspaces | None
    ) -> None:
        """Keep the run as it is when the `index`-th task has been learned; what is older goes."""

        def write(folder: Path) -> None:
            save_weights(folder / "weights", model)
            self._write_carried(folder, method, carried)
            if self.world.first:
                replace(result, output=str(folder)).save()

        with self._new(self.folder / f"task-{index + 2}" / "start") as folder:
            write(folder)
        older = [path for number, path in _numbered(self.folder, "task") if number <= index + 1]
        self._remove(older)

    def begin_task(self, index: int, subspaces: Subspaces | None, seconds: float) -> None:
        """Keep what stays the same while the `index`-th task is learned, before `save`."""
        folder = self.folder / f"task-{index + 1}"
        self.world.on_first("starting a checkpoint", lambda: folder.mkdir(parents=True, exist_ok=True))
        with _said(self.output, folder):
            if subspaces is not None:
                subspaces.save(folder / SUBSPACES_FILE)
            if self.world.first:
                size = None if subspaces is None else (folder / SUBSPACES_FILE).stat().st_size
                write_text(folder / SETUP_FILE, json.dumps({"derive_seconds": seconds, "subspaces_bytes": size}))

    def save(self, index: int, step: int, write: Callable[[Path], None]) -> None:
        """Have every rank `write` its part of the `index`-th task's state after `step` steps into one folder; what is
        older is removed once that is whole."""
        task = self.folder / f"task-{index + 1}"
        with self._new(task / f"step-{step}") as folder:
            write(folder)
        self._remove([path for number, path in _numbered(task, "step") if number < step])

    def carry(self, tasks: Sequence[str], method: Mapping[str, Tensor], carried: Subspaces | None) -> None:
        """At the end of the run, before its model is written: keep what one more task would go on from with it. What
        goes with the model before stays."""
        if method or carried is not None:
            with self._new(self.output / NEXT) as folder:
                self._write_carried(folder, method, carried)
                if self.world.first:
                    write_text(folder / TASKS_FILE, json.dumps(list(tasks)))

    def settle(self) -> None:
        """Make a pair of model/ and carried/: the new one where the model has its name, the one before where the run
        was killed earlier."""
        model, old, carried, following = (self.output / name for name in (MODEL, OLD_MODEL, CARRIED, NEXT))

        def settle() -> None:
            if old.exists() and not model.exists():
                old.replace(model)
            about = read_about(model)
            if about is not None and not about["carried"]:
                shutil.rmtree(carried, ignore_errors=True)
            elif about is not None and _is_carried(following, about["tasks"]):
                shutil.rmtree(carried, ignore_errors=True)
                following.replace(carried)

        self.world.on_first("naming what is carried on", settle)

    def clear(self) -> None:
        """Remove all states of tasks, of a settled run; one killed while it does so is a finished one."""
        gone = self.folder.with_suffix(".old")

        def remove() -> None:
            shutil.rmtree(gone, ignore_errors=True)
            if self.folder.exists():
                self.folder.replace(gone)
            # Of a run that was killed after its model had got its name, or while it added a task.
            for left in (gone, *(self.output / name for name in (OLD_MODEL, f"{MODEL}.tmp", NEXT, f"{NEXT}.tmp"))):
                shutil.rmtree(left, ignore_errors=True)

        self.world.on_first("removing the checkpoint", remove)

    def _write_carried(self, folder: Path, method: Mapping[str, Tensor], carried: Subspaces | None) -> None:
        from safetensors.torch import save_file

        if carried is not None:
            carried.save(folder / SUBSPACES_FILE)
        if method and self.world.first:
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in method.items()}, folder / METHOD_FILE
            )

    @contextmanager
    def _new(self, folder: Path) -> Iterator[Path]:
        """A folder for every rank to write to, which gets its name at the end of the block."""
        temporary = folder.with_name(f"{folder.name}.tmp")

        def prepare() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

        def finish() -> None:
            sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in _files(temporary)}
            write_text(temporary / MANIFEST_FILE, json.dumps(sizes))
            shutil.rmtree(folder, ignore_errors=True)
            temporary.replace(folder)

        with _said(self.output, folder):
            self.world.on_first("starting a checkpoint", prepare)
            yield temporary
            self.world.share("writing a checkpoint", None)
            self.world.on_first("finishing a checkpoint", finish)

    def _remove(self, folders: list[Path]) -> None:
        def remove() -> None:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)

        self.world.on_first("removing older checkpoints", remove)


@contextmanager
def _said(output: Path, folder: Path) -> Iterator[None]:
    """A disk that is full, or gone, is said to be, with what is still there."""
    from safetensors import SafetensorError

    try:
        yield
    except (TimeoutError, ConnectionError):
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save on a full disk: RuntimeError.
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        raise OSError(
            f"save_every: cannot write {folder}: {error}. What was saved before is whole: make room, then "
            f"{resume_command(output)}"
        ) from error


def _check_manifest(folder: Path, advice: str) -> None:
    try:
        sizes = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"resume: {folder} is incomplete, its {MANIFEST_FILE} cannot be read; {advice}") from error
    _check_sizes(folder, sizes, advice)


def _is_carried(folder: Path, tasks: list[str]) -> bool:
    """Whether `folder` is whole and holds what is carried on from `tasks`."""
    try:
        _check_manifest(folder, "")
        return bool(json.loads((folder / TASKS_FILE).read_text(encoding="utf-8")) == tasks)
    except (OSError, ValueError):
        return False


def _check_sizes(folder: Path, sizes: Mapping[str, int], advice: str) -> None:
    for name, size in sizes.items():
        path = folder / name
        if not path.exists() or path.stat().st_size != size:
            found = f"has {path.stat().st_size} bytes of {size}" if path.exists() else "is missing"
            raise ValueError(f"resume: {path} {found}; {advice}")


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """ValueError unless a run with the settings `now` continues one with the settings `saved`."""
    for name, value in now.items():
        before, after = saved.get(name), json.loads(json.dumps(value))
        if name == "remember_text" and None not in (before, after):
            # By its name, as other files: as a path it depends on the working directory.
            before, after = Path(str(before)).name, Path(str(after)).name
        if name not in FREE and before != after:
            raise ValueError(f"resume: the run was started with {name}={saved.get(name)}, this one has {value}")
    if saved.get("rows_per_step") != now.get("rows_per_step"):
        raise ValueError(
            f"resume: the run was started with {saved.get('rows_per_step')} rows an optimizer step, batch_size times "
            f"gradient_accumulation_steps times processes are {now.get('rows_per_step')}"
        )


def has_states(output: Path) -> bool:
    """Whether there is any state of a task, whole or not."""
    tasks = [folder for _, folder in _numbered(output / FOLDER, "task")]
    return any((folder / "start").is_dir() or _numbered(folder, "step") for folder in tasks)


def read_state(output: Path) -> dict[str, Any] | None:
    """What `write_state` wrote, None without it; ValueError if it cannot be read."""
    path = output / STATE_FILE
    if not path.exists():
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if not {"tasks", "finished", "accuracy", "rows", "weights"} <= state.keys():
            raise ValueError("it lacks entries")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"resume: {path} is damaged ({error}); name another output") from error
    return dict(state)


def write_state(result: RunResult, weights: str, rows: Mapping[str, str]) -> None:
    """state.json: finished tasks, accuracies, and the hashes of the first weights and of the tasks' rows."""
    state = {
        "tasks": result.tasks,
        "finished": [task.name for task in result.learned],
        "accuracy": [[None if share != share else share for share in row] for row in result.accuracy],
        "weights": weights,
        "rows": rows,
    }
    Path(result.output).mkdir(parents=True, exist_ok=True)
    write_text(Path(result.output) / STATE_FILE, json.dumps(state, indent=1) + "\n")


def leftovers(output: Path) -> list[str]:
    """What lies in the output folder that no run of ours has put there."""
    ours = {FOLDER, CARRIED, NEXT, RUN_FILE, PREDICTIONS_FILE, STATE_FILE, SETTINGS_FILE, GENERATED_FILE, MODEL}
    ours |= {"logs", "report.md"}
    ours |= {f"{name}.tmp" for name in ours} | {f"{FOLDER}.old", OLD_MODEL}
    found = output.iterdir() if output.is_dir() else ()
    return sorted(path.name for path in found if path.name not in ours and not re.search(r"\.png(\.tmp)?$", path.name))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _numbered(folder: Path, kind: str) -> list[tuple[int, Path]]:
    """The whole entries "kind-number" of `folder` in order."""
    entries = [(path.name.removeprefix(f"{kind}-"), path) for path in folder.glob(f"{kind}-*")]
    return sorted((int(number), path) for number, path in entries if number.isdigit())

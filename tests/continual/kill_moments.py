"""Kills a run at every moment at which it changes something on disk, and in between, and goes on from what is left.

    kill_moments.py SETTINGS.json FOLDER EVERY [FIRST]

FIRST: the run is one of the first FIRST tasks that was finished, and that the others are added to.
Prints what a run led to as one JSON object, then the same for every EVERY-th moment, at which it was killed and then
resumed. A moment is the end of an optimizer step, right before a file gets its name, or a folder half removed. Every
run is a process of its own, forked so that the packages are imported once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sculpt_ops.continual import RunResult, TrainConfig, train, trainer
from sculpt_ops.continual.hf_trainer import StepClock


class Moments:
    """Counts the moments of a run and kills this process at the wanted one."""

    def __init__(self, wanted: int | None) -> None:
        self.wanted = wanted
        self.names: list[str] = []

    def pass_by(self, name: str) -> None:
        if len(self.names) == self.wanted:
            os.kill(os.getpid(), signal.SIGKILL)
        self.names.append(name)

    def watch(self) -> None:
        replace, rmtree, on_step_end = Path.replace, shutil.rmtree, StepClock.on_step_end

        def watched_replace(path: Path, target: Any) -> Any:
            self.pass_by(f"before {Path(target).name}")
            return replace(path, target)

        def watched_rmtree(path: Any, *arguments: Any, **named: Any) -> None:
            if Path(path).exists():
                files = sorted(file for file in Path(path).rglob("*") if file.is_file())
                for file in files[: len(files) // 2]:
                    file.unlink()
                self.pass_by(f"half of {Path(path).name}")
            rmtree(path, *arguments, **named)

        def watched_step(clock: StepClock, args: Any, state: Any, control: Any, **named: Any) -> None:
            on_step_end(clock, args, state, control, **named)
            self.pass_by(f"step {state.global_step} of {clock.task}")

        Path.replace = watched_replace  # type: ignore[assignment, method-assign]
        shutil.rmtree = watched_rmtree  # type: ignore[assignment]
        StepClock.on_step_end = watched_step  # type: ignore[method-assign]


def run(config: TrainConfig, wanted: int | None) -> dict[str, Any]:
    moments, trained = Moments(wanted), []
    moments.watch()
    learn = trainer.learn

    def watched(run: Any, index: int) -> None:
        trained.append(index)
        learn(run, index)

    trainer.learn = watched
    result = train(config, quiet=True)
    model = Path(config.output) / "model" / "model.safetensors"
    return {
        "moments": moments.names,
        "trained": trained,
        "weights": hashlib.sha256(model.read_bytes()).hexdigest(),
        "answers": [[p.row, p.task, p.item, p.prediction] for p in RunResult.load(result.output).predictions],
        "ranks": [sorted(layer["rank"] for layer in task.layers.values()) for task in result.learned],
        "losses": [task.losses for task in result.learned],
    }


def forked(work: Callable[[], dict[str, Any]], file: Path) -> dict[str, Any] | None:
    """What `work` returns in a process of its own, None if that was killed."""
    child = os.fork()
    if child == 0:
        try:
            file.write_text(json.dumps(work()))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return None
    return json.loads(file.read_text()) if status == 0 else {"failed": True}


def main(settings: dict[str, Any], folder: Path, every: int, first: int = 0) -> None:
    torch.set_num_threads(1)
    answer, base = folder / "answer.json", folder / "base"
    if first:
        tasks = settings["tasks"][:first]
        assert forked(lambda: run(TrainConfig(**{**settings, "tasks": tasks}, output=base), None), answer) is not None

    def begun(output: Path, wanted: int | None) -> dict[str, Any]:
        if first:
            shutil.copytree(base, output)
        return run(TrainConfig(**settings, output=output, resume=bool(first)), wanted)

    straight = forked(lambda: begun(folder / "straight", None), answer)
    assert straight is not None
    print(json.dumps(straight), flush=True)
    for moment, name in list(enumerate(straight["moments"]))[::every]:
        output = folder / f"killed-{moment}"
        died = forked(lambda: begun(output, moment), answer)  # noqa: B023
        resumed = forked(lambda: run(TrainConfig(**settings, output=output, resume=True), None), answer)  # noqa: B023
        files = sorted(path.name for path in output.iterdir())
        print(json.dumps({"moment": name, "died": died is None, "files": files, **(resumed or {})}), flush=True)
        shutil.rmtree(output)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), *map(int, sys.argv[3:]))

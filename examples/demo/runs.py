"""The two runs, each in a process of its own: peak memory is then its own too, and none is held for the other."""

from __future__ import annotations

import multiprocessing
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from packages import DemoError
from plan import Speed

from sculpt_ops.continual import RunResult, Task, TrainConfig, train


def run_in_own_process(config: TrainConfig, zero_shot: Path | None = None) -> RunResult:
    """Trains in a fresh process, which ends with this one or with Ctrl-C, and returns what it left in its folder.

    The trained model itself, half a gigabyte, is not kept.
    """
    worker = multiprocessing.get_context("spawn").Process(target=_train, args=(config, zero_shot), daemon=True)
    worker.start()
    try:
        worker.join()
    finally:
        worker.terminate()
        worker.join()
    if worker.exitcode:
        killed = " (killed: out of memory?)" if worker.exitcode == -9 else ""
        raise DemoError(f"the run {config.method!r} ended with exit code {worker.exitcode}{killed}")
    shutil.rmtree(Path(config.output) / "model")
    return RunResult.load(config.output)


def _train(config: TrainConfig, zero_shot: Path | None) -> None:
    try:
        train(config, zero_shot=None if zero_shot is None else RunResult.load(zero_shot))
    except KeyboardInterrupt:
        sys.exit(130)


def first_test_items(tasks: Sequence[Task], items: int) -> list[Task]:
    """The tasks with their first `items` test items, in which every class is equally frequent."""
    return [replace(task, test=task.test[:items]) for task in tasks]


def first_measured_items(result: RunResult, items: int) -> RunResult:
    """The result as if only the first `items` items of every task had been measured."""
    return replace(
        result,
        learned=[replace(task, test_items=min(items, task.test_items)) for task in result.learned],
        predictions=[prediction for prediction in result.predictions if prediction.item < items],
    )


def measured_speed(result: RunResult, before: Speed) -> Speed:
    """`before` with the steps and answers that a plain run really took, and its other parts scaled like the steps."""
    expected = sum(before.first + task.steps * before.step for task in result.learned)
    scale = sum(task.train_seconds for task in result.learned) / expected
    return Speed(
        step=before.step * scale,
        first=before.first * scale,
        protection=before.protection * scale,
        item=sum(result.evaluation_seconds) / len(result.predictions),
        decomposition=before.decomposition * scale,
    )

"""One run as one small file: settings, versions, cost and every answer."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from sculpt_ops.continual import RunResult
from sculpt_ops.continual.result import LearnedTask, Prediction, write_text
from sculpt_ops.files import replacing

__all__ = ["pack", "read_all", "unpack", "write_text"]

# Of a task's training; per weight only medians are kept.
_KEPT: tuple[str, ...] = (
    "name",
    "train_items",
    "test_items",
    "note",
    "steps",
    "derive_seconds",
    "train_seconds",
    "peak_memory_bytes",
)
_KEPT += ("majority",)


def pack(result: RunResult, folder: Path, about: dict[str, Any]) -> None:
    """Write `result` to `folder`/NAME.json.gz. about: of the run, what its settings do not say."""
    answers: dict[str, list[Any]] = {}
    for entry in result.predictions:
        answers.setdefault(f"{entry.row}/{entry.task}", []).append(
            (entry.item, entry.answer, entry.prediction, entry.option)
        )
    record = {
        "about": about,
        "name": result.name,
        "tasks": result.tasks,
        "config": {**result.config, **_without_folders(result.config)},
        "versions": result.versions,
        "accuracy": [[value if value == value else None for value in row] for row in result.accuracy],
        "seconds_per_step": result.seconds_per_step,
        "evaluation_seconds": result.evaluation_seconds,
        "learned": [_task(task) for task in result.learned],
        "ability": result.ability,
        "answers": answers,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.name}.json.gz"
    # Without a time stamp: the same result is the same file.
    with replacing(path) as temporary:
        temporary.write_bytes(gzip.compress(json.dumps(record).encode(), mtime=0))


def _without_folders(config: dict[str, Any]) -> dict[str, Any]:
    """Names in place of paths, which say where a machine keeps things."""
    files = {name: Path(config[name]).name for name in ("model", "remember_text") if config.get(name)}
    return {**files, "tasks": [Path(task).name for task in config["tasks"]], "output": ""}


def _task(task: LearnedTask) -> dict[str, Any]:
    figures = asdict(task)
    kept = {name: figures[name] for name in _KEPT}
    if task.layers:
        kept["rank_share"] = median(layer["rank"] / min(layer["shape"]) for layer in task.layers.values())
    # A run that was begun before it was written down has tasks without.
    if task.layers and all("protected" in layer for layer in task.layers.values()):
        kept["protected_share"] = [
            median(layer["protected"][side] / layer["shape"][side] for layer in task.layers.values()) for side in (0, 1)
        ]
    if task.leak:
        kept["leak"] = [median(task.leak.values()), max(task.leak.values())]
    if task.remembered:
        kept["remembered"] = [min(task.remembered.values()), median(task.remembered.values())]
    return kept


def unpack(path: Path) -> tuple[RunResult, dict[str, Any]]:
    """What `pack` wrote: the run, without figures per weight, and the whole record."""
    record = json.loads(gzip.decompress(path.read_bytes()))
    predictions = [
        Prediction(int(row), task, *item)
        for key, items in record["answers"].items()
        for row, task in [key.split("/", 1)]
        for item in items
    ]
    learned = [
        LearnedTask(step_seconds=[], losses=[], **{name: task.get(name) for name in _KEPT})
        for task in record["learned"]
    ]
    run = RunResult(record["name"], record["tasks"], str(path), record["config"], record["versions"])
    seconds = record["evaluation_seconds"]
    ability = record.get("ability", {})
    return replace(run, learned=learned, predictions=predictions, evaluation_seconds=seconds, ability=ability), record


def read_all(folder: Path) -> Iterator[tuple[RunResult, dict[str, Any]]]:
    for path in sorted(folder.glob("*.json.gz")):
        yield unpack(path)

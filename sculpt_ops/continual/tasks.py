"""Tasks: prompts with their answers, and the folders they are read from."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .score import check_metric

LAYOUTS = (
    "A task folder holds train.jsonl and test.jsonl (one object a line with `prompt` and `answer`), "
    "or labels.json with train.json or test.json (the TYPE/DATASET layout of the O-LoRA benchmark), "
    "or train.json and test.json (lists of `prompt` and `answer`, the layout of TRACE)."
)


@dataclass(frozen=True)
class Example:
    """One question. `group` marks rows that share a text, which no split puts on both sides."""

    prompt: str
    answer: str
    group: str | None = None


@dataclass(frozen=True)
class Task:
    """A named set of training and test examples.

    options: the answers there are, where they are few. note: what a reader of the figures has to know about the data.
    metric: how an answer is measured, one of `score.METRICS`; where it is not "exact", answers may have several lines.
    """

    name: str
    train: Sequence[Example]
    test: Sequence[Example]
    options: Sequence[str] | None = None
    note: str | None = None
    metric: str = "exact"


def split(examples: Sequence[Example], held_out: int, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Shuffle with a fixed seed and hold out the last `held_out` rows; whole groups, so at least that many.

    Returns (kept, held out).
    """
    groups: dict[Any, list[Example]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(index if example.group is None else example.group, []).append(example)
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)
    held: list[Example] = []
    while shuffled and len(held) < held_out:
        held = shuffled.pop() + held
    return [example for group in shuffled for example in group], held


def hold_out(task: Task, items: int, seed: int = 0) -> Task:
    """The task with `items` training rows as its test set: for choosing settings without looking at the test rows."""
    kept, held = split(task.train, items, seed)
    if not kept:
        raise ValueError(f"dev_items: got {items}, task {task.name} has {len(task.train)} training rows in all")
    note = f"measured on {len(held)} training rows held out (seed {seed}), not on the test rows"
    return replace(task, train=kept, test=held, note=f"{task.note}; {note}" if task.note else note)


def read_text(path: Path) -> str:
    """The content of a file; ValueError, naming it, if it is not UTF-8."""
    if path.is_dir():
        raise ValueError(f"{path}: got a folder, wanted a file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}: {error.reason})") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file; ValueError names the file and line."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error


def read_jsonl_task(folder: str | Path) -> Task:
    """A task from train.jsonl and test.jsonl, `prompt` and `answer` per line, and options.json (a list) if it is there.

    A line's `group`, where it has one, marks the rows that share a text: what is held out of training is held out by
    group, and rows of test.jsonl that share one with train.jsonl are counted in the task's note. metric.json, where it
    is there, names the metric as JSON text ("rouge-l"). The folder's name is the task's name. ValueError names the
    file and line.
    """
    folder = Path(folder)
    options, metric = None, "exact"
    if (folder / "options.json").exists():
        options = _check_options(read_json(folder / "options.json"), folder / "options.json")
    if (folder / "metric.json").exists():
        metric = read_json(folder / "metric.json")
        try:
            check_metric(metric)
        except ValueError as error:
            raise ValueError(f"{folder / 'metric.json'}: {error}") from error
    train, test = (_read_jsonl(folder / f"{part}.jsonl", options, metric != "exact") for part in ("train", "test"))
    return Task(folder.resolve().name, train, test, options, shared_note(train, test), metric)


def shared_note(train: Sequence[Example], test: Sequence[Example]) -> str | None:
    """How many test rows are about a text of the training rows; None if none are."""
    groups = {example.group for example in train} - {None}
    shared = sum(example.group in groups for example in test)
    return f"{shared} of the {len(test)} test rows share their text with training rows" if shared else None


def _read_jsonl(path: Path, options: Sequence[str] | None, multiline: bool) -> list[Example]:
    if not path.exists():
        raise ValueError(f"{path} is missing. {LAYOUTS}")
    examples = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: got {type(row).__name__}, wanted an object with `prompt` and `answer`")
        prompt, answer = (_text(row, key, where) for key in ("prompt", "answer"))
        group = _text(row, "group", where) if row.get("group") is not None else None
        examples.append(Example(prompt, check_answer(answer, options, where, multiline), group))
    if not examples:
        raise ValueError(f"{path}: no rows")
    return examples


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: `{key}` is {value!r}, wanted text")
    return value


def check_answer(answer: str, options: Sequence[str] | None, where: str, multiline: bool = False) -> str:
    """The answer without the space around it; ValueError if it has several lines, unless it may, or is none of the
    options."""
    answer = answer.strip()
    if "\n" in answer and not multiline:
        raise ValueError(f"{where}: the answer has several lines, wanted one: {answer!r}")
    if options is not None and answer not in options:
        raise ValueError(f"{where}: the answer {answer!r} is none of the options {', '.join(options)}")
    return answer


def _check_options(options: Any, path: Path) -> list[str]:
    if not isinstance(options, list) or not options or not all(isinstance(option, str) for option in options):
        raise ValueError(f"{path}: wanted a list of answers")
    texts = [option.strip() for option in options]
    if wrong := [text for text in texts if not text or texts.count(text) > 1]:
        raise ValueError(f"{path}: the option {wrong[0]!r} is {'there twice' if wrong[0] else 'empty'}")
    return texts


def load_tasks(sources: Iterable[Task | str | Path], order: Sequence[str] | None = None) -> list[Task]:
    """The tasks of `choose_tasks`, read. ValueError for an unknown layout too."""
    return [entry if isinstance(entry, Task) else read_task(entry) for entry in choose_tasks(sources, order)]


def choose_tasks(sources: Iterable[Task | str | Path], order: Sequence[str] | None = None) -> list[Task | Path]:
    """Tasks, task folders and folders of task folders (two levels deep, by name) as one sequence of tasks and folders.

    order: names to take, in the order wanted. ValueError for a name twice or not there.
    """
    entries: list[Task | Path] = []
    for source in sources:
        entries += [source] if isinstance(source, Task) else task_folders(Path(source))
    names = [entry.name if isinstance(entry, Task) else entry.resolve().name for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"tasks: the name {twice[0]} is there twice")
    by_name = dict(zip(names, entries, strict=True))
    unknown = [name for name in order or () if name not in by_name]
    if unknown:
        raise ValueError(f"order: no task {unknown[0]}, there are {', '.join(names)}")
    again = sorted({name for name in order or () if list(order or ()).count(name) > 1})
    if again:
        raise ValueError(f"order: the task {again[0]} is there twice")
    return [by_name[name] for name in (names if order is None else order)]


def read_task(folder: str | Path) -> Task:
    """A task from a folder in any of the layouts."""
    from .benchmark import read_benchmark_task
    from .trace import read_trace_task

    folder = Path(folder)
    layout = _layout(folder)
    if layout is None:
        raise ValueError(f"tasks: {folder} is no task folder. {LAYOUTS}")
    return {"jsonl": read_jsonl_task, "benchmark": read_benchmark_task, "trace": read_trace_task}[layout](folder)


def _layout(folder: Path) -> str | None:
    if (folder / "train.jsonl").exists() or (folder / "test.jsonl").exists():
        return "jsonl"
    if (folder / "labels.json").exists():
        return "benchmark"
    # One of the two says what it is meant to be, and the reader what is missing.
    if (folder / "train.json").exists() or (folder / "test.json").exists():
        return "trace"
    return None


def task_folders(folder: Path) -> list[Path]:
    """`folder` itself, or the task folders in it or one level deeper, by name; ValueError if there are none."""
    if not folder.is_dir():
        raise ValueError(f"tasks: there is no folder {folder}")
    if _layout(folder):
        return [folder]
    for pattern in ("*", "*/*"):
        found = sorted(path for path in folder.glob(pattern) if path.is_dir() and _layout(path))
        if found:
            return found
    raise ValueError(f"tasks: {folder} is no task folder and holds none. {LAYOUTS}")

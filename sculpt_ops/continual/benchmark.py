"""The public continual-learning benchmark of O-LoRA: folder layout, questions, and the published task sequences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .tasks import Example, Task, check_answer, read_json, read_task, shared_note, split, task_folders
from .trace import TRACE_TASKS

# The parent folder's name is the type. The layout is the benchmark's; the wording is ours.
INSTRUCTIONS = {
    "TC": "Which topic does the following text belong to?",
    "SC": "Which sentiment does the following text express?",
    "NLI": "What is the logical relation of sentence 2 to sentence 1?",
    "QQP": "Do the two sentences ask the same thing?",
    "BoolQA": "Going by the passage, is the answer to the question true or false?",
    "MultiRC": "Going by the paragraph, is the candidate answer to the question true or false?",
    "COPA": "Which of the two sentences is the more likely cause or effect?",
    "WiC": "Is it true or false that the word has the same meaning in both sentences?",
}

STANDARD_TASKS = ("dbpedia", "amazon", "yahoo", "agnews")
LONG_TASKS = (
    *("yelp", "amazon", "MNLI", "CB", "COPA", "QQP", "RTE", "IMDB", "SST-2"),
    *("dbpedia", "agnews", "yahoo", "MultiRC", "BoolQA", "WiC"),
)

# Published task orders. "long" is the benchmark's list, "long-paper" the order in which arXiv 2504.07097 runs it; TRACE
# has a layout of its own.
SEQUENCES = {
    "standard-1": STANDARD_TASKS,
    "standard-2": ("dbpedia", "amazon", "agnews", "yahoo"),
    "standard-3": ("yahoo", "amazon", "agnews", "dbpedia"),
    "long": LONG_TASKS,
    "long-paper": (
        *("MNLI", "CB", "WiC", "COPA", "QQP", "BoolQA", "RTE", "IMDB"),
        *("yelp", "amazon", "SST-2", "dbpedia", "agnews", "MultiRC", "yahoo"),
    ),
    "trace": TRACE_TASKS,
}
# The text that several instances share, up to the question; of BoolQA from the passage on, of NLI the first sentence.
# Of the 2000 training rows 114 of BoolQA and 70 of RTE share theirs with an earlier one.
SHARED_TEXT = {
    "MultiRC": re.compile(r"(.*?)\nquestion:", re.DOTALL),
    "BoolQA": re.compile(r".*?\npassage:(.*)", re.DOTALL),
    "NLI": re.compile(r"(.*?)\nsentence 2:", re.DOTALL),
}

SPLIT_SEED = 0
HELD_OUT_ROWS = 500
TRAINING_ROWS = 5000


def read_benchmark_task(folder: str | Path) -> Task:
    """A task from TYPE/DATASET/{train,test,labels}.json, instances of `label` and `sentence`.

    Where only one of the two files is there it is split with a fixed seed, and the task's note says so: without
    test.json the last 500 shuffled rows are held out (at most a quarter), without train.json the first 5000 are for
    training (at most two thirds). Rows that share a passage or a first sentence are not separated; where both files
    are there, the note counts the test rows that share theirs with training rows.
    """
    folder = Path(folder)
    kind = folder.resolve().parent.name
    if kind not in INSTRUCTIONS:
        raise ValueError(f"{folder}: the parent folder names the type, got {kind}, wanted {', '.join(INSTRUCTIONS)}")
    options = read_json(folder / "labels.json")
    if not isinstance(options, list) or not options or not all(isinstance(option, str) for option in options):
        raise ValueError(f"{folder / 'labels.json'}: wanted a list of answers")
    parts = {part: _read_instances(folder / f"{part}.json", kind, options) for part in ("train", "test")}
    train, test = parts["train"], parts["test"]
    note: str | None
    if train is None and test is None:
        raise ValueError(f"{folder}: neither train.json nor test.json is there")
    if test is None:
        assert train is not None
        train, test = split(train, min(HELD_OUT_ROWS, len(train) // 4), SPLIT_SEED)
        note = _split_note("train.json", train, test)
    elif train is None:
        train, test = split(test, len(test) - min(TRAINING_ROWS, 2 * len(test) // 3), SPLIT_SEED)
        note = _split_note("test.json", train, test)
    else:
        note = shared_note(train, test)
    if not train or not test:
        there = "train" if (folder / "train.json").exists() else "test"
        raise ValueError(
            f"{folder / there}.json: {len(train) + len(test)} rows are too few to hold some out, and there is no other "
            "file; wanted 4 or more"
        )
    return Task(folder.resolve().name, train, test, options, note)


def _split_note(file: str, train: Sequence[Example], test: Sequence[Example]) -> str:
    by = " by passage" if any(row.group is not None for row in (*train, *test)) else ""
    return f"only {file} is there: shuffled{by} (seed {SPLIT_SEED}), {len(train)} rows to train, {len(test)} to test"


def _read_instances(path: Path, kind: str, options: Sequence[str]) -> list[Example] | None:
    if not path.exists():
        return None
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: wanted a list of instances, each with `label` and `sentence`")
    return [_read_instance(row, kind, options, f"{path}, instance {number}") for number, row in enumerate(rows)]


def _read_instance(row: Any, kind: str, options: Sequence[str], where: str) -> Example:
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("label", "sentence")):
        raise ValueError(f"{where}: wanted `label` and `sentence`, both text")
    sentence = row["sentence"].strip()
    lines = (f"{INSTRUCTIONS[kind]} Choose one from the option.", f"Option: {', '.join(options)}", sentence, "Answer:")
    shared = SHARED_TEXT[kind].match(sentence) if kind in SHARED_TEXT else None
    return Example("\n".join(lines), check_answer(row["label"], options, where), shared and shared[1])


@dataclass(frozen=True)
class TaskSequence:
    """A published sequence of tasks in its order, as far as the data is there. name: says so where it is partial."""

    name: str
    tasks: list[Task]
    missing: tuple[str, ...] = ()

    @property
    def note(self) -> str | None:
        """What it lacks; None if nothing."""
        if not self.missing:
            return None
        return f"{self.name}: {len(self.tasks)} of {len(self.tasks) + len(self.missing)} tasks; it lacks " + ", ".join(
            self.missing
        )


def load_sequence(name: str, folder: str | Path) -> TaskSequence:
    """The sequence `name` of `SEQUENCES`, of the task folders under `folder`; those that are missing are left out.

    ValueError for an unknown name, and where no task of it is there.
    """
    if name not in SEQUENCES:
        raise ValueError(f"sequence: got {name!r}, wanted one of {', '.join(SEQUENCES)}")
    folders = {path.resolve().name: path for path in task_folders(Path(folder))}
    there = [task for task in SEQUENCES[name] if task in folders]
    if not there:
        raise ValueError(f"sequence: {folder} holds no task of {name}, which are {', '.join(SEQUENCES[name])}")
    missing = tuple(task for task in SEQUENCES[name] if task not in folders)
    called = f"{name} (partial)" if missing else name
    return TaskSequence(called, [read_task(folders[task]) for task in there], missing)


def benchmark_note(names: Sequence[str], sequence: str | None = None) -> str | None:
    """What a run over benchmark tasks lacks of `sequence`, if it is given, or of the published lists; None if it is no
    such run or lacks nothing."""
    if sequence is not None and (missing := [name for name in SEQUENCES[sequence] if name not in names]):
        of = len(SEQUENCES[sequence])
        return f"{sequence} is partial: {len(names)} of its {of} tasks; it lacks {', '.join(missing)}."
    if not set(names) <= set(LONG_TASKS) or set(names) in (set(STANDARD_TASKS), set(LONG_TASKS)):
        return None
    published = STANDARD_TASKS if set(names) <= set(STANDARD_TASKS) else LONG_TASKS
    lacking = ", ".join(name for name in published if name not in names)
    return f"{len(names)} of the {len(published)} tasks of the published benchmark; it lacks {lacking}."

"""TRACE, a benchmark of eight tasks for language models (Wang et al. 2023, arXiv 2310.06762): layout and metrics.

Its metrics are those of the published evaluation scripts, in [0, 1], with other packages behind them: ROUGE-L is of the
answer as one text where theirs joins the matches of its sentences; SARI is their formula on words in lower case, where
theirs counts punctuation marks as words of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .score import check_metric
from .tasks import Example, Task, check_answer, read_json

TRACE_TASKS = ("C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten")
METRICS = {"MeetingBank": "rouge-l", "Py150": "edit", "ScienceQA": "choice", "20Minuten": "sari"}
CLASSIFICATION = ("C-STANCE", "FOMC")


def read_trace_task(folder: str | Path) -> Task:
    """A task from train.json and test.json, lists of `prompt` and `answer`; eval.json is not read.

    The folder's name is the task's name and says the metric: exact match unless it is one of TRACE's tasks that are
    measured otherwise. The two tasks of few labels get them as options. ValueError names the file and instance,
    ImportError the package that a metric needs.
    """
    folder = Path(folder)
    name = folder.resolve().name
    metric = METRICS.get(name, "exact")
    check_metric(metric)
    train, test = (_read(folder / f"{part}.json", multiline=metric != "exact") for part in ("train", "test"))
    options = sorted({example.answer for example in [*train, *test]}) if name in CLASSIFICATION else None
    return Task(name, train, test, options, metric=metric)


def _read(path: Path, multiline: bool) -> list[Example]:
    if not path.exists():
        raise ValueError(f"{path} is missing: a task of TRACE has train.json and test.json")
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: wanted a list of instances, each with `prompt` and `answer`")
    return [_example(row, multiline, f"{path}, instance {number}") for number, row in enumerate(rows)]


def _example(row: Any, multiline: bool, where: str) -> Example:
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("prompt", "answer")):
        raise ValueError(f"{where}: wanted `prompt` and `answer`, both text")
    if not row["prompt"].strip() or not row["answer"].strip():
        raise ValueError(f"{where}: the prompt or the answer is empty")
    return Example(row["prompt"], check_answer(row["answer"], None, where, multiline))

"""What a run leaves behind: predictions, accuracies, cost; and the files that hold them."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..files import replacing
from .metrics import Metrics, meaningful, measure

RUN_FILE = "run.json"
# The text of remember_text generated.
GENERATED_FILE = "generated.txt"
PREDICTIONS_FILE = "predictions.jsonl"


def resume_command(output: str | Path) -> str:
    """What goes on with the run in the folder `output`."""
    return f"sculpt train --output {shlex.quote(str(output))} --resume"


@dataclass(frozen=True)
class Prediction:
    """One item's outcome.

    row: 0 before the first task, i right after the i-th. item: index among the measured items. option: the likeliest of
    the task's options, None where they were not compared. score: by the task's metric, in [0, 1]; None for exact match.
    """

    row: int
    task: str
    item: int
    answer: str
    prediction: str
    option: str | None = None
    score: float | None = None

    @property
    def correct(self) -> bool:
        return self.prediction == self.answer

    @property
    def value(self) -> float:
        """What counts in the accuracy matrix."""
        return self.correct if self.score is None else self.score


@dataclass(frozen=True)
class LearnedTask:
    """One task's training. losses: (step, mean loss since the entry before) pairs.

    peak_memory_bytes: while deriving subspaces and training; of the GPU where one is used, else of the process.
    layers: per protected weight its shape, rank, share of energy kept, and the dimensions of its left and right
    protected space, which are more than the rank where something is remembered. leak: per protected weight the share of
    the weight change that lies in the protected space, after the last step; leak_left and leak_right the shares of the
    change inside the protected directions of one side, where that side is protected. leak_over_time: (step, median over
    the weights, the largest) triples; leak_seconds: spent measuring, part of train_seconds but of no step's. All empty
    for plain fine-tuning. remembered: per protected weight the share of the change by the task before that is
    protected in this one, known where changes are remembered. remembered_earlier: of every earlier task the median of
    that share over the weights, None where it is not known. majority: the share of test items that the most frequent
    training answer is right for, of a task with options.
    """

    name: str
    train_items: int
    test_items: int
    note: str | None
    steps: int
    derive_seconds: float
    train_seconds: float
    step_seconds: list[float]
    losses: list[tuple[int, float]]
    peak_memory_bytes: int
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    leak: dict[str, float] = field(default_factory=dict)
    leak_left: dict[str, float] = field(default_factory=dict)
    leak_right: dict[str, float] = field(default_factory=dict)
    leak_over_time: list[tuple[int, float, float]] = field(default_factory=list)
    leak_seconds: float = 0.0
    remembered: dict[str, float] = field(default_factory=dict)
    remembered_earlier: list[float | None] = field(default_factory=list)
    majority: float | None = None


@dataclass(frozen=True)
class RunResult:
    """Tasks learned one after the other, measured on all of them before the first and after each.

    output: the run's folder. config: the settings as in `TrainConfig.to_dict`.
    evaluation_seconds: per row of the accuracy matrix; 0 for a row taken over from another run. ability: figures of
    `measure_ability` by name, before the first task and after the last.
    """

    name: str
    tasks: list[str]
    output: str
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    learned: list[LearnedTask] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list)
    evaluation_seconds: list[float] = field(default_factory=list)
    ability: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def correct(self) -> list[list[list[float]]]:
        """correct[row][task][item], True and False, or the score by the task's metric; row 0 is zero-shot. Empty where
        a task was not measured."""
        return self._table([(entry, entry.value) for entry in self.predictions])

    @property
    def option_correct(self) -> list[list[list[float]]]:
        """As `correct`, of the likeliest options in place of the greedy answers; empty where they were not compared."""
        return self._table(
            [(entry, entry.option == entry.answer) for entry in self.predictions if entry.option is not None]
        )

    @property
    def option_accuracy(self) -> list[list[float]]:
        """As `accuracy`, of the likeliest options in place of the greedy answers; nan where they were not compared."""
        return _means(self.option_correct)

    def _table(self, values: Sequence[tuple[Prediction, float]]) -> list[list[list[float]]]:
        column = {name: index for index, name in enumerate(self.tasks)}
        rows = 1 + max((prediction.row for prediction in self.predictions), default=-1)
        table: list[list[list[float]]] = [[[] for _ in self.tasks] for _ in range(rows)]
        for prediction, value in values:
            table[prediction.row][column[prediction.task]].append(value)
        return table

    @property
    def accuracy(self) -> list[list[float]]:
        """(tasks + 1) rows x tasks, shares in [0, 1], nan where a task was not measured; row 0 is zero-shot, row i
        right after the i-th task."""
        return _means(self.correct)

    @property
    def complete(self) -> bool:
        """Whether all tasks were measured after the last."""
        table = self.correct
        return len(table) == len(self.tasks) + 1 and all(table[-1])

    def until(self, count: int) -> RunResult:
        """As it was when `count` tasks had been learned."""
        if len(self.learned) <= count:
            return self
        return replace(
            self,
            learned=self.learned[:count],
            predictions=[entry for entry in self.predictions if entry.row <= count],
            evaluation_seconds=self.evaluation_seconds[: count + 1],
        )

    @property
    def metrics(self) -> Metrics:
        """Average accuracy, backward transfer and the others with their intervals; of a bound nan for those that say
        nothing of it; ValueError for a run cut short."""
        if not self.complete:
            done = max(len(self.correct) - 1, 0)
            raise ValueError(
                f"{self.output}: the run stopped after {done} of {len(self.tasks)} tasks; "
                f"{resume_command(self.output)} goes on"
            )
        return meaningful(measure(self.correct), self.config.get("method"))

    @property
    def seconds_per_step(self) -> float | None:
        """Median over all optimizer steps, evaluation and derivation left out."""
        seconds = sorted(second for task in self.learned for second in task.step_seconds)
        return seconds[len(seconds) // 2] if seconds else None

    @property
    def peak_memory_bytes(self) -> int | None:
        """The largest of any task, evaluation left out."""
        return max((task.peak_memory_bytes for task in self.learned), default=None)

    def save(self) -> None:
        """Write run.json and predictions.jsonl into the run's folder, which is made if need be."""
        record = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "predictions"}
        record["learned"] = [asdict(task) for task in self.learned]
        summary = {
            "complete": self.complete,
            "accuracy": self.accuracy,
            "option_accuracy": self.option_accuracy,
            "seconds_per_step": self.seconds_per_step,
            "peak_memory_bytes": self.peak_memory_bytes,
        }
        if self.complete:
            summary["metrics"] = asdict(self.metrics)
        folder = Path(self.output)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({**asdict(entry), "correct": entry.correct}) for entry in self.predictions]
        write_text(folder / PREDICTIONS_FILE, "\n".join(lines) + "\n")
        write_text(folder / RUN_FILE, json.dumps(_without_nan({**summary, **record}), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> RunResult:
        """Read a run's folder; ValueError if it holds no run, or names the file that is damaged."""
        folder = Path(folder)
        if not (folder / RUN_FILE).exists():
            raise ValueError(f"{folder} holds no run of `sculpt train`: there is no {RUN_FILE}")
        file = PREDICTIONS_FILE
        try:
            lines = (folder / PREDICTIONS_FILE).read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines if line]
            file = RUN_FILE
            record = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
            record["learned"] = [LearnedTask(**_known(LearnedTask, task)) for task in record["learned"]]
            # Written first, and so one row ahead where the run was killed between the two files.
            there = (record["tasks"], len(record["evaluation_seconds"]))
            rows = [row for row in rows if row["task"] in there[0] and row["row"] < there[1]]
            record["predictions"] = [Prediction(**_known(Prediction, row)) for row in rows]
            return cls(**{**_known(cls, record), "output": str(folder)})
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / file} is missing or damaged ({error})") from error


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, then rename: a reader never sees half a file."""
    try:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:  # of a full disk it names no file
        raise OSError(f"cannot write {path}: {error}") from error


def _means(table: list[list[list[float]]]) -> list[list[float]]:
    return [[sum(items) / len(items) if items else math.nan for items in row] for row in table]


def _known(kind: type, record: dict[str, Any]) -> dict[str, Any]:
    names = {entry.name for entry in fields(kind)}
    return {name: value for name, value in record.items() if name in names}


def _without_nan(value: Any) -> Any:
    """JSON has no nan; an undefined figure becomes null."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and value != value else value

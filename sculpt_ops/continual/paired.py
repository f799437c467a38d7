"""Two methods compared over several runs: paired by task order and seed, bootstrapped over runs and test items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .metrics import RESAMPLE_SEED, RESAMPLES, Array, Estimate, draw, estimate

if TYPE_CHECKING:
    from .result import RunResult

__all__ = ["Paired", "paired"]

# What a pair of runs must have in common besides its tasks.
SETTINGS = ("model", "seed")
BY = ("answers", "options")


@dataclass(frozen=True)
class Paired:
    """Differences, method minus baseline, means over the pairs of runs. pairs: (average accuracy, backward transfer,
    learning accuracy) of each."""

    average_accuracy: Estimate
    backward_transfer: Estimate
    learning_accuracy: Estimate
    pairs: list[tuple[float, float, float]]


def paired(
    runs: Sequence[RunResult],
    baselines: Sequence[RunResult],
    resamples: int = RESAMPLES,
    seed: int = RESAMPLE_SEED,
    by: str = "answers",
) -> Paired:
    """`runs[i]` against `baselines[i]`, the same tasks in the same order with the same seed, for every i.

    Runs of different i may have the tasks in other orders: they are matched by name. One resample draws pairs of runs,
    and test items within each task, the same items for all runs, since those were measured on the same ones. So the
    interval says how far other seeds, orders and items could move the mean; of very few runs a bootstrap knows little,
    and of one pair it is over items alone.

    by: what counts as right, the greedy "answers" or the likeliest "options". They differ where a model answers one
    task with the labels of another: the answer is wrong, however well it still tells the task's own options apart.

    ValueError for no run, unequal numbers, pairs that do not fit, other items, a run cut short, or options that were
    not compared.
    """
    if by not in BY:
        raise ValueError(f"by: got {by!r}, wanted one of {', '.join(BY)}")
    if not runs or len(runs) != len(baselines):
        raise ValueError(f"baselines: got {len(baselines)} runs for {len(runs)}, wanted one for each of at least one")
    for run, baseline in zip(runs, baselines, strict=True):
        _check_pair(run, baseline)
    everyone = [*runs, *baselines]
    names = sorted(runs[0].tasks)
    items = [_items(run) for run in everyone]
    for run, theirs in zip(everyone, items, strict=True):
        if theirs != items[0]:
            raise ValueError(f"runs: {run.output} was not measured on the same items of the same tasks as the first")
    generator = np.random.default_rng(seed)
    # Per run the accuracy right after each task and after the last, (1 + resamples, runs, tasks); first as measured.
    learned, final = (np.empty((1 + resamples, len(everyone), len(names))) for _ in range(2))
    tables = [run.correct if by == "answers" else run.option_correct for run in everyone]
    for column, name in enumerate(names):
        rows = [_rows(run, table, name, by) for run, table in zip(everyone, tables, strict=True)]
        histories = np.array([row for pair in rows for row in pair], dtype=np.float64).T
        drawn = np.concatenate([histories.mean(0, keepdims=True), draw(histories, resamples, generator)])
        learned[:, :, column], final[:, :, column] = drawn[:, 0::2], drawn[:, 1::2]
    earlier = np.array([[name != run.tasks[-1] for name in names] for run in everyone])
    share = earlier / np.maximum(earlier.sum(1, keepdims=True), 1)
    transfer = ((final - learned) * share).sum(-1) if len(names) > 1 else np.full(final.shape[:2], np.nan)
    figures = (final.mean(-1), transfer, learned.mean(-1))
    differences = [table[:, : len(runs)] - table[:, len(runs) :] for table in figures]
    weights = generator.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=resamples) / len(runs)
    average, transferred, learning = (_estimate(table, weights) for table in differences)
    pairs = [(float(a), float(b), float(c)) for a, b, c in zip(*(table[0] for table in differences), strict=True)]
    return Paired(average, transferred, learning, pairs)


def _estimate(table: Array, weights: Array) -> Estimate:
    return estimate(table[0].mean(), (table[1:] * weights).sum(-1))


def _check_pair(run: RunResult, baseline: RunResult) -> None:
    if run.tasks != baseline.tasks:
        raise ValueError(f"baselines: {baseline.output} learned {baseline.tasks}, wanted the order of {run.output}")
    for setting in SETTINGS:
        ours, theirs = run.config.get(setting), baseline.config.get(setting)
        if ours != theirs:
            raise ValueError(f"baselines: {baseline.output} had {setting}={theirs}, {run.output} {ours}")
    for one in (run, baseline):
        if not one.complete:
            raise ValueError(f"{one.output}: the run stopped before the last of its {len(one.tasks)} tasks")


def _items(run: RunResult) -> set[tuple[str, int, str]]:
    last = len(run.tasks)
    return {(entry.task, entry.item, entry.answer) for entry in run.predictions if entry.row == last}


def _rows(
    run: RunResult, table: Sequence[Sequence[Sequence[float]]], name: str, by: str
) -> tuple[Sequence[float], Sequence[float]]:
    """What each item of a task scored right after that task, and after the last."""
    column = run.tasks.index(name)
    if not (table[column + 1][column] and table[-1][column]):
        raise ValueError(f"{run.output}: {name} was not measured by {by} both right after it and in the end")
    return table[column + 1][column], table[-1][column]

"""Average accuracy, backward and forward transfer, forgetting and learning accuracy, with 95 % intervals.

`accuracy` is (tasks + 1) x tasks, accuracy[i][j] the share of task j's items answered right after i tasks; row 0 is
zero-shot. Definitions as in Lopez-Paz and Ranzato, NeurIPS 2017 (arXiv 1706.08840) and Chaudhry et al., ECCV 2018
(arXiv 1801.10112), except that forgetting counts from the best accuracy ever, zero-shot and final included, and so is
never negative.

A task may be absent from a row, its entry then nan or None. Where only the tasks seen so far are measured, forgetting
counts from the best of those rows and of zero-shot, and forward transfer, which looks at tasks to come, is nan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]
Matrix: TypeAlias = Sequence[Sequence[float | None]] | Array
# correct[row][task][item]: right or not, or a score in [0, 1]; no items where a task is absent from a row.
Correct: TypeAlias = Sequence[Sequence[Sequence[float]]]
RESAMPLES = 4000
# At once: of scores every item is of a kind of its own, and 4000 times 7600 counts are 240 MB.
CHUNK = 500
RESAMPLE_SEED = 0
Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; nan where it is not defined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Metrics:
    average_accuracy: Estimate
    backward_transfer: Estimate
    forgetting: Estimate
    learning_accuracy: Estimate
    forward_transfer: Estimate


UNDEFINED = Estimate(math.nan, math.nan, math.nan)
# Figures that say nothing of a bound. per-task begins every task from the first weights: in the end only the last task
# is left. multitask has learned all tasks before the first of its rows: it has nothing to forget.
_LATER = ("backward_transfer", "forgetting", "forward_transfer")
_MEANINGLESS = {"per-task": ("average_accuracy", *_LATER), "multitask": _LATER}


def meaningful(metrics: Metrics, *methods: str | None) -> Metrics:
    """Without the figures that say nothing of one of these methods of training: they are nan."""
    names = {name for method in methods if method for name in _MEANINGLESS.get(method, ())}
    return replace(metrics, **dict.fromkeys(names, UNDEFINED))


def _matrix(accuracy: Matrix) -> Array:
    table = np.asarray(accuracy, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] != table.shape[1] + 1:
        raise ValueError(f"accuracy: got shape {table.shape}, wanted (tasks + 1) x tasks")
    return table


def average_accuracy(accuracy: Matrix) -> float:
    """Mean over all tasks of the accuracy after the last."""
    return float(_average_accuracy(_matrix(accuracy)))


def backward_transfer(accuracy: Matrix) -> float:
    """Mean over the earlier tasks of final accuracy minus accuracy right after that task; nan for a single task."""
    return float(_backward_transfer(_matrix(accuracy)))


def forgetting(accuracy: Matrix) -> float:
    """Mean over the earlier tasks of best accuracy ever minus final accuracy; nan for a single task."""
    return float(_forgetting(_matrix(accuracy)))


def learning_accuracy(accuracy: Matrix) -> float:
    """Mean over all tasks of the accuracy right after that task."""
    return float(_learning_accuracy(_matrix(accuracy)))


def forward_transfer(accuracy: Matrix) -> float:
    """Mean over the later tasks of accuracy right before that task minus zero-shot; nan for a single task."""
    return float(_forward_transfer(_matrix(accuracy)))


# These five take leading batch dimensions, so that all resamples are worked out at once.
def _average_accuracy(table: Array) -> Array:
    return np.asarray(table[..., -1, :].mean(-1))


def _backward_transfer(table: Array) -> Array:
    if table.shape[-1] == 1:
        return np.full(table.shape[:-2], math.nan)
    learned = np.diagonal(table[..., 1:, :], axis1=-2, axis2=-1)
    return np.asarray((table[..., -1, :-1] - learned[..., :-1]).mean(-1))


def _forgetting(table: Array) -> Array:
    if table.shape[-1] == 1:
        return np.full(table.shape[:-2], math.nan)
    # fmax passes over what is absent.
    best = np.fmax.reduce(table, axis=-2)
    return np.asarray((best - table[..., -1, :])[..., :-1].mean(-1))


def _learning_accuracy(table: Array) -> Array:
    return np.asarray(np.diagonal(table[..., 1:, :], axis1=-2, axis2=-1).mean(-1))


def _forward_transfer(table: Array) -> Array:
    if table.shape[-1] == 1:
        return np.full(table.shape[:-2], math.nan)
    before = np.diagonal(table, axis1=-2, axis2=-1)
    return np.asarray((before - table[..., 0, :])[..., 1:].mean(-1))


def wilson_interval(right: float, items: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, JASA 1927); sound for few items and for shares of 0 and 1."""
    if not 0 <= right <= items or items == 0:
        raise ValueError(f"right: got {right} of {items} items, wanted 0 to {items} of at least one")
    share, square = right / items, Z_95**2
    centre = (share + square / (2 * items)) / (1 + square / items)
    half = Z_95 * math.sqrt(share * (1 - share) / items + square / (4 * items**2)) / (1 + square / items)
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def resample(correct: Correct, resamples: int = RESAMPLES, seed: int = RESAMPLE_SEED) -> Array:
    """Accuracy matrices (resamples, rows, tasks) of a bootstrap over items, drawn within each task.

    An item keeps all its rows, so that differences between rows (BWT, forgetting) are paired. Items with the same
    history are interchangeable: drawing how many of each history there are is exact, and cheap for thousands of items.
    """
    generator = np.random.default_rng(seed)
    samples = np.full((resamples, len(correct), len(correct[0])), math.nan)
    for task in range(len(correct[0])):
        present = [row for row, tasks in enumerate(correct) if len(tasks[task])]
        if present:
            histories = np.array([correct[row][task] for row in present], dtype=np.float64).T
            samples[:, present, task] = draw(histories, resamples, generator)
    return samples


def draw(histories: Array, resamples: int, generator: np.random.Generator) -> Array:
    """Means (resamples, columns) of as many rows of `histories` (items, columns), drawn with replacement."""
    kinds, counts = np.unique(histories, axis=0, return_counts=True)
    means = np.empty((resamples, histories.shape[1]))
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        drawn = generator.multinomial(len(histories), counts / len(histories), size=size)
        means[start : start + size] = drawn @ kinds / len(histories)
    return means


def measure(correct: Correct) -> Metrics:
    """The five metrics, with percentile intervals of a bootstrap over items.

    The intervals say how far other items of the same tasks could move the figures; not what another seed of training
    would do. Where no item differs the interval has no width, few items or many. Forgetting is a maximum of noisy
    numbers, so its resamples lie a little high.
    """
    table = _table(correct)
    samples = resample(correct)
    return Metrics(*(estimate(metric(table), metric(samples)) for metric in _METRICS))


def difference(correct: Correct, baseline: Correct) -> Metrics:
    """The metrics of one run minus those of another on the same items, the bootstrap paired over items.

    Forgetting is nan where tasks were measured in other rows: its best accuracy is the best of those there are, and the
    more there are the higher.
    """
    sizes = [[max(map(len, items)) for items in zip(*run, strict=True)] for run in (correct, baseline)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"baseline: got {sizes[1]} items a task, wanted the same items, {sizes[0]}")
    rows = len(correct)
    both = resample([*correct, *baseline])
    tables = [_table(run) for run in (correct, baseline)]
    found = Metrics(
        *(
            estimate(metric(tables[0]) - metric(tables[1]), metric(both[:, :rows]) - metric(both[:, rows:]))
            for metric in _METRICS
        )
    )
    alike = [[[bool(len(items)) for items in row[:-1]] for row in run] for run in (correct, baseline)]
    return found if alike[0] == alike[1] else replace(found, forgetting=UNDEFINED)


_METRICS = (_average_accuracy, _backward_transfer, _forgetting, _learning_accuracy, _forward_transfer)


def _table(correct: Correct) -> Array:
    return _matrix([[sum(items) / len(items) if len(items) else None for items in row] for row in correct])


def estimate(value: Array | float, samples: Array) -> Estimate:
    """A value with the 2.5 and 97.5 % quantiles of its resamples."""
    low, high = np.quantile(samples, (0.025, 0.975))
    return Estimate(float(value), float(low), float(high))

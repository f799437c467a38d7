"""Average accuracy, backward transfer and forgetting, with 95 % intervals.

`accuracy` is (tasks + 1) x tasks, accuracy[i][j] the share of task j's items answered right after i tasks; row 0 is
zero-shot. Definitions as in Lopez-Paz and Ranzato, NeurIPS 2017 (arXiv 1706.08840) and Chaudhry et al., ECCV 2018
(arXiv 1801.10112), except that forgetting counts from the best accuracy ever, zero-shot and final included, and so is
never negative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]
Matrix: TypeAlias = Sequence[Sequence[float]] | Array
Correct: TypeAlias = Sequence[Sequence[Sequence[bool]]]
RESAMPLES = 4000
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


# These three take leading batch dimensions, so that all resamples are worked out at once.
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
    return np.asarray((table.max(-2) - table[..., -1, :])[..., :-1].mean(-1))


def wilson_interval(right: int, items: int) -> tuple[float, float]:
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
    tasks = []
    for task in range(len(correct[0])):
        histories = np.array([row[task] for row in correct], dtype=np.float64).T
        kinds, counts = np.unique(histories, axis=0, return_counts=True)
        draws = generator.multinomial(len(histories), counts / len(histories), size=resamples)
        tasks.append(draws @ kinds / len(histories))
    return np.stack(tasks, axis=-1)


def measure(correct: Correct) -> Metrics:
    """The three metrics, with percentile intervals of a bootstrap over items.

    The intervals say how far other items of the same tasks could move the figures; not what another seed of training
    would do. Where no item differs the interval has no width, few items or many. Forgetting is a maximum of noisy
    numbers, so its resamples lie a little high.
    """
    table = _matrix([[sum(items) / len(items) for items in row] for row in correct])
    samples = resample(correct)
    return Metrics(*(_estimate(metric(table), metric(samples)) for metric in _METRICS))


def difference(correct: Correct, baseline: Correct) -> Metrics:
    """The three metrics of one run minus those of another on the same items, the bootstrap paired over items."""
    sizes = [[len(items) for items in run[0]] for run in (correct, baseline)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"baseline: got {sizes[1]} items a task, wanted the same items, {sizes[0]}")
    rows = len(correct)
    both = resample([*correct, *baseline])
    tables = [_matrix([[sum(items) / len(items) for items in row] for row in run]) for run in (correct, baseline)]
    return Metrics(
        *(
            _estimate(metric(tables[0]) - metric(tables[1]), metric(both[:, :rows]) - metric(both[:, rows:]))
            for metric in _METRICS
        )
    )


_METRICS = (_average_accuracy, _backward_transfer, _forgetting)


def _estimate(value: Array, samples: Array) -> Estimate:
    low, high = np.quantile(samples, (0.025, 0.975))
    return Estimate(float(value), float(low), float(high))

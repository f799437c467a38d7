"""Methods that differ in what they train on."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ..config import TrainConfig
from ..encoding import Encoded
from .base import Method, TaskContext

__all__ = ["MultiTask", "Replay"]


class Replay(Method):
    """Plain fine-tuning on the task's rows and a share of those of each earlier task."""

    def train_rows(self, context: TaskContext) -> list[Encoded]:
        rows = list(context.rows)
        for number, task in enumerate(context.tasks[: context.index]):
            count = _replayed(context.config, len(task.train))
            # The same rows in every run of a seed, whatever else draws numbers.
            chosen = random.Random(f"{context.config.seed} {number}").sample(range(len(task.train)), count)
            rows += [task.train[row] for row in sorted(chosen)]
        return rows

    def row_count(self, config: TrainConfig, counts: Sequence[int], index: int) -> int:
        return counts[index] + sum(_replayed(config, count) for count in counts[:index])


def _replayed(config: TrainConfig, count: int) -> int:
    """Rows of an earlier task that has so many."""
    return max(1, round(config.replay_share * count))


class MultiTask(Method):
    """All tasks at once in the place of the first, nothing afterwards: an upper bound, not continual learning."""

    def train_rows(self, context: TaskContext) -> list[Encoded]:
        return [row for task in context.tasks for row in task.train] if context.index == 0 else []

    def row_count(self, config: TrainConfig, counts: Sequence[int], index: int) -> int:
        return sum(counts) if index == 0 else 0

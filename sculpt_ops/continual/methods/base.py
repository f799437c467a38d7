"""What a method of continual learning does before, in and after each task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...remember import Carried
from ...subspaces import Subspaces
from ..config import TrainConfig
from ..encoding import Encoded, EncodedTask

__all__ = ["Method", "TaskContext"]


@dataclass(frozen=True)
class TaskContext:
    """What a method is told at the `index`-th task. previous: of the task before, if it has left subspaces. text: of
    config.remember_text."""

    index: int
    tasks: Sequence[EncodedTask]
    model: Any
    collate: Callable[[list[Encoded]], dict[str, Any]]
    config: TrainConfig
    previous: Carried | None = None
    text: Sequence[Encoded] = ()

    @property
    def rows(self) -> list[Encoded]:
        """The task's own training rows."""
        return self.tasks[self.index].train


class Method:
    """Plain sequential fine-tuning; others change what differs. The same model object lasts for the whole run.

    A run that is resumed within a task calls `prepare`, `load_state` and `begin_task` as at the task's start, and loads
    the weights of the step afterwards.
    """

    def check(self, model: Any, config: TrainConfig) -> None:
        """Before anything is written or measured: ValueError for a model that it cannot work on."""

    def prepare(self, model: Any) -> None:
        """Once, with the first weights, before any task."""

    def begin_task(self, context: TaskContext) -> Subspaces | None:
        """Before the optimizer is made; the subspaces are its."""
        return None

    def train_rows(self, context: TaskContext) -> list[Encoded]:
        """What is trained on; with no rows the task is passed over."""
        return context.rows

    def row_count(self, config: TrainConfig, counts: Sequence[int], index: int) -> int:
        """How many rows `train_rows` will be of the `index`-th task, of tasks with so many training rows each."""
        return counts[index]

    def penalty(self, model: Any) -> Tensor | None:
        """Added to the loss of every optimizer step."""
        return None

    def before_step(self, optimizer: Any) -> None:
        """Right before an optimizer step, gradients clipped."""

    def after_step(self, optimizer: Any) -> None:
        """Right after an optimizer step."""

    def end_task(self, context: TaskContext) -> None:
        """After the last step, before anything is measured. The model is an ordinary one afterwards."""

    def finish(self, model: Any) -> None:
        """Once, before the model is saved."""

    def state(self) -> dict[str, Tensor]:
        """What the next task needs besides the weights."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""

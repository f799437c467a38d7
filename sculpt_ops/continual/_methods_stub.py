"""Stands in for the package of methods."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layer import check_sides
from ..ranks import Importance, Schedule
from ..remember import Carried, RememberInputs
from ..subspaces import Subspaces
from .config import TrainConfig
from .encoding import Encoded, EncodedTask
from .policies import parse_remember

IMPORTANCE_ROWS = 32


@dataclass(frozen=True)
class TaskContext:
    index: int
    tasks: Sequence[EncodedTask]
    model: Any
    collate: Callable[[list[Encoded]], dict[str, Any]]
    config: TrainConfig
    previous: Carried | None = None


class Method:
    def prepare(self, model: Any) -> None: ...
    def begin_task(self, context: TaskContext) -> Subspaces | None:
        return None

    def train_rows(self, context: TaskContext) -> list[Encoded]:
        return context.tasks[context.index].train

    def penalty(self, model: Any) -> Tensor | None:
        return None

    def before_step(self, optimizer: Any) -> None: ...
    def after_step(self, optimizer: Any) -> None: ...
    def end_task(self, context: TaskContext) -> None: ...
    def finish(self, model: Any) -> None: ...
    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None: ...


class Sculpt(Method):
    def begin_task(self, context: TaskContext) -> Subspaces | None:
        config, index = context.config, context.index
        if config.protect is None:
            return None
        batches = None
        remember = parse_remember(config.remember)
        if isinstance(config.protect, Importance) or any(isinstance(each, RememberInputs) for each in remember):
            rows = context.tasks[max(index - 1, 0)].train
            chosen = random.Random(0).sample(range(len(rows)), min(IMPORTANCE_ROWS, len(rows)))
            batches = [context.collate([rows[row]]) for row in sorted(chosen)]
        return Subspaces.from_model(
            context.model,
            protect=Schedule(index + 1, len(context.tasks)) if config.protect == "schedule" else config.protect,
            batches=batches,
            previous=context.previous,
            remember=remember,
            sides=check_sides(config.sides),
            targets=config.targets,
            others="freeze" if config.others == "freeze" else "train",
            basis_dtype=getattr(torch, config.basis_dtype),
        )


def make_method(config: TrainConfig) -> Method:
    return Sculpt()

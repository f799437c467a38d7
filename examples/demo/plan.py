"""How large the two runs may be in the time there is: pure arithmetic on measured speeds."""

from __future__ import annotations

import math
from dataclasses import dataclass

LIMIT_SECONDS = 600.0
# Planned below the limit because the speeds come from a few steps on a machine that may be busy with other things.
AIM_SECONDS = 510.0
# A run in a process of its own: imports, opening the model and saving it, 5 s on an idle machine.
START_SECONDS = 10.0
EVALUATION_SHARE = 0.25
MIN_STEPS, MIN_ITEMS = 4, 30
# Test items take turns by class, so a multiple of both 2 and 6 classes keeps every task's items balanced.
CLASSES = 6


@dataclass(frozen=True)
class Speed:
    """Seconds: one training step, what a task's first adds to it (Adam's moments are made), what protection adds to
    every step, one evaluated item, one task's decomposition."""

    step: float
    first: float
    protection: float
    item: float
    decomposition: float


@dataclass(frozen=True)
class Sizes:
    """Optimizer steps a task and evaluated items a task, the same for both runs."""

    steps: int
    items: int


def plan(speed: Speed, seconds: float, *, tasks: int, max_steps: int, max_items: int) -> Sizes:
    """The largest sizes whose two runs take at most `seconds`, a quarter of it for evaluation; never below the minimum.

    `max_steps` is one pass over the smallest task's training texts, `max_items` its test texts. What training
    cannot use goes to evaluation.
    """
    left = max(seconds - 2 * START_SECONDS - tasks * (2 * speed.first + speed.decomposition), 0.0)
    step_cost = tasks * (2 * speed.step + speed.protection)
    # The protected run takes over the plain one's answers before the first task.
    item_cost = tasks * (2 * tasks + 1) * speed.item
    steps = _clamp((1 - EVALUATION_SHARE) * left / step_cost, MIN_STEPS, max_steps)
    items = _clamp((left - steps * step_cost) / item_cost, MIN_ITEMS, max_items)
    return Sizes(steps, items // CLASSES * CLASSES)


def plan_second(speed: Speed, seconds: float, sizes: Sizes, *, tasks: int) -> Sizes:
    """The protected run's sizes when the plain one has shown its real speed: as many steps, as many items as still fit.

    Steps are never taken away: the two runs must have learned from the same texts.
    """
    rest = seconds - run_seconds(speed, Sizes(sizes.steps, 0), tasks=tasks, protected=True)
    items = _clamp(rest / (tasks * tasks * speed.item), MIN_ITEMS, sizes.items)
    return Sizes(sizes.steps, items // CLASSES * CLASSES)


def run_seconds(speed: Speed, sizes: Sizes, *, tasks: int, protected: bool) -> float:
    """Predicted seconds of the plain run, which also evaluates before the first task, or of the protected one."""
    training = speed.first + sizes.steps * speed.step
    evaluations = tasks + 1
    if protected:
        training += speed.decomposition + sizes.steps * speed.protection
        evaluations = tasks
    return START_SECONDS + tasks * (training + evaluations * sizes.items * speed.item)


def _clamp(value: float, low: int, high: int) -> int:
    return max(low, min(high, math.floor(value)))

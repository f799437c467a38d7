"""Methods that take weights back: towards those before the task, or to the first ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...subspaces import Subspaces
from .base import Method, TaskContext

__all__ = ["Interpolate", "PerTask"]


def _copies(model: Any) -> dict[str, Tensor]:
    """Weights on the CPU, by name."""
    return {name: weight.detach().to("cpu", copy=True) for name, weight in model.named_parameters()}


class Interpolate(Method):
    """After each task W = W_start + a (W - W_start), a being config.interpolation (Wortsman et al., arXiv 2109.01903,
    applied task by task)."""

    def __init__(self) -> None:
        self._start: dict[str, Tensor] = {}

    def begin_task(self, context: TaskContext) -> Subspaces | None:
        self._start = _copies(context.model)
        return None

    @torch.no_grad()
    def end_task(self, context: TaskContext) -> None:
        for name, weight in context.model.named_parameters():
            start = self._start[name].to(weight.device)
            weight.copy_(torch.lerp(start, weight, context.config.interpolation))
        self._start = {}


class PerTask(Method):
    """Every task from the first weights: what one task alone can reach, with nothing kept of the others."""

    def __init__(self) -> None:
        self._first: dict[str, Tensor] = {}

    def prepare(self, model: Any) -> None:
        self._first = _copies(model)

    @torch.no_grad()
    def begin_task(self, context: TaskContext) -> Subspaces | None:
        for name, weight in context.model.named_parameters():
            weight.copy_(self._first[name])
        return None

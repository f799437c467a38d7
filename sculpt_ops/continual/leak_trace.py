"""The leak of one task's subspaces while it is learned."""

from __future__ import annotations

import math
import statistics
import time

from ..leak import LayerLeak
from ..subspaces import Subspaces

__all__ = ["LeakTrace"]

POINTS = 10


class LeakTrace:
    """Measures `Subspaces.leak()` every few optimizer steps and after the last.

    subspaces: None for plain fine-tuning, which has nothing to measure.
    every: optimizer steps from one measurement to the next; None takes about ten of them in `steps`, 0 none before the
        last step.
    points: (step, median over the protected weights of the leak's share `LayerLeak.total`, the largest).
    last: the last measurement by name of the weight.
    seconds: spent measuring.
    """

    def __init__(self, subspaces: Subspaces | None, every: int | None, steps: int) -> None:
        self.every = max(math.ceil(steps / POINTS), 1) if every is None else every
        self.points: list[tuple[int, float, float]] = []
        self.last: dict[str, LayerLeak] = {}
        self.seconds = 0.0
        self._subspaces = subspaces
        self._protected = [name for name, layer in (subspaces or {}).items() if layer.protects]

    def on_step(self, step: int) -> None:
        """To be called after the `step`-th optimizer step, counted from 1."""
        if self.every and step % self.every == 0:
            self._measure(step)

    def finish(self, step: int) -> None:
        """To be called once, after the last step."""
        if not self.points or self.points[-1][0] != step:
            self._measure(step)

    def _measure(self, step: int) -> None:
        if self._subspaces is None:
            return
        start = time.perf_counter()
        self.last = self._subspaces.leak()
        # A schedule's first task protects nothing: there is no share to follow then.
        if shares := [self.last[name].total for name in self._protected]:
            self.points.append((step, statistics.median(shares), max(shares)))
        self.seconds += time.perf_counter() - start

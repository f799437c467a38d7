"""Times several calls in turn, round by round, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

# Threads of a library go on spinning after its call (OpenBLAS, behind scikit-learn and scipy, for some 30 ms) and would
# take the next one's cores.
PAUSE = 0.05


@dataclass
class Competitor:
    """One call to time, and what became of it.

    prepare: run before each call, untimed; what it returns is the call's argument.
    warm: run once before all rounds: first-call costs, and whether the package is there at all (ImportError).
    rounds: takes part in the first so many rounds only, where it is much slower than the rest.
    result: what the last call returned. note: why there is no time.
    """

    name: str
    call: Callable[..., Any]
    prepare: Callable[[], Any] | None = None
    warm: Callable[[], Any] | None = None
    rounds: int | None = None
    seconds: list[float] = field(default_factory=list)
    result: Any = None
    note: str = ""

    def attempt(self, action: Callable[[], Any]) -> None:
        """A competitor that fails is a row of the table, not the end of it."""
        try:
            action()
        except ImportError as error:
            self.note = f"not installed: {error}"
        except Exception as error:
            self.note = f"failed: {type(error).__name__}: {error}".splitlines()[0]

    def arguments(self) -> tuple[Any, ...]:
        self.result = None  # freed here, outside what is timed
        return () if self.prepare is None else (self.prepare(),)

    def run(self, *arguments: Any) -> None:
        self.result = self.call(*arguments)

    def timed(self) -> None:
        arguments = self.arguments()
        time.sleep(PAUSE)
        begin = time.perf_counter()
        self.run(*arguments)
        self.seconds.append(time.perf_counter() - begin)


def interleave(benchmark: Any, ours: Competitor, others: Sequence[Competitor], rounds: int) -> list[dict[str, Any]]:
    """Every round times each of `others` once, then ours; pytest-benchmark times ours, its untimed setup the others.

    Returns one entry a competitor, ours first: median and quartiles in ms, and of the ratio theirs / ours of the same
    round. Above 1 ours is faster.
    """
    if ours.warm is not None:
        ours.warm()
    for other in others:
        if other.warm is not None:
            other.attempt(other.warm)

    def before() -> tuple[tuple[Any, ...], dict[str, Any]]:
        for other in others:
            if not other.note and len(other.seconds) < (other.rounds or rounds):
                other.attempt(other.timed)
        arguments = ours.arguments()
        time.sleep(PAUSE)
        return arguments, {}

    benchmark.pedantic(ours.run, setup=before, rounds=rounds)
    ours.seconds = list(benchmark.stats.stats.data)
    return [summary(competitor, ours) for competitor in (ours, *others)]


def summary(competitor: Competitor, ours: Competitor) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": competitor.name}
    if competitor.note:
        return entry | {"note": competitor.note}
    ratios = [theirs / mine for theirs, mine in zip(competitor.seconds, ours.seconds, strict=False)]
    for key, values in (("ms", [second * 1e3 for second in competitor.seconds]), ("ratio", ratios)):
        low, middle, high = statistics.quantiles(values, n=4)
        entry |= {key: middle, f"{key}_low": low, f"{key}_high": high}
    return entry | {"rounds": len(competitor.seconds)}

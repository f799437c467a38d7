"""Progress with the time left: bars on a terminal, sparse lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Reports to standard error, so that standard output stays the command's own."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.on_terminal = not quiet and sys.stderr.isatty()

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """Yields a function that takes the number of units done since its last call."""
        if self.quiet:
            yield lambda units: None
        elif self.on_terminal:
            with _rich_bar(label, total) as advance:
                yield advance
        else:
            yield _lines(label, total)

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)


@contextmanager
def _rich_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as bars:
        bar = bars.add_task(label, total=total)
        yield lambda units: bars.advance(bar, units)


def _lines(label: str, total: int) -> Callable[[int], None]:
    start = last = time.monotonic()
    done = 0

    def advance(units: int) -> None:
        nonlocal done, last
        done += units
        now = time.monotonic()
        if done >= total or now - last >= SECONDS_BETWEEN_LINES:
            last = now
            left = (now - start) / done * (total - done)
            rest = f"{left:.0f} s left" if done < total else f"{now - start:.1f} s"
            print(f"{label}: {done}/{total}, {rest}", file=sys.stderr, flush=True)

    return advance

"""A table of measurements: how its rows are printed, and the results file they go to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """file: the results file is FILE-DATE.json. show: the printed lines of a row. packages: the distributions, beside
    torch, whose versions belong to the results."""

    file: str
    show: Callable[[Row], list[str]]
    heading: str = ""
    packages: tuple[str, ...] = ()

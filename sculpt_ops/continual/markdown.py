"""Figures and tables as the report writes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .metrics import Estimate

__all__ = ["gibibytes", "largest", "percent", "plain", "seconds_text", "table"]


def plain(value: Any) -> str:
    return "-" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def percent(estimate: Estimate, signed: bool = False) -> str:
    if estimate.value != estimate.value:
        return "-"
    sign = "+" if signed else ""
    value, low, high = (f"{100 * number + 0.0:{sign}.1f}" for number in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low} to {high})"


def seconds_text(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3g}"


def gibibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f}"


def largest(values: Iterable[float]) -> str:
    largest = max(values, default=None)
    return "-" if largest is None else f"{largest:.1e}"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], f"|{'---|' * len(cells[0])}", *lines[1:]])

"""What the demo prints: the leak table, both accuracy matrices side by side, and the figures drawn from them."""

from __future__ import annotations

from collections.abc import Sequence

from leak import LeakTable
from rich import box
from rich.table import Table

from sculpt_ops.continual import RunResult
from sculpt_ops.continual.metrics import Estimate, difference


def leak_view(table: LeakTable) -> Table:
    view = _table("weight change in the protected space")
    for heading in ("left\nmedian", "left\nmaximum", "right\nmedian", "right\nmaximum"):
        view.add_column(heading, justify="right")
    for row in table.rows:
        view.add_row(row.method, *(f"{100 * share:.2g} %" for share in row.figures()))
    return view


def accuracy_view(results: Sequence[RunResult]) -> Table:
    """Rows are moments, columns tasks, a block of columns for each run; what was just learned stands out."""
    tasks = results[0].tasks
    view = _table("accuracy, %")
    for result, colour in zip(results, ("bold yellow", "bold magenta"), strict=True):
        for task in tasks:
            view.add_column(f"{result.name}\n{task}", justify="right", header_style=colour)
    for row, moment in enumerate(["at the start", *(f"after {task}" for task in tasks)]):
        cells = []
        for result in results:
            for column, share in enumerate(result.accuracy[row]):
                cells.append(f"[bold green]{100 * share:.1f}[/]" if column == row - 1 else f"{100 * share:.1f}")
        view.add_row(moment, *cells)
    return view


def metrics_view(plain: RunResult, protected: RunResult) -> Table:
    view = _table("with 95 % intervals")
    for heading in (plain.name, protected.name, "difference"):
        view.add_column(heading, justify="right")
    change = difference(protected.correct, plain.correct)
    for label, metric, signed in (
        ("average accuracy (AA), %", "average_accuracy", False),
        ("backward transfer (BWT), points", "backward_transfer", True),
        ("forgetting, points", "forgetting", False),
    ):
        values = [_estimate(getattr(result.metrics, metric), signed) for result in (plain, protected)]
        view.add_row(label, *values, _estimate(getattr(change, metric), True))
    seconds = [result.seconds_per_step or 0.0 for result in (plain, protected)]
    gibibytes = [(result.peak_memory_bytes or 0) / 2**30 for result in (plain, protected)]
    view.add_row("seconds a step (median)", *(f"{value:.2f}" for value in seconds), _ratio(seconds))
    view.add_row("peak memory, GiB", *(f"{value:.2f}" for value in gibibytes), _ratio(gibibytes))
    return view


def _table(corner: str) -> Table:
    view = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    view.add_column(corner, max_width=26)
    return view


def _estimate(estimate: Estimate, signed: bool) -> str:
    sign = "+" if signed else ""
    value, low, high = (f"{100 * number + 0.0:{sign}.1f}" for number in (estimate.value, estimate.low, estimate.high))
    return f"{value}\n[dim]{low} to {high}[/]"


def _ratio(values: Sequence[float]) -> str:
    return f"x {values[1] / values[0]:.2f}" if values[0] else "-"

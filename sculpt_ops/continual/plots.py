"""The report's pictures, drawn without a display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import replacing
from .metrics import meaningful, measure
from .result import RunResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from torch import Tensor

# Okabe and Ito's colours, told apart by colour-blind readers and, with the markers, in grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, FAINT, OUTLINE = "#222222", "#888888", "#D55E00"


def draw_accuracy(results: Sequence[RunResult], names: Sequence[str], path: Path) -> None:
    """Heat maps of accuracy, one a method: rows are moments, columns tasks, the outlined cells just learned."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    tasks = max(len(result.tasks) for result in results)
    columns = min(len(results), 3 if tasks <= 6 else 2 if tasks <= 9 else 1)
    rows = -(-len(results) // columns)
    width, height = max(0.72 * tasks, 2.6), 0.46 * (tasks + 1)
    figure = Figure(figsize=(width * columns + 2.6, (height + 1.5) * rows + 0.2), layout="constrained", dpi=150)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(results) :]:
        axes.set_visible(False)
    for index, (result, name) in enumerate(zip(results, names, strict=True)):
        image = _heat_map(grid.flat[index], result, name, with_rows=index % columns == 0)
    bar = figure.colorbar(
        image, ax=list(grid.flat), shrink=0.8 / rows, aspect=25, pad=0.015, anchor=(0.0, 0.5 if rows == 1 else 1.0)
    )
    bar.set_label("accuracy, %", color=INK, fontsize=9)
    bar.ax.tick_params(labelsize=8, color=FAINT)
    bar.outline.set_visible(False)
    learned = Patch(fill=False, edgecolor=OUTLINE, linewidth=1.6, label="just learned")
    figure.legend(handles=[learned], loc="outside lower left", frameon=False, fontsize=9)
    _save(figure, path)


def _heat_map(axes: Axes, result: RunResult, name: str, with_rows: bool) -> AxesImage:
    from matplotlib.patches import Rectangle

    table = [[100 * share for share in row] for row in result.accuracy]
    axes.set_facecolor("#EEEEEE")  # Of what was not measured.
    image = axes.imshow(table, cmap="YlGnBu", vmin=0, vmax=100, aspect="auto")
    for row, shares in enumerate(table):
        for column, share in enumerate(shares):
            if share != share:
                continue
            ink = "white" if share > 60 else INK
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=9, color=ink)
    for task in range(len(result.tasks)):
        axes.add_patch(Rectangle((task - 0.46, task + 0.54), 0.92, 0.92, fill=False, edgecolor=OUTLINE, linewidth=1.6))
    axes.set_xticks(range(len(result.tasks)), result.tasks, rotation=35, ha="right", rotation_mode="anchor", fontsize=9)
    labels = ["zero-shot", *(f"after {task}" for task in result.tasks)]
    axes.set_yticks(range(len(labels)), labels if with_rows else [""] * len(labels), fontsize=9)
    axes.set_title(name, fontsize=11, color=INK, loc="left")
    axes.tick_params(length=0, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def draw_curves(results: Sequence[RunResult], names: Sequence[str], path: Path) -> None:
    """Mean accuracy and forgetting over the tasks learned so far, after each task, with 95 % intervals.

    For two tasks or more: before the second there is nothing to forget.
    """
    from matplotlib.figure import Figure

    tasks = results[0].tasks
    rows, columns = (1, 2) if len(tasks) <= 8 else (2, 1)
    width = max(4.2, 0.55 * len(tasks) + 2.2)
    figure = Figure(figsize=(width * columns, 3.6 * rows + 0.3), layout="constrained", dpi=150)
    accuracy, forgetting = figure.subplots(rows, columns).flat
    for index, (result, name) in enumerate(zip(results, names, strict=True)):
        method = result.config.get("method")
        after = [
            meaningful(measure([row[:i] for row in result.correct[: i + 1]]), method)
            for i in range(1, len(result.tasks) + 1)
        ]
        shift = 0.09 * (index - (len(results) - 1) / 2)
        for axes, estimates in (
            (accuracy, [metrics.average_accuracy for metrics in after]),
            (forgetting, [metrics.forgetting for metrics in after]),
        ):
            defined = [(task, e) for task, e in enumerate(estimates) if e.value == e.value]
            axes.errorbar(
                [task + shift for task, _ in defined],
                [100 * e.value for _, e in defined],
                # The percentile interval of a maximum can lie wholly above its estimate.
                yerr=[
                    [100 * max(e.value - e.low, 0) for _, e in defined],
                    [100 * max(e.high - e.value, 0) for _, e in defined],
                ],
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                markersize=5.5,
                linewidth=1.8,
                elinewidth=1.1,
                capsize=2.5,
                label=name,
            )
    _style(accuracy, "Accuracy, mean over the tasks learned so far", "accuracy, %", tasks)
    _style(forgetting, "Forgetting, mean over the earlier tasks", "points below the best accuracy so far", tasks)
    accuracy.set_ylim(0, 100)
    handles, labels = accuracy.get_legend_handles_labels()
    if len(results) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    _save(figure, path)


def draw_tradeoff(results: Sequence[RunResult], names: Sequence[str], path: Path) -> None:
    """Average accuracy over learning accuracy, a point a run with its 95 % intervals, runs of the same name alike. On
    the line nothing is forgotten. A run whose average accuracy says nothing has no point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.6), layout="constrained", dpi=150)
    axes = figure.subplots()
    kinds = list(dict.fromkeys(names))
    for index, (result, name) in enumerate(zip(results, names, strict=True)):
        values, kind = result.metrics, kinds.index(name)
        across, up = values.learning_accuracy, values.average_accuracy
        if math.isnan(up.value):
            continue
        axes.errorbar(
            100 * across.value,
            100 * up.value,
            xerr=[[100 * max(across.value - across.low, 0)], [100 * max(across.high - across.value, 0)]],
            yerr=[[100 * max(up.value - up.low, 0)], [100 * max(up.high - up.value, 0)]],
            color=COLOURS[kind % len(COLOURS)],
            marker=MARKERS[(kind + kind // len(COLOURS)) % len(MARKERS)],
            markersize=6,
            elinewidth=0.9,
            linestyle="none",
            label=name if names.index(name) == index else None,
        )
    # Has no part in the limits: one run that forgot everything would else squeeze all others into a corner.
    limits = axes.get_xlim(), axes.get_ylim()
    axes.axline((50.0, 50.0), slope=1.0, color=FAINT, linewidth=1.0, zorder=0)
    axes.set(xlim=limits[0], ylim=limits[1])
    _frame(axes, "What is learned, and what of it is left", "average accuracy after the last task, %")
    axes.set_xlabel("learning accuracy, %: right after each task", fontsize=9, color=INK)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    _save(figure, path)


def draw_leak(results: Sequence[RunResult], names: Sequence[str], path: Path) -> None:
    """Leak over the optimizer steps, a panel a task: the median weight drawn through, the largest dashed.

    Methods keep the colour and marker they have in the other pictures; one that protects nothing has no line.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    tasks = results[0].tasks
    columns = min(len(tasks), 4)
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(max(2.9 * columns, 4.6), 2.5 * rows + 0.7), layout="constrained", dpi=150)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes in grid.flat[len(tasks) :]:
        axes.set_visible(False)
    shown = {}
    for task, axes in enumerate(grid.flat[: len(tasks)]):
        for index, (result, name) in enumerate(zip(results, names, strict=True)):
            # A leak of exactly 0 has no place on a logarithmic axis.
            points = [point for point in result.learned[task].leak_over_time if all(point)]
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            for column, line in ((1, "-"), (2, "--")):
                axes.plot(
                    [point[0] for point in points],
                    [point[column] for point in points],
                    color=colour,
                    linestyle=line,
                    linewidth=1.8 if column == 1 else 1.2,
                    marker=marker,
                    markersize=4 if column == 1 else 3,
                )
            if points:
                shown[name] = Line2D([], [], color=colour, marker=marker, markersize=4, linewidth=1.8)
        axes.set_yscale("log")
        axes.set_xlim(left=0)
        axes.set_xlabel("optimizer steps", fontsize=9, color=INK)
        _frame(axes, tasks[task], "leak, share of the change" if task % columns == 0 else "")
    kinds = {
        "median weight": Line2D([], [], color=INK, linewidth=1.8),
        "largest": Line2D([], [], color=INK, linewidth=1.2, linestyle="--"),
    }
    entries = {**kinds, **(shown if len(results) > 1 else {})}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    _save(figure, path)


def draw_spectra(kinds: Mapping[str, Sequence[Tensor]], path: Path) -> None:
    """Singular values over the largest, a panel for every kind of weight, a line a layer: dark the first."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    columns = min(len(kinds), 4)
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(max(2.7 * columns, 4.0), 2.3 * rows + 0.3), layout="constrained", dpi=150)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(kinds) :]:
        axes.set_visible(False)
    for panel, (axes, (kind, spectra)) in enumerate(zip(grid.flat, kinds.items(), strict=False)):
        for layer, values in enumerate(spectra):
            shown = values[values > 0] / values[0]
            colour = colormaps["viridis"](0.9 * layer / max(len(spectra) - 1, 1))
            axes.plot([100 * i / len(values) for i in range(len(shown))], shown.tolist(), color=colour, linewidth=0.7)
        axes.set_yscale("log")
        axes.set_ylim(1e-4, 1.2)
        _frame(axes, _short(kind), "value / largest" if panel % columns == 0 else "")
        if panel >= len(kinds) - columns:
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("% of the directions", fontsize=9, color=INK)
    _save(figure, path)


def draw_energies(energies: Mapping[float, Mapping[str, Sequence[float]]], path: Path) -> None:
    """The share of the squared singular values in the top directions, over the layers; a panel for every share of the
    directions, a line for every kind of weight."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(energies) + 0.4, 3.8), layout="constrained", dpi=150)
    panels = figure.subplots(1, len(energies), sharey=True, squeeze=False)
    palette = (*COLOURS, INK)
    for index, (axes, (share, kinds)) in enumerate(zip(panels.flat, energies.items(), strict=True)):
        for number, (kind, held) in enumerate(kinds.items()):
            axes.plot(
                range(len(held)),
                [100 * value for value in held],
                color=palette[number % len(palette)],
                linewidth=1.4,
                linestyle=("-", "--", ":")[number // len(palette) % 3],
                label=_short(kind),
            )
        _frame(axes, f"top {100 * share:g} % of the directions", "energy held, %" if index == 0 else "")
        axes.set_xlabel("layer", fontsize=9, color=INK)
        axes.set_ylim(0, 100)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    _save(figure, path)


def _short(kind: str) -> str:
    """The last two parts of a weight's name that say something."""
    parts = [part for part in kind.split(".") if part not in ("weight", "*")]
    return ".".join(parts[-2:])


def _style(axes: Axes, title: str, unit: str, tasks: Sequence[str]) -> None:
    _frame(axes, title, unit)
    axes.set_xlim(-0.4, len(tasks) - 0.6)
    axes.set_ylim(bottom=0)
    labels = [f"after {tasks[0]}", *(f"+ {task}" for task in tasks[1:])]
    axes.set_xticks(range(len(tasks)), labels, rotation=35, ha="right", rotation_mode="anchor", fontsize=9)


def _frame(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=10.5, color=INK, loc="left")
    axes.set_ylabel(unit, fontsize=9, color=INK)
    axes.tick_params(color=FAINT, labelcolor=INK, labelsize=9)
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")

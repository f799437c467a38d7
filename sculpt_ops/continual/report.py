"""report.md and its pictures: one or several methods side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..names import group_names
from .metrics import Estimate, Metrics, difference, wilson_interval
from .plots import draw_accuracy, draw_curves, draw_leak
from .result import RunResult, write_text

__all__ = ["write_report"]

REPORT_FILE, ACCURACY_FILE, CURVES_FILE, LEAK_FILE = "report.md", "accuracy.png", "curves.png", "leak.png"
# Not settings of the method: said elsewhere in the report, or where the files lie.
LEFT_OUT = ("name", "tasks", "order", "output", "model")


def write_report(results: Sequence[RunResult], folder: str | Path) -> Path:
    """Write report.md, accuracy.png, for two tasks or more curves.png and, where the leak was followed, leak.png into
    `folder`; returns report.md's path.

    Several results are compared, the first being the baseline; ValueError unless they are of the same tasks in the same
    order and all came to their end.
    """
    if not results:
        raise ValueError("results: got none, wanted at least one run")
    for result in results:
        if result.tasks != results[0].tasks:
            raise ValueError(
                f"results: {result.output} learned {', '.join(result.tasks)}; "
                f"{results[0].output} learned {', '.join(results[0].tasks)}: one report needs the same tasks"
            )
    names = _names(results)
    metrics = [result.metrics for result in results]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    draw_accuracy(results, names, folder / ACCURACY_FILE)
    several = len(results[0].tasks) > 1
    if several:
        draw_curves(results, names, folder / CURVES_FILE)
    followed = any(task.leak_over_time for result in results for task in result.learned)
    if followed:
        draw_leak(results, names, folder / LEAK_FILE)
    sections = [
        _head(results),
        _summary(results, names, metrics),
        _differences(results, names),
        f"![Accuracy and forgetting after each task]({CURVES_FILE})" if several else "",
        f"![Accuracy on every task after each task]({ACCURACY_FILE})",
        *(_accuracies(result, name) for result, name in zip(results, names, strict=True)),
        *(_protection(result, name) for result, name in zip(results, names, strict=True) if result.learned[0].layers),
        _leak_over_time(results) if followed else "",
        _tasks(results[0]),
        _settings(results, names),
    ]
    write_text(folder / REPORT_FILE, "\n\n".join(section for section in sections if section) + "\n")
    return folder / REPORT_FILE


def _names(results: Sequence[RunResult]) -> list[str]:
    """The runs' names, with the folder where two are called the same."""
    names = [result.name for result in results]
    return [
        f"{name} ({Path(result.output).name})" if names.count(name) > 1 else name
        for name, result in zip(names, results, strict=True)
    ]


def _head(results: Sequence[RunResult]) -> str:
    first = results[0]
    models = sorted({Path(result.config["model"]).name for result in results})
    seeds = sorted({result.config["seed"] for result in results})
    lines = [
        "# Continual fine-tuning report",
        f"Model {', '.join(models)}; tasks in the order learned: {', '.join(first.tasks)}.",
    ]
    if len(seeds) == 1:
        lines.append(
            f"**One seed** ({seeds[0]}). Intervals are 95 % over test items: how far other items of the same tasks "
            "could move a figure. Another seed of training can move it further."
        )
    else:
        lines.append(f"Seeds {', '.join(map(str, seeds))}. Intervals are 95 % over test items, within one run.")
    lines += sorted({note for result in results for note in result.notes})
    return "\n\n".join(lines)


def _summary(results: Sequence[RunResult], names: Sequence[str], metrics: Sequence[Metrics]) -> str:
    rows = []
    for result, name, values in zip(results, names, metrics, strict=True):
        leaks = [leak for task in result.learned for leak in task.leak.values()]
        rows.append(
            (
                name,
                _percent(values.average_accuracy),
                _percent(values.backward_transfer, signed=True),
                _percent(values.forgetting),
                _seconds(result.seconds_per_step),
                _gibibytes(result.peak_memory_bytes),
                f"{max(leaks):.1e}" if leaks else "-",
                _seconds(sum(task.derive_seconds for task in result.learned) if leaks else None),
            )
        )
    header = ("method", "average accuracy, %", "backward transfer, points", "forgetting, points")
    cost = ("s / step", "peak memory, GiB", "largest leak", "deriving, s")
    explained = (
        "An interval without width says that no measured item differed, not that the figure is certain. "
        "Average accuracy: mean over all tasks after the last. Backward transfer: mean over the earlier tasks of final "
        "accuracy minus accuracy right after learning. Forgetting: mean over the earlier tasks of best accuracy ever "
        "minus final accuracy. Seconds per optimizer step: median, without evaluation. Peak memory: while deriving and "
        "training. Leak: share of a weight's change that lies in its protected space (from a sketch, to 18 %), the "
        "worst of all weights and tasks; the rounding of the weights themselves is part of it, and the larger the "
        "smaller the change."
    )
    return f"## Result\n\n{_table((*header, *cost), rows)}\n\n{explained}"


def _differences(results: Sequence[RunResult], names: Sequence[str]) -> str:
    """Paired differences from the first run, where the runs were measured on the same items."""
    items = [sorted({(p.task, p.item, p.answer) for p in result.predictions}) for result in results]
    others = [index for index in range(1, len(results)) if items[index] == items[0]]
    if not others:
        return ""
    rows = []
    for index in others:
        values = difference(results[index].correct, results[0].correct)
        estimates = (values.average_accuracy, values.backward_transfer, values.forgetting)
        rows.append((names[index], *(_percent(estimate, signed=True) for estimate in estimates)))
    table = _table(("method", "average accuracy", "backward transfer", "forgetting"), rows)
    return f"### Difference from {names[0]}, in points, paired over the same items\n\n{table}"


def _accuracies(result: RunResult, name: str) -> str:
    accuracy, last = result.accuracy, len(result.tasks)
    labels = ["zero-shot", *(f"after {task}" for task in result.tasks)]
    rows = [
        (labels[row], *(f"{100 * share:.1f}" if share == share else "-" for share in accuracy[row]))
        for row in range(last + 1)
    ]
    final = [wilson_interval(sum(items), len(items)) for items in result.correct[last]]
    rows.append(("95 % interval at the end", *(f"{100 * low:.1f} to {100 * high:.1f}" for low, high in final)))
    rows.append(("items", *(str(len(items)) for items in result.correct[last])))
    return f"### Accuracy of {name}, %\n\n{_table(('', *result.tasks), rows)}"


def _protection(result: RunResult, name: str) -> str:
    """Rank, energy and leak by kind of weight, over all layers and tasks."""
    rows = []
    for pattern, weights in group_names(result.learned[0].layers).items():
        layers = [task.layers[weight] for task in result.learned for weight in weights]
        shapes = sorted({f"{m} x {n}" for m, n in (layer["shape"] for layer in layers)})
        ranks = _range([layer["rank"] for layer in layers], "d")
        energies = _range([100 * layer["energy"] for layer in layers], ".1f")
        leaks = (
            _largest(side[weight] for side in sides for weight in weights if weight in side)
            for sides in zip(*((task.leak, task.leak_left, task.leak_right) for task in result.learned), strict=True)
        )
        rows.append((f"`{pattern}`", ", ".join(shapes), ranks, energies, *leaks))
    header = ("weights", "shape", "protected rank", "energy protected, %", "largest leak", "left side", "right side")
    return f"### Protected in {name}, over all tasks\n\n{_table(header, rows)}"


def _leak_over_time(results: Sequence[RunResult]) -> str:
    tasks = [task for result in results for task in result.learned if task.leak_over_time]
    spent = sum(task.leak_seconds for task in tasks)
    trained = sum(task.train_seconds for task in tasks) - spent
    explained = (
        "Leak of the weights since the start of their task: the median of all protected weights and the largest. Where "
        "the promise holds, what is left is the rounding of the weights, for bfloat16 ones up to 2^-9 of a weight. "
        f"Measuring took {_seconds(spent)} s beside {_seconds(trained)} s of training, and is not part of the seconds "
        "per step."
    )
    return f"## Leak over time\n\n![Leak over the optimizer steps of each task]({LEAK_FILE})\n\n{explained}"


def _tasks(result: RunResult) -> str:
    rows = [(t.name, str(t.train_items), str(t.test_items), str(t.steps), t.note or "") for t in result.learned]
    return f"## Tasks\n\n{_table(('task', 'training rows', 'items measured', 'steps', 'note'), rows)}"


def _settings(results: Sequence[RunResult], names: Sequence[str]) -> str:
    """Every setting and version, once where all runs agree."""
    columns = [{**result.config, **result.versions} for result in results]
    keys = [key for key in dict.fromkeys(key for column in columns for key in column) if key not in LEFT_OUT]
    rows = []
    for key in keys:
        values = [_value(column.get(key)) for column in columns]
        rows.append((key, *(values if len(set(values)) > 1 else [values[0]] + ["same"] * (len(values) - 1))))
    return f"## Settings and versions\n\n{_table(('', *names), rows)}"


def _value(value: Any) -> str:
    return "-" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _percent(estimate: Estimate, signed: bool = False) -> str:
    if estimate.value != estimate.value:
        return "-"
    sign = "+" if signed else ""
    value, low, high = (f"{100 * number + 0.0:{sign}.1f}" for number in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low} to {high})"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3g}"


def _gibibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f}"


def _largest(values: Iterable[float]) -> str:
    largest = max(values, default=None)
    return "-" if largest is None else f"{largest:.1e}"


def _range(values: Sequence[float], style: str) -> str:
    low, high = f"{min(values):{style}}", f"{max(values):{style}}"
    return low if low == high else f"{low} to {high}"


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], f"|{'---|' * len(cells[0])}", *lines[1:]])

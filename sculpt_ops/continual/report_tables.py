"""The report's tables of one run each: accuracies, answers, what is protected, tasks, settings."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from ..names import group_names
from ..summary import span
from .markdown import largest, plain, table
from .metrics import wilson_interval
from .result import RunResult
from .score import macro_f1

__all__ = [
    "abilities",
    "accuracies",
    "answers",
    "growth",
    "protection",
    "remembered",
    "remembered_earlier",
    "settings_table",
    "tasks_table",
]

# Not settings of the method: said elsewhere in the report, or where the files lie.
LEFT_OUT = ("name", "tasks", "order", "output", "model")


def accuracies(result: RunResult, name: str) -> str:
    accuracy, last = result.accuracy, len(result.tasks)
    labels = ["zero-shot", *(f"after {task}" for task in result.tasks)]
    rows = [
        (labels[row], *(f"{100 * share:.1f}" if share == share else "-" for share in accuracy[row]))
        for row in range(last + 1)
    ]
    final = [wilson_interval(sum(items), len(items)) for items in result.correct[last]]
    rows.append(("95 % interval at the end", *(f"{100 * low:.1f} to {100 * high:.1f}" for low, high in final)))
    rows.append(("items", *(str(len(items)) for items in result.correct[last])))
    return f"### Accuracy of {name}, %\n\n{table(('', *result.tasks), rows)}"


def answers(results: Sequence[RunResult], names: Sequence[str]) -> str:
    """Of tasks with options, after the last task: greedy answers, likeliest options, macro-F1, the majority's rate."""
    rows = []
    for result, name in zip(results, names, strict=True):
        last, options = len(result.tasks), result.option_accuracy
        for column, task in enumerate(result.learned):
            given = [entry for entry in result.predictions if entry.row == last and entry.task == task.name]
            if task.majority is None or not given:
                continue
            likeliest = options[last][column] if last < len(options) else float("nan")
            rows.append(
                (
                    name,
                    task.name,
                    f"{100 * result.accuracy[last][column]:.1f}",
                    f"{100 * likeliest:.1f}" if likeliest == likeliest else "-",
                    f"{100 * macro_f1([entry.answer for entry in given], [entry.prediction for entry in given]):.1f}",
                    f"{100 * task.majority:.1f}",
                )
            )
    if not rows:
        return ""
    explained = (
        "Greedy: the whole answer as generated. Likeliest option: by the summed log-probability of its tokens and the "
        "end of the answer. Macro-F1: of the greedy answers. Majority: the most frequent training answer, always."
    )
    header = ("method", "task", "greedy", "likeliest option", "macro-F1", "majority")
    return f"### Answers after the last task, %\n\n{table(header, rows)}\n\n{explained}"


def abilities(results: Sequence[RunResult], names: Sequence[str]) -> str:
    """What the models can do besides, before the first task and after the last."""
    rows = []
    for result, name in zip(results, names, strict=True):
        before, after = result.ability.get("before", {}), result.ability.get("after", {})
        rows += [
            (name, figure, f"{value:.4g}", f"{after[figure]:.4g}" if figure in after else "-")
            for figure, value in before.items()
            if not figure.endswith(" items")
        ]
    return f"### Besides the tasks\n\n{table(('method', 'figure', 'before', 'after'), rows)}" if rows else ""


def protection(result: RunResult, name: str) -> str:
    """Rank, energy and leak by kind of weight, over all layers and tasks."""
    rows = []
    for pattern, weights in group_names(result.learned[0].layers).items():
        layers = [task.layers[weight] for task in result.learned for weight in weights]
        shapes = sorted({f"{m} x {n}" for m, n in (layer["shape"] for layer in layers)})
        directions = _directions(layers)
        energies = span([100 * layer["energy"] for layer in layers], ".1f")
        leaks = (
            largest(side[weight] for side in sides for weight in weights if weight in side)
            for sides in zip(*((task.leak, task.leak_left, task.leak_right) for task in result.learned), strict=True)
        )
        rows.append((f"`{pattern}`", ", ".join(shapes), directions, energies, *leaks))
    header = (
        "weights",
        "shape",
        "protected directions",
        "energy of the weight's own, %",
        "largest leak",
        "left side",
        "right side",
    )
    return f"### Protected in {name}, over all tasks\n\n{table(header, rows)}"


def _directions(layers: Sequence[dict[str, Any]]) -> str:
    """The rank; where something is remembered besides, how many each side has."""
    ranks = [layer["rank"] for layer in layers]
    # Runs from before it was written down remembered nothing, or do not say what.
    sides = list(zip(*(layer.get("protected", (layer["rank"],) * 2) for layer in layers), strict=True))
    if all(dims in (0, rank) for side in sides for dims, rank in zip(side, ranks, strict=True)):
        return span(ranks, "d")
    return ", ".join(
        f"{name} {span(side, 'd')}" for name, side in zip(("left", "right"), sides, strict=True) if any(side)
    )


def growth(results: Sequence[RunResult], names: Sequence[str]) -> str:
    """How much of its sides is protected in every task, of runs that remember."""
    rows = []
    for result, name in zip(results, names, strict=True):
        if not result.config.get("remember"):
            continue
        for task in result.learned:
            shares = [
                [dims / size for dims, size in zip(layer["protected"], layer["shape"], strict=True)]
                for layer in task.layers.values()
                if "protected" in layer
            ]
            if shares:
                rows.append((name, task.name, *(f"{100 * median(side):.1f}" for side in zip(*shares, strict=True))))
    if not rows:
        return ""
    header = ("method", "while learning", "left side", "right side")
    return f"### Protected directions, % of all, median over the weights\n\n{table(header, rows)}"


def remembered(results: Sequence[RunResult], names: Sequence[str]) -> str:
    """Of what each task has changed, the share that the next task's bases protect."""
    rows = [
        (name, before.name, *(f"{100 * value:.1f}" for value in (min(shares), median(shares))))
        for result, name in zip(results, names, strict=True)
        for before, task in zip(result.learned, result.learned[1:], strict=False)
        if (shares := list(task.remembered.values()))
    ]
    if not rows:
        return ""
    header = ("method", "change by", "smallest of all weights", "median")
    explained = (
        "As the next task begins; where inputs alone are remembered, an estimate. With method sculpt and protect 0 at "
        "least as much is protected in all later tasks: what is remembered is never dropped. With a larger protect it "
        "may be less later on, because the top directions of the weights are derived anew."
    )
    return f"### Protected of what was learned, % of each weight's change\n\n{table(header, rows)}\n\n{explained}"


def remembered_earlier(result: RunResult, name: str) -> str:
    """Of what every task has changed, the share that is protected while each later one is learned; of three tasks or
    more, where it is known."""
    shares = [task.remembered_earlier for task in result.learned]
    if not any(share is not None for row in shares for share in row[:-1]):
        return ""
    rows = []
    for index, task in enumerate(result.learned[:-1]):
        later = [row[index] if index < len(row) else None for row in shares[1:]]
        rows.append((task.name, *("-" if share is None else f"{100 * share:.1f}" for share in later)))
    explained = (
        "Median over the weights, as that task begins, by the side of the inputs alone. Estimated from a sketch of 16 "
        "rows of each weight's change: to about a tenth of a weight's share where that is not near 0 or 100, their "
        "median more closely."
    )
    header = ("change by", *(f"while learning {task.name}" for task in result.learned[1:]))
    return f"### Of each earlier task's change protected in {name}, %\n\n{table(header, rows)}\n\n{explained}"


def tasks_table(result: RunResult) -> str:
    rows = [(t.name, str(t.train_items), str(t.test_items), str(t.steps), t.note or "") for t in result.learned]
    return f"## Tasks\n\n{table(('task', 'training rows', 'items measured', 'steps', 'note'), rows)}"


def settings_table(results: Sequence[RunResult], names: Sequence[str]) -> str:
    """Every setting and version, once where all runs agree."""
    columns = [{**result.config, **result.versions} for result in results]
    keys = [key for key in dict.fromkeys(key for column in columns for key in column) if key not in LEFT_OUT]
    rows = []
    for key in keys:
        values = [plain(column.get(key)) for column in columns]
        rows.append((key, *(values if len(set(values)) > 1 else [values[0]] + ["same"] * (len(values) - 1))))
    return f"## Settings and versions\n\n{table(('', *names), rows)}"

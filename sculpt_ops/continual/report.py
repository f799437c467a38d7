"""report.md and its pictures: one or several methods side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..files import check_folder
from .markdown import gibibytes, percent, seconds_text, table
from .metrics import Metrics, difference, meaningful
from .plots import draw_accuracy, draw_curves, draw_leak, draw_tradeoff
from .report_tables import (
    abilities,
    accuracies,
    answers,
    growth,
    protection,
    remembered,
    remembered_earlier,
    settings_table,
    tasks_table,
)
from .result import RunResult, write_text

__all__ = ["write_report"]

REPORT_FILE, ACCURACY_FILE, CURVES_FILE = "report.md", "accuracy.png", "curves.png"
LEAK_FILE, TRADEOFF_FILE = "leak.png", "tradeoff.png"


def write_report(results: Sequence[RunResult], folder: str | Path) -> Path:
    """Write report.md, accuracy.png, for two tasks or more curves.png, of several runs tradeoff.png and, where the leak
    was followed, leak.png into `folder`; returns report.md's path.

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
    check_folder(folder, "output")
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
    # Of bounds whose average accuracy says nothing there are no points.
    tradeoff = several and sum(not math.isnan(values.average_accuracy.value) for values in metrics) > 1
    if tradeoff:
        draw_tradeoff(results, names, folder / TRADEOFF_FILE)
    sections = [
        _head(results, names),
        _summary(names, metrics),
        _differences(results, names),
        _cost(results, names),
        f"![Accuracy and forgetting after each task]({CURVES_FILE})" if several else "",
        f"![Average accuracy against learning accuracy]({TRADEOFF_FILE})" if tradeoff else "",
        f"![Accuracy on every task after each task]({ACCURACY_FILE})",
        *(accuracies(result, name) for result, name in zip(results, names, strict=True)),
        answers(results, names),
        abilities(results, names),
        *(protection(result, name) for result, name in zip(results, names, strict=True) if result.learned[0].layers),
        growth(results, names),
        remembered(results, names),
        *(remembered_earlier(result, name) for result, name in zip(results, names, strict=True)),
        _leak_over_time(results) if followed else "",
        tasks_table(results[0]),
        settings_table(results, names),
    ]
    write_text(folder / REPORT_FILE, "\n\n".join(section for section in sections if section) + "\n")
    return folder / REPORT_FILE


# What a comparison of methods has alike, and the rate, which methods have their own of but which is to be seen.
TRAINING = (
    "lr",
    "epochs",
    "task_epochs",
    "max_steps",
    "rows_per_step",
    "max_length",
    "lr_scheduler_type",
    "dtype",
    "bf16",
)


BOUNDS = {
    "per-task": "a bound: every task is learned from the start weights, and its learning accuracy is what counts. The "
    "other figures would be those of the last task's model, and are left out.",
    "multitask": "a bound: all tasks are trained at once, in the place of the first, before the first row of "
    "accuracies after zero-shot. Nothing is learned later that they could be forgotten by.",
}


def _names(results: Sequence[RunResult]) -> list[str]:
    """The runs' names, with the folder where two are called the same."""
    names = [result.name for result in results]
    return [
        f"{name} ({Path(result.output).name})" if names.count(name) > 1 else name
        for name, result in zip(names, results, strict=True)
    ]


def _head(results: Sequence[RunResult], names: Sequence[str]) -> str:
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
    configs = [result.config for result in results]
    different = [key for key in TRAINING if any(config.get(key) != first.config.get(key) for config in configs)]
    if different:
        values = (f"{key} ({', '.join(str(config.get(key)) for config in configs)})" for key in different)
        lines.append(f"Not trained alike: {'; '.join(values)}.")
    measured = [str(config.get("eval_rows")) for config in configs]
    if len(set(measured)) > 1:
        lines.append(
            f"Not measured after the same tasks: eval_rows ({', '.join(measured)}). Forgetting counts from the best "
            "accuracy that was measured; where the rows differ it is not compared below, and should not be."
        )
    for name, config in zip(names, configs, strict=True):
        if (method := config.get("method")) in BOUNDS:
            lines.append(f"{name} is {BOUNDS[method]}")
    items = _items(first)
    elsewhere = [name for name, result in zip(names, results, strict=True) if _items(result) != items]
    if elsewhere:
        lines.append(
            f"**Measured on other rows than {names[0]}: {', '.join(elsewhere)}.** Accuracies of these are not compared "
            "below, and should not be."
        )
    lines += sorted({note for result in results for note in result.notes})
    return "\n\n".join(lines)


def _summary(names: Sequence[str], metrics: Sequence[Metrics]) -> str:
    rows = [
        (
            name,
            percent(values.average_accuracy),
            percent(values.backward_transfer, signed=True),
            percent(values.forgetting),
            percent(values.learning_accuracy),
            percent(values.forward_transfer, signed=True),
        )
        for name, values in zip(names, metrics, strict=True)
    ]
    header = ("method", "average accuracy, %", "backward transfer, points", "forgetting, points")
    explained = (
        "An interval without width says that no measured item differed, not that the figure is certain. "
        "Average accuracy: mean over all tasks after the last. Backward transfer: mean over the earlier tasks of final "
        "accuracy minus accuracy right after learning. Forgetting: mean over the earlier tasks of best accuracy ever "
        "minus final accuracy. Learning accuracy: mean over all tasks of accuracy right after each. Forward transfer: "
        "mean over the later tasks of accuracy right before learning minus zero-shot."
    )
    result = table((*header, "learning accuracy, %", "forward transfer, points"), rows)
    return f"## Result\n\n{result}\n\n{explained}"


def _cost(results: Sequence[RunResult], names: Sequence[str]) -> str:
    rows = []
    for result, name in zip(results, names, strict=True):
        leaks = [leak for task in result.learned for leak in task.leak.values()]
        rows.append(
            (
                name,
                seconds_text(result.seconds_per_step),
                gibibytes(result.peak_memory_bytes),
                f"{max(leaks):.1e}" if leaks else "-",
                seconds_text(sum(task.derive_seconds for task in result.learned) if leaks else None),
            )
        )
    explained = (
        "Seconds per optimizer step: median, without evaluation. Peak memory: while deriving and training. Leak: share "
        "of a weight's change that lies in its protected space (from a sketch, to 18 %), the worst of all weights and "
        "tasks; the rounding of the weights themselves is part of it, and the larger the smaller the change."
    )
    header = ("method", "s / step", "peak memory, GiB", "largest leak", "deriving, s")
    return f"### Cost\n\n{table(header, rows)}\n\n{explained}"


def _differences(results: Sequence[RunResult], names: Sequence[str]) -> str:
    """Paired differences from the first run, where the runs were measured on the same items."""
    items = _items(results[0])
    others = [index for index in range(1, len(results)) if _items(results[index]) == items]
    if not others:
        return ""
    rows = []
    for index in others:
        pair = results[index], results[0]
        values = meaningful(
            difference(pair[0].correct, pair[1].correct), *(result.config.get("method") for result in pair)
        )
        estimates = (values.average_accuracy, values.backward_transfer, values.forgetting, values.learning_accuracy)
        rows.append((names[index], *(percent(estimate, signed=True) for estimate in estimates)))
    header = ("method", "average accuracy", "backward transfer", "forgetting", "learning accuracy")
    compared = table(header, rows)
    return f"### Difference from {names[0]}, in points, paired over the same items\n\n{compared}"


def _items(result: RunResult) -> set[tuple[str, int, str]]:
    return {(entry.task, entry.item, entry.answer) for entry in result.predictions}


def _leak_over_time(results: Sequence[RunResult]) -> str:
    tasks = [task for result in results for task in result.learned if task.leak_over_time]
    spent = sum(task.leak_seconds for task in tasks)
    trained = sum(task.train_seconds for task in tasks) - spent
    explained = (
        "Leak of the weights since the start of their task: the median of all protected weights and the largest. Where "
        "the promise holds, what is left is the rounding of the weights, for bfloat16 ones up to 2^-9 of a weight. "
        f"Measuring took {seconds_text(spent)} s beside {seconds_text(trained)} s of training, and is not part of the "
        "seconds per step."
    )
    return f"## Leak over time\n\n![Leak over the optimizer steps of each task]({LEAK_FILE})\n\n{explained}"

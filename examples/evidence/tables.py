"""Which configuration each method takes, and the tables of the README."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from protocol import Protocol
from results import read_all, write_text

from sculpt_ops.continual import RunResult
from sculpt_ops.continual.markdown import percent, table
from sculpt_ops.continual.metrics import Estimate, average_accuracy, backward_transfer
from sculpt_ops.continual.paired import paired
from sculpt_ops.continual.plots import draw_tradeoff

BEGIN, END = "<!-- begin: {scale} -->\n", "<!-- end -->"
WEIGHTS = "Weights dequantised from 4 bits; exploratory."
BASELINE, OURS = "plain", "sculpt"
# Points of backward transfer that plain fine-tuning has to lose for a comparison to have something to show.
FORGETS = 5.0

Found = tuple[RunResult, dict[str, Any]]


def choose(results: Path, protocol: Protocol) -> dict[str, str]:
    """Of every method the configuration with the highest average accuracy on the development order, the first of
    equals; or the one that was settled before."""
    best = {method: (math.inf, config) for method in protocol.settled for config in protocol.configs[method]}
    for run, record in _in_order(results / "dev", protocol):
        method, config = record["about"]["method"], record["about"]["config"]
        value = average_accuracy(run.accuracy)
        if method not in best or value > best[method][0]:
            best[method] = value, config
    return {method: config for method, (_, config) in best.items()}


def _in_order(folder: Path, protocol: Protocol) -> Iterator[Found]:
    """As the protocol lists them."""
    listed = [(method, config) for method, configs in protocol.configs.items() for config in configs]
    found = {(record["about"]["method"], record["about"]["config"]): (run, record) for run, record in read_all(folder)}
    yield from (found[each] for each in listed if each in found)


def write_tables(results: Path, readme: Path, protocol: Protocol, scale: str) -> None:
    """Replace what stands between the marks of `scale` in `readme`, if there are results."""
    text = readme.read_text(encoding="utf-8")
    begin = BEGIN.format(scale=scale)
    before, mark, rest = text.partition(begin)
    _, _, after = rest.partition(END)
    sections = [
        entry_table(results, protocol),
        dev_table(results, protocol),
        dev_picture(results, protocol, readme.parent),
        final_tables(results, protocol),
        ablation_table(results, protocol),
    ]
    body = "\n\n".join(section for section in sections if section)
    if mark and body:
        write_text(readme, f"{before}{begin}{body}\n{END}{after}")


def entry_table(results: Path, protocol: Protocol) -> str:
    """Whether fine-tuning on one task alone beats the majority and the model as it is by ten points."""
    best: dict[str, tuple[float, float, float]] = {}
    for run, record in read_all(results / "entry"):
        name, reached = run.tasks[0], run.accuracy[1][0]
        if name not in best or reached > best[name][0]:
            best[name] = reached, run.accuracy[0][0], record["learned"][0]["majority"]
    rows = [
        (
            name,
            *(f"{100 * share:.1f}" for share in (alone, zero, most)),
            "yes" if alone >= max(zero, most) + 0.1 else "no",
        )
        for name, (alone, zero, most) in best.items()
    ]
    if not rows:
        return ""
    header = ("task", "alone, %", "zero-shot, %", "majority, %", "enters")
    return f"### Tasks that enter ({protocol.entry_items} held-out training rows). {WEIGHTS}\n\n{table(header, rows)}"


def dev_table(results: Path, protocol: Protocol) -> str:
    """Every configuration that was tried, and whether plain fine-tuning forgets enough."""
    chosen = choose(results, protocol)
    rows, forgets = [], ""
    found = list(_in_order(results / "dev", protocol))
    tried: dict[str, set[float]] = {}
    for _, record in found:
        tried.setdefault(record["about"]["method"], set()).add(record["config"]["lr"])
    for run, record in found:
        about, values = record["about"], run.metrics
        mark = ""
        if chosen[about["method"]] == about["config"]:
            mark = f"**best**{_edge(record['config']['lr'], tried[about['method']])}"
        if mark and about["method"] == BASELINE:
            lost = -100 * values.backward_transfer.value
            enough = "enough" if lost >= FORGETS else "too little"
            forgets = (
                f"\n\nAt the best rate tried {BASELINE} loses {lost:.1f} points: {enough}, wanted were {FORGETS:g}."
            )
        rows.append(
            (
                about["method"],
                about["config"],
                percent(values.average_accuracy),
                percent(values.backward_transfer, signed=True),
                percent(values.learning_accuracy),
                _protected(record),
                mark,
            )
        )
    if not rows:
        return ""
    header = ("method", "configuration", "average accuracy, %", "backward transfer, points", "learning accuracy, %")
    planned = sum(len(configs) for method, configs in protocol.configs.items() if method not in protocol.settled)
    return (
        f"### Configurations, {len(rows)} of {planned}, development order, seed 0, {protocol.dev_items} held-out "
        f"training rows a task. {WEIGHTS}\n\n"
        f"{table((*header, 'of the last change protected, %', ''), rows)}{forgets}"
    )


def _edge(rate: float, tried: set[float]) -> str:
    """Where the best rate is an end of those tried, beyond which a better one may lie."""
    ends = {min(tried): ", lowest rate", max(tried): ", highest rate"}
    return ", only rate" if len(tried) == 1 else ends.get(rate, "")


def dev_picture(results: Path, protocol: Protocol, beside: Path) -> str:
    """Draw every configuration that was tried, where `results` are; returns a link to it from `beside`."""
    found = list(_in_order(results / "dev", protocol))
    if not found:
        return ""
    path = results / "configurations.png"
    draw_tradeoff([run for run, _ in found], [record["about"]["method"] for _, record in found], path)
    return f"![average accuracy over learning accuracy]({os.path.relpath(path, beside)})"


def _protected(record: dict[str, Any]) -> str:
    """Medians over the weights, task by task."""
    shares = [task["remembered"][1] for task in record["learned"] if "remembered" in task]
    return ", ".join(f"{100 * share:.0f}" for share in shares) or "-"


def final_tables(results: Path, protocol: Protocol) -> str:
    """The chosen configurations on the orders and seeds of the comparison."""
    runs: dict[str, dict[tuple[str, int], RunResult]] = {}
    protected: dict[str, list[float]] = {}
    for run, record in read_all(results / "final"):
        runs.setdefault(record["about"]["method"], {})[record["about"]["order"], run.config["seed"]] = run
        if "protected_share" in (last := record["learned"][-1]):
            protected.setdefault(record["about"]["method"], []).append(max(last["protected_share"]))
    if BASELINE not in runs:
        return ""
    methods = [name for name in protocol.configs if name in runs]
    # Whether the likeliest options were measured, of every run.
    options = all(all(run.option_correct[-1]) for each in runs.values() for run in each.values())
    rows = [
        (
            name,
            f"{len(runs[name])} of {protocol.planned}",
            *_means(runs[name].values(), options),
            f"{100 * mean(protected[name]):.0f}" if name in protected else "-",
        )
        for name in methods
    ]

    def pairs(first: Sequence[str], second: Sequence[str], by: str) -> list[tuple[str, ...]]:
        """Every method of the first, or the one that there is, minus every other of the second; by greedy answers or by
        the likeliest options."""
        found = []
        for one, other in product(first, second):
            both = sorted(runs[one].keys() & runs[other].keys())
            if one == other or not both:
                continue
            against = paired([runs[one][key] for key in both], [runs[other][key] for key in both], by=by)
            estimates = (against.average_accuracy, against.backward_transfer, against.learning_accuracy)
            name = f"{one} - {other}"
            found.append((name, str(len(both)), *(percent(estimate, signed=True) for estimate in estimates)))
        return found

    quality = ("average accuracy, %", "backward transfer, points", "learning accuracy, %")
    by_options = ("average accuracy by options, %", "backward transfer by options, points") if options else ()
    devices = ", ".join(
        sorted({run.versions.get("device", "unknown") for each in runs.values() for run in each.values()})
    )
    orders, seeds = ", ".join(protocol.orders), ", ".join(map(str, protocol.seeds))
    parts = [
        f"### {protocol.test_items} test items a task, mean over runs (smallest to largest). {WEIGHTS}\n\n"
        f"Orders {orders}; seeds {seeds}; on {devices}.\n\n"
        f"{table(('method', 'runs', *quality, *by_options, 'protected directions in the last task, %'), rows)}"
    ]
    others = [name for name in methods if name not in (BASELINE, OURS)]
    for by, named in (("answers", ""), ("options", " by the likeliest option"))[: 1 + options]:
        differences = pairs(methods, [BASELINE], by) + (pairs([OURS], others, by) if OURS in runs else [])
        if differences:
            parts.append(
                f"### Differences{named}, paired by order and seed; 95 % over runs and test items. {WEIGHTS}\n\n"
                f"{table(('methods', 'pairs', *quality), differences)}"
            )
    parts.append(_ability_table({name: list(runs[name].values()) for name in methods}))
    return "\n\n".join(part for part in parts if part)


def _ability_table(runs: dict[str, list[RunResult]]) -> str:
    """What the model can do besides the tasks, before the first of them and after the last."""
    figures = next((list(run.ability["before"]) for each in runs.values() for run in each if run.ability), [])
    figures = [name for name in figures if not name.endswith(" items")]
    if not figures:
        return ""
    rows = []
    for method, found in runs.items():
        measured = [run.ability for run in found if "after" in run.ability]
        if measured and not rows:
            rows.append(("before", *(_mean_of(name, [each["before"] for each in measured]) for name in figures)))
        if measured:
            rows.append((method, *(_mean_of(name, [each["after"] for each in measured]) for name in figures)))
    return f"### Besides the tasks, mean over runs. {WEIGHTS}\n\n{table(('after all tasks', *figures), rows)}"


def _mean_of(name: str, figures: Sequence[dict[str, float]]) -> str:
    value = mean(each[name] for each in figures)
    return f"{100 * value:.1f} %" if name.endswith("accuracy") else f"{value:.1f}"


def _means(runs: Iterable[RunResult], options: bool) -> Iterator[str]:
    runs = list(runs)
    for name in ("average_accuracy", "backward_transfer", "learning_accuracy"):
        values = [getattr(run.metrics, name).value for run in runs]
        yield f"{100 * mean(values):.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"
    if options:
        for figure in (average_accuracy, backward_transfer):
            yield f"{100 * mean(figure(run.option_accuracy) for run in runs):.1f}"


def ablation_table(results: Path, protocol: Protocol) -> str:
    """One factor changed at a time, and bounds, on the development order."""
    found = {record["about"]["config"]: (run, record) for run, record in read_all(results / "ablation")}
    rows = [
        (config, *_values(run.metrics), _protected(record))
        for config, (run, record) in ((config, found[config]) for config in protocol.ablations if config in found)
    ]
    if not rows:
        return ""
    header = ("changed", "average accuracy, %", "backward transfer, points", "learning accuracy, %")
    return (
        f"### One factor changed, and bounds, development order, seed 0. {WEIGHTS}\n\n"
        f"{table((*header, 'of the last change protected, %'), rows)}"
    )


def _values(metrics: Any) -> Sequence[str]:
    estimates: list[Estimate] = [metrics.average_accuracy, metrics.backward_transfer, metrics.learning_accuracy]
    return [percent(estimate, signed=index == 1) for index, estimate in enumerate(estimates)]

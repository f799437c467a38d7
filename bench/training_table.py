"""The training table as Markdown, and the lines that say where ours loses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tables import Row

BEGIN, END = "<!-- begin: python bench/train_cpu.py --markdown -->", "<!-- end -->"

COLUMNS = (
    *("method", "protect", "set-up s", "step s [quartiles]", "after backward s", "peak GiB"),
    *("owned GiB: weights + gradients + states + bases", "saved GiB", "leak", "largest", "loss"),
)

# Less is better in all of them. Losses are compared by difference.
COSTS = {
    "set-up": "setup_s",
    "step": "step_s",
    "peak": "peak",
    "owned": "owned_total",
    "checkpoint": "saved",
    "leak": "leak",
}


def heading() -> str:
    return (
        f"{'method':<38} {'protect':>7} {'set-up s':>8} {'step s':>6} {'[quartiles]':>14} {'peak':>6} {'owned':>6} "
        f"{'saved':>6}  {'leak':>8} {'largest':>8}  {'loss':>6}"
    )


def show(row: Row) -> str:
    """One line; bytes in GiB."""
    line = f"{row['name']:<38} {share(row):>7}"
    if "note" in row:
        return f"{line} {row['note']}"
    quartiles = f"[{row['step_s_low']:.2f}, {row['step_s_high']:.2f}]"
    sizes = " ".join(f"{gib(row[key]):>6}" for key in ("peak", "owned_total", "saved"))
    return (
        f"{line} {row['setup_s']:>8.1f} {row['step_s']:>6.2f} {quartiles:>14} {sizes}  {row['leak']:>8.1e} "
        f"{row['leak_max']:>8.1e}  {row['loss_after']:>6.4f}"
    )


def markdown(results: dict[str, Any]) -> str:
    """The table, what it was measured on, and where ours loses."""
    facts, settings = results["machine"], results["settings"]
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    lines += [f"| {' | '.join(cells(row))} |" for row in results["rows"]]
    measured = [row for row in results["rows"] if "note" not in row]
    before = f"{measured[0]['loss_before']:.4f} ({measured[0]['name']})" if measured else "unknown"
    told = (
        f"{facts['date']}, {facts['processor']}, {facts['threads']} threads, allocator: {facts['allocator']}, torch "
        f"{facts['torch']}, peft {facts['peft']}, mini_trainer {facts['rhai-innovation-mini-trainer']}. "
        f"{settings['model']} on {settings['task']}, {settings['rows']} x {settings['length']} tokens a step, "
        f"{settings['steps']} steps at lr {settings['lr']:g}; held-out loss before: {before}."
    )
    behind = lost(results["rows"]) or ["nothing"]
    return "\n".join([*lines, "", told, "", "Where ours loses:", "", *(f"- {line}" for line in behind)])


def cells(row: Row) -> list[str]:
    if "note" in row:
        return [row["name"], share(row), row["note"], *[""] * (len(COLUMNS) - 3)]
    parts = " + ".join(gib(row["owned"][part]) for part in ("weights", "gradients", "states", "bases"))
    return [
        row["name"],
        share(row),
        f"{row['setup_s']:.1f}",
        f"{row['step_s']:.2f} [{row['step_s_low']:.2f}, {row['step_s_high']:.2f}]",
        f"{row['after_backward_s']:.2f}",
        gib(row["peak"]),
        f"{gib(row['owned_total'])}: {parts}",
        gib(row["saved"]),
        f"{row['leak']:.1e}",
        f"{row['leak_max']:.1e}",
        f"{row['loss_after']:.4f}",
    ]


def lost(rows: Sequence[Row]) -> list[str]:
    """One line for each row of ours that is behind another method, of the same share or one that protects nothing.

    Only rows of one dtype are compared; set-up and leak only with methods that protect. What rounds to equal is left
    out; what is within the quartiles is not.
    """
    measured = [row for row in rows if "note" not in row]
    lines = []
    for mine in (row for row in measured if row["family"] == "sculpt"):
        others = [row for row in measured if row["family"] != "sculpt" and row["dtype"] == mine["dtype"]]
        behind = [(other, losses(mine, other)) for other in others if other["protect"] in (None, mine["protect"])]
        told = [f"{other['name']} ({', '.join(found)})" for other, found in behind if found]
        if told:
            lines.append(f"{mine['name']} at {share(mine)}, behind {'; '.join(told)}")
    return lines


def losses(mine: Row, other: Row) -> list[str]:
    skipped = ("set-up", "leak") if other["protect"] is None else ()
    found = [
        f"{what} {mine[key] / other[key]:.2f} times"
        for what, key in COSTS.items()
        if what not in skipped and mine[key] > 1.005 * other[key]
    ]
    above = mine["loss_after"] - other["loss_after"]
    return found + ([f"loss {above:.4f} above"] if above > 5e-5 else [])


def write_between_marks(document: Path, text: str) -> None:
    """Replace what stands between the two marks of `document`. ValueError if they are not there."""
    before, begin, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{document}: wanted the lines {BEGIN} and {END}")
    document.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def share(row: Row) -> str:
    return "-" if row["protect"] is None else f"{row['protect']:.2f}"


def gib(size: float) -> str:
    return f"{size / 2**30:.2f}"

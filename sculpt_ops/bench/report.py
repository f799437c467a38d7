"""Writes what the GPU benchmark measured: one JSON file, a Markdown table and a roofline made from it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..files import replacing

__all__ = ["WHICH", "markdown", "name_of", "roofline", "write_report"]

Result = dict[str, Any]
TABLES = {
    "model": ("Whole models, foreach_project_", ("model", "matrices", "kind", "rank", "dtype", "basis", "host_us")),
    "optimizer": ("A step of AdamW", ("model", "matrices", "rank", "dtype")),
    "decomposition": ("Decompositions", ("m", "n", "rank", "dtype")),
    "small svd": ("SVDs of small factors, a batch at once", ("matrices", "m", "n", "dtype")),
    "projection": (
        "Single matrices",
        ("model", "kind", "m", "n", "rank", "dtype", "basis", "chosen", "relative_error"),
    ),
}


# What tells a row from the others of its table.
WHICH = ("model", "kind", "m", "n", "rank", "dtype", "basis")


def name_of(result: Result) -> str:
    """DEVICE-DATE, in lower-case letters, digits and hyphens."""
    device = re.sub(r"[^a-z0-9]+", "-", str(result["machine"]["device"]).lower()).strip("-")
    dry = "dry-run-" if result["dry_run"] else ""
    return f"{dry}{device}-{result['machine']['date']}"


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def cell(entry: dict[str, Any], ours: float | None) -> str:
    """Median microseconds with quartiles, share of the floor, and how many times ours it takes."""
    if "failed" in entry:
        # Of a variant that was asked for and cannot run the results file has the whole reason.
        reason = "cannot run" if "but it cannot run" in entry["failed"] else f"failed: {entry['failed']}"
        return reason.replace("|", "/")
    ratio = "" if not ours else f", {entry['us'] / ours:.2f}x"
    return f"{entry['us']:.1f} ({entry['us_low']:.1f}-{entry['us_high']:.1f}), {entry['share_of_floor']:.0%}{ratio}"


def table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> Iterator[str]:
    names = list(dict.fromkeys(name for row in rows for name in row["contenders"]))
    header = [*columns, "floor us", *names]
    yield "| " + " | ".join(header) + " |"
    yield "|---" * len(header) + "|"
    for row in rows:
        ours = next(iter(row["contenders"].values())).get("us")
        cells = [cell(row["contenders"][name], ours) if name in row["contenders"] else "" for name in names]
        yield (
            "| " + " | ".join([*(shown(row.get(key, "")) for key in columns), f"{row['floor_us']:.1f}", *cells]) + " |"
        )


def lost(result: Result) -> list[str]:
    """Single rows where our choice takes longer than mm + addmm_ by over 2 %."""
    found = []
    for row in result["rows"]:
        ours, theirs = (row["contenders"].get(name, {}).get("us") for name in ("sculpt", "mm + addmm_"))
        if ours and theirs and ours > theirs / 0.98:
            what = " ".join(str(row[key]) for key in WHICH if key in row)
            found.append(f"{what} ({theirs / ours:.2f})")
    return found


def markdown(result: Result) -> str:
    """Every row, those we lose included."""
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items() if value is not None)
    lines = ["# GPU benchmark", ""]
    if result["dry_run"]:
        lines += ["**Dry run of tiny sizes on a CPU: these figures mean nothing.**", ""]
    ceilings = {key: shown(float(value)) for key, value in result["ceilings"].items()}
    lines += [machine, "", "Measured ceilings: " + ", ".join(f"{key} {value}" for key, value in ceilings.items()), ""]
    lines += ["Times in us: median (quartiles), share of the floor, times ours. Stopped by its time limit: "]
    lines[-1] += "no." if result["complete"] else "yes, rows are missing."
    for kind, (title, columns) in TABLES.items():
        rows = [row for row in result["rows"] if row["table"] == kind]
        if rows:
            lines += ["", f"## {title}", "", *table(rows, columns)]
    behind = lost(result)
    lines += ["", "## Rows we lose to mm + addmm_ by over 2 %", "", "; ".join(behind) or "none"]
    if result["failed"]:
        lines += ["", "## Failed", "", *(f"- {line}" for line in result["failed"])]
    return "\n".join(lines) + "\n"


def roofline(result: Result, path: Path) -> None:
    """Operations a second over operations a byte, by contender, under the measured ceilings."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    points: dict[str, list[tuple[float, float]]] = {}
    for row in result["rows"]:
        for name, entry in row["contenders"].items():
            if row["table"] in ("projection", "model") and row["dtype"] == "bfloat16" and "us" in entry:
                rate = entry["flop_per_s"]
                points.setdefault(name, []).append((rate / entry["bytes_per_s"], rate))
    ceilings = result["ceilings"]
    across = [intensity for values in points.values() for intensity, _ in values] or [1.0]
    xs = [min(across) / 2 * (max(across) * 4 / min(across)) ** (i / 99) for i in range(100)]
    axes.plot(
        xs, [min(x * ceilings["bytes_per_s"], ceilings["half_flops"]) for x in xs], "k-", label="measured ceilings"
    )
    for name, values in points.items():
        axes.plot(*zip(*values, strict=True), ".", alpha=0.6, label=name)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte that must move", ylabel="operations/s")
    axes.set_title(f"{result['machine']['device']}, bfloat16" + (" (dry run)" if result["dry_run"] else ""))
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, format="png")


def write(path: Path, save: Callable[[Path], Any]) -> Path:
    with replacing(path) as temporary:
        save(temporary)
    return path


def write_report(result: Result, folder: Path, picture: bool = True) -> list[Path]:
    """The files that were written; the picture is left out where matplotlib is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    name = name_of(result)
    text = json.dumps(result, indent=1) + "\n"
    paths = [write(folder / f"{name}.json", lambda path: path.write_text(text))]
    paths.append(write(folder / f"{name}.md", lambda path: path.write_text(markdown(result))))
    if not picture:
        return paths
    try:
        paths.append(write(folder / f"{name}.png", lambda path: roofline(result, path)))
    except ImportError:
        print("matplotlib is missing: no roofline")
    return paths

"""Which configuration each method takes, and the tables of the README."""

from __future__ import annotations

from pathlib import Path

from results import read_all

MARK = "<!-- {}: make evidence -->"


def choose(results: Path) -> dict[str, str]:
    """Of every method the configuration with the highest average accuracy on the development order; the first of
    equals."""
    best: dict[str, tuple[float, str]] = {}
    for run, record in read_all(results / "dev"):
        method, config = record["about"]["method"], record["about"]["config"]
        value = run.metrics.average_accuracy.value
        if method not in best or value > best[method][0]:
            best[method] = value, config
    return {method: config for method, (_, config) in best.items()}


def write_tables(results: Path, readme: Path) -> None:
    for run, _ in read_all(results / "dev"):
        values = run.metrics
        print(f"{run.name:60s} {values.average_accuracy.value:.3f} {values.backward_transfer.value:+.3f}")

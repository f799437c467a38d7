"""What is compared: the tasks, and the sizes, orders, seeds and configurations of each of the two comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["BENCHMARK", "KNOWN_TEXT", "TEXT_TOKENS", "Protocol", "Settings", "rates"]

# Of a `TrainConfig`; protect as `parse_protect` reads it.
Settings = Mapping[str, Any]

# Of the O-LoRA benchmark, by the name that the tables use.
BENCHMARK = {
    "dbpedia": "TC/dbpedia",
    "amazon": "SC/amazon",
    "agnews": "TC/agnews",
    "IMDB": "SC/IMDB",
    "yelp": "SC/yelp",
}
# Of a text; its instruction and the cue to answer come on top.
TEXT_TOKENS = 96
# Passages that a configuration's remember_text may name; beside the task folders.
KNOWN_TEXT = "known.txt"


@dataclass(frozen=True)
class Protocol:
    """datasets: where each task's data is, as `read_source` takes it.

    entry_items, dev_items: held-out training rows, to see whether a task enters, and (the first of them) to choose
    configurations on `dev_order`, which the comparison on `orders` does not use. common: settings of every run; lr is
    every configuration's own. configs: by method. ablations: of "sculpt", one thing changed at a time, on `dev_order`;
    bounds too, which are named so.
    foremost: methods whose runs begin before those of the others; none means that all go side by side.
    settled: methods whose only configuration was chosen by another comparison: none is searched for.
    reads_text: whether the model's perplexity is measured too, on passages that no task is about; and whether others of
    that kind, `KNOWN_TEXT`, are there to be remembered.
    """

    train_items: int
    test_items: int
    entry_items: int
    dev_items: int
    entry_rates: Sequence[float]
    dev_order: Sequence[str]
    orders: Mapping[str, Sequence[str]]
    seeds: Sequence[int]
    common: Settings
    configs: Mapping[str, Mapping[str, Settings]]
    ablations: Mapping[str, Settings] = field(default_factory=dict)
    foremost: Sequence[str] = ()
    settled: Sequence[str] = ()
    reads_text: bool = False
    datasets: Mapping[str, str] = field(default_factory=lambda: BENCHMARK)

    @property
    def tiers(self) -> list[list[str]]:
        """Methods, those that begin first and the others."""
        others = [method for method in self.configs if method not in self.foremost]
        return [tier for tier in (list(self.foremost), others) if tier]

    @property
    def planned(self) -> int:
        """Runs of every method in the comparison."""
        return len(self.orders) * len(self.seeds)


def rates(settings: Settings, *lrs: float, named: str = "") -> dict[str, Settings]:
    """One configuration per learning rate."""
    return {f"{named}lr {lr:g}": {**settings, "lr": lr} for lr in lrs}

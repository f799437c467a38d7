"""Two methods over several runs: what is paired, by what, and what the interval covers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sculpt_ops.continual import Prediction, RunResult
from sculpt_ops.continual.paired import paired

ITEMS = 60
ORDERS = (["a", "b", "c"], ["c", "a", "b"], ["b", "c", "a"])
DIFFICULTY = {name: np.random.default_rng(ord(name)).random(ITEMS) for name in "abc"}


def make(order: list[str], seed: int, learned: float, forgotten: float, noise: float = 0.0) -> RunResult:
    """A run that answers an item if it is easy enough: above `learned` right after its task, `forgotten` less later."""
    generator = np.random.default_rng(seed)
    predictions = []
    for row in range(len(order) + 1):
        for column, name in enumerate(order):
            share = 0.2 if row <= column else learned - forgotten * (row > column + 1)
            share += noise * generator.standard_normal()
            for item, difficulty in enumerate(DIFFICULTY[name]):
                answer = "right" if difficulty < share else "wrong"
                predictions.append(Prediction(row, name, item, "right", answer))
    config = {"model": "m", "seed": seed}
    return RunResult("method", list(order), f"/runs/{seed}", config, predictions=predictions)


def test_the_mean_difference_and_each_pairs_own() -> None:
    ours = [make(order, seed, 0.8, 0.05) for seed, order in enumerate(ORDERS)]
    plain = [make(order, seed, 0.8, 0.3) for seed, order in enumerate(ORDERS)]
    found = paired(ours, plain)
    singles = [
        (a.metrics.average_accuracy.value - b.metrics.average_accuracy.value,
         a.metrics.backward_transfer.value - b.metrics.backward_transfer.value,
         a.metrics.learning_accuracy.value - b.metrics.learning_accuracy.value)
        for a, b in zip(ours, plain, strict=True)
    ]  # fmt: skip
    assert found.pairs == [pytest.approx(single) for single in singles]
    assert found.average_accuracy.value == pytest.approx(np.mean([single[0] for single in singles]))
    assert found.backward_transfer.value == pytest.approx(np.mean([single[1] for single in singles]))
    assert found.backward_transfer.low > 0
    assert found.learning_accuracy.value == found.learning_accuracy.low == found.learning_accuracy.high == 0
    assert found == paired(ours, plain)


def test_equal_methods_differ_by_nothing() -> None:
    runs = [make(order, seed, 0.7, 0.2, noise=0.1) for seed, order in enumerate(ORDERS)]
    found = paired(runs, runs)
    for figure in (found.average_accuracy, found.backward_transfer, found.learning_accuracy):
        assert (figure.value, figure.low, figure.high) == (0, 0, 0)


def test_one_pair_is_a_bootstrap_over_items_alone() -> None:
    ours, plain = make(ORDERS[0], 0, 0.8, 0.05), make(ORDERS[0], 0, 0.8, 0.3)
    figure = paired([ours], [plain], resamples=20_000).average_accuracy
    gains = [np.subtract(a, b, dtype=float) for a, b in zip(ours.correct[-1], plain.correct[-1], strict=True)]
    gain = np.stack(gains)
    spread = np.sqrt((gain.var(axis=1) / ITEMS).sum()) / len(gain)
    assert figure.high - figure.low == pytest.approx(2 * 1.96 * spread, rel=0.1)


def test_runs_that_differ_widen_the_interval() -> None:
    orders = [ORDERS[seed % 3] for seed in range(9)]
    plain = [make(order, seed, 0.7, 0.3) for seed, order in enumerate(orders)]
    steady = [make(order, seed, 0.7, 0.2) for seed, order in enumerate(orders)]
    unsteady = [make(order, seed, 0.7, 0.2, noise=0.15) for seed, order in enumerate(orders)]
    widths = [
        figure.high - figure.low for figure in (paired(runs, plain).average_accuracy for runs in (steady, unsteady))
    ]
    assert widths[1] > 1.3 * widths[0]


def test_options_are_compared_in_place_of_answers() -> None:
    """One task answered with another's labels, whose options it tells apart as before."""

    def with_options(run: RunResult, confused: bool) -> RunResult:
        last, wrong = len(run.tasks), run.tasks[:-1] if confused else []
        return replace(
            run,
            predictions=[
                replace(
                    entry,
                    option=entry.prediction,
                    prediction="another" if entry.row == last and entry.task in wrong else entry.prediction,
                )
                for entry in run.predictions
            ],
        )

    plain = [with_options(make(order, seed, 0.7, 0.2), False) for seed, order in enumerate(ORDERS)]
    ours = [with_options(make(order, seed, 0.8, 0.1), True) for seed, order in enumerate(ORDERS)]
    answers, options = paired(ours, plain), paired(ours, plain, by="options")
    wanted = [np.mean(a.option_accuracy[-1]) - np.mean(b.option_accuracy[-1]) for a, b in zip(ours, plain, strict=True)]
    assert [pair[0] for pair in options.pairs] == pytest.approx(wanted)
    assert answers.backward_transfer.high < 0 < options.backward_transfer.low
    assert answers.learning_accuracy == options.learning_accuracy
    assert paired(plain, plain, by="options").average_accuracy.high == 0
    bare = make(ORDERS[0], 0, 0.7, 0.2)
    with pytest.raises(ValueError, match="/runs/0: a was not measured by options both right after"):
        paired([bare], [bare], by="options")
    with pytest.raises(ValueError, match="by: got 'luck', wanted one of answers, options"):
        paired([bare], [bare], by="luck")


def test_what_does_not_pair_is_refused() -> None:
    ours, plain = make(ORDERS[0], 0, 0.8, 0.1), make(ORDERS[0], 0, 0.8, 0.2)
    for runs, baselines, complaint in (
        ([], [], "got 0 runs for 0"),
        ([ours], [plain, plain], "got 2 runs for 1"),
        ([ours], [make(ORDERS[1], 0, 0.8, 0.2)], r"learned \['c', 'a', 'b'\], wanted the order of"),
        ([ours], [make(ORDERS[0], 1, 0.8, 0.2)], "had seed=1, /runs/0 0"),
        ([ours], [replace(plain, predictions=plain.predictions[:-1])], "was not measured on the same items"),
        ([ours], [replace(plain, predictions=plain.predictions[: 6 * ITEMS])], "the run stopped before the last"),
    ):
        with pytest.raises(ValueError, match=complaint):
            paired(runs, baselines)

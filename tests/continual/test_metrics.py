"""Metrics against matrices worked out by hand, intervals against what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sculpt_ops.continual.metrics import (
    average_accuracy,
    backward_transfer,
    difference,
    forgetting,
    forward_transfer,
    learning_accuracy,
    measure,
    resample,
    wilson_interval,
)

# Three tasks. Final row 0.5 0.7 0.9; right after learning 0.8 0.6 0.9; best ever 0.8 0.75 0.9.
HAND = [[0.2, 0.1, 0.3], [0.8, 0.2, 0.3], [0.6, 0.6, 0.4], [0.5, 0.7, 0.9]]


def test_three_tasks_by_hand() -> None:
    assert average_accuracy(HAND) == pytest.approx((0.5 + 0.7 + 0.9) / 3)
    assert backward_transfer(HAND) == pytest.approx(((0.5 - 0.8) + (0.7 - 0.6)) / 2)
    assert forgetting(HAND) == pytest.approx(((0.8 - 0.5) + (0.7 - 0.7)) / 2)


def test_learning_and_forward_transfer_by_hand() -> None:
    assert learning_accuracy(HAND) == pytest.approx((0.8 + 0.6 + 0.9) / 3)
    assert forward_transfer(HAND) == pytest.approx(((0.2 - 0.1) + (0.4 - 0.3)) / 2)
    assert math.isnan(forward_transfer([[0.1], [0.9]]))


def test_tasks_to_come_may_be_absent() -> None:
    seen = [HAND[0], [0.8, None, None], [0.6, 0.6, float("nan")], HAND[3]]
    for metric in (average_accuracy, backward_transfer, learning_accuracy):
        assert metric(seen) == metric(HAND)
    # The best that was measured: 0.8 and 0.7.
    assert forgetting(seen) == pytest.approx(((0.8 - 0.5) + (0.7 - 0.7)) / 2)
    assert math.isnan(forward_transfer(seen))
    # Without zero-shot, too; but not without the rows that a figure is made of.
    assert backward_transfer([[None] * 3, *seen[1:]]) == backward_transfer(HAND)
    assert math.isnan(average_accuracy([*HAND[:3], [0.5, None, 0.9]]))


def test_absent_tasks_leave_the_other_intervals_as_they_are() -> None:
    whole = run(0, 60, [[0.2, 0.2], [0.8, 0.3], [0.6, 0.7]])
    seen = [whole[0], [whole[1][0], []], whole[2]]
    metrics, less = measure(whole), measure(seen)
    assert less.average_accuracy.value == metrics.average_accuracy.value
    assert less.backward_transfer == metrics.backward_transfer
    assert math.isnan(less.forward_transfer.value)
    assert math.isnan(less.forward_transfer.low)
    assert difference(seen, whole).backward_transfer.value == 0
    # The last task is not forgotten: that it was not measured before changes no forgetting.
    assert difference(seen, whole).forgetting.value == 0
    learned = [whole[0], [[], whole[1][1]], whole[2]]
    assert math.isnan(difference(learned, whole).forgetting.value)
    assert np.isnan(resample(seen)[:, 1, 1]).all()


def test_scores_are_averaged_as_right_and_wrong_are() -> None:
    generator = np.random.default_rng(0)
    scores = [[generator.random(300).tolist() for _ in range(2)] for _ in range(3)]
    metrics = measure(scores)
    final = np.array(scores[-1])
    assert metrics.average_accuracy.value == pytest.approx(final.mean())
    # Of a mean of 300 uniform numbers a task, two tasks: 1.96 sqrt(2 / 12 / 300) / 2 to either side.
    width = metrics.average_accuracy.high - metrics.average_accuracy.low
    assert width == pytest.approx(2 * 1.96 * math.sqrt(2 / 12 / 300) / 2, rel=0.1)


def test_the_best_accuracy_ever_may_be_zero_shot() -> None:
    assert forgetting([[0.9, 0.5], [0.6, 0.5], [0.4, 0.5]]) == pytest.approx(0.5)


def test_one_task_has_no_earlier_tasks() -> None:
    assert average_accuracy([[0.1], [0.9]]) == pytest.approx(0.9)
    assert math.isnan(backward_transfer([[0.1], [0.9]]))
    assert math.isnan(forgetting([[0.1], [0.9]]))


@pytest.mark.parametrize("table", [[[0.1, 0.2], [0.1, 0.2]], [0.1, 0.2], []])
def test_a_matrix_of_another_shape_is_refused(table: list) -> None:
    with pytest.raises(ValueError, match=r"wanted \(tasks \+ 1\) x tasks"):
        average_accuracy(table)


@given(right=st.integers(0, 300), wrong=st.integers(0, 300))
def test_wilson_solves_its_equation(right: int, wrong: int) -> None:
    if right + wrong == 0:
        return
    items, share = right + wrong, right / (right + wrong)
    low, high = wilson_interval(right, items)
    assert 0 <= low <= share <= high <= 1
    for bound in (low, high):
        # Where the score test just rejects: |share - bound| = z sqrt(bound (1 - bound) / items).
        if 1e-9 < bound < 1 - 1e-9:
            assert abs(share - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / items), rel=1e-4)


def test_wilson_refuses_impossible_counts() -> None:
    for right, items in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(ValueError, match="right: got"):
            wilson_interval(right, items)


def run(seed: int, items: int, shares: list[list[float]]) -> list[list[list[bool]]]:
    generator = np.random.default_rng(seed)
    return [[(generator.random(items) < share).tolist() for share in row] for row in shares]


def test_the_bootstrap_is_that_of_drawing_items() -> None:
    correct = run(0, 60, [[0.2, 0.2], [0.8, 0.3], [0.6, 0.7]])
    samples = resample(correct, resamples=20_000)
    generator = np.random.default_rng(1)
    direct = np.empty((4000, 3, 2))
    table = np.array(correct, dtype=float)
    for index in range(len(direct)):
        for task in range(2):
            drawn = generator.integers(0, 60, 60)
            direct[index, :, task] = table[:, task, drawn].mean(-1)
    assert samples.mean(0) == pytest.approx(direct.mean(0), abs=0.006)
    # Differences between rows are paired: their spread is that of drawn items, not of independent rows.
    assert (samples[:, 2] - samples[:, 1]).std(0) == pytest.approx((direct[:, 2] - direct[:, 1]).std(0), rel=0.06)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    shares = [[0.2, 0.2], [0.8, 0.3], [0.6, 0.7]]
    truth = (0.65, -0.2)
    held = np.zeros(2)
    for seed in range(200):
        metrics = measure(run(seed, 80, shares))
        for index, estimate in enumerate((metrics.average_accuracy, metrics.backward_transfer)):
            assert estimate.low <= estimate.value <= estimate.high
            held[index] += estimate.low <= truth[index] <= estimate.high
    assert (held >= 200 * 0.9).all(), held
    assert (held <= 200 * 0.995).all(), held


def test_the_same_run_gives_the_same_intervals() -> None:
    correct = run(3, 50, HAND)
    assert measure(correct) == measure(correct)


def test_a_difference_is_paired_over_items() -> None:
    baseline = run(0, 200, [[0.2, 0.2], [0.8, 0.3], [0.6, 0.7]])
    better = [*baseline[:-1], [[True] * 20 + items[20:] for items in baseline[-1]]]
    gained = np.mean([1 - np.mean(items[:20]) for items in baseline[-1]]) * 0.1
    estimate = difference(better, baseline).average_accuracy
    assert estimate.value == pytest.approx(gained)
    # Unpaired, the spread of a difference would be that of two samples of 400 items: an interval about 0.13 wide.
    assert estimate.high - estimate.low < 0.06
    same = difference(baseline, baseline)
    assert (same.average_accuracy.low, same.average_accuracy.high) == (0, 0)
    with pytest.raises(ValueError, match="wanted the same items"):
        difference(run(0, 100, HAND), run(0, 50, HAND))

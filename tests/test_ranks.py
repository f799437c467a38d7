import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sculpt_ops.ranks import Energy, Fraction, Importance, Rank, RankPolicy, Schedule, SizePolicy, as_policy

SPECTRA = st.lists(st.floats(0, 1e6), min_size=1, max_size=40).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
)


@given(st.integers(0, 100), st.integers(1, 500))
def test_fraction_is_floored_exactly(percent: int, size: int) -> None:
    # 0.29 * 100 is 28.999999999999996: the policy must follow the decimal number that was written.
    assert Fraction(percent / 100).choose(torch.ones(size)) == percent * size // 100


@given(st.integers(0, 100), st.integers(1, 500))
def test_unfreeze_rank_ratio_is_the_complement(percent: int, size: int) -> None:
    policy = as_policy(None, unfreeze_rank_ratio=percent / 100)
    assert policy.choose(torch.ones(size)) == (100 - percent) * size // 100


@given(st.integers(0, 100), SPECTRA)
def test_rank_is_capped_at_the_smaller_side(rank: int, squares: torch.Tensor) -> None:
    assert Rank(rank).choose(squares) == min(rank, len(squares))


@given(st.integers(1, 20), st.integers(1, 500))
def test_schedule_grows_from_nothing_by_equal_parts(n_tasks: int, size: int) -> None:
    ranks = [Schedule(task, n_tasks).choose(torch.ones(size)) for task in range(1, n_tasks + 1)]
    assert ranks == [part * size // n_tasks for part in range(n_tasks)]


@pytest.mark.parametrize(
    ("importance", "size", "rank"),
    # mrr 0.1 and trr 0.8: an average layer keeps 0.8; 10 * (0.1 + 0.7 / 7) is 2 exactly, 100 * 0.29 rounds below 29.
    [
        *((1.0, 100, 80), (0.0, 100, 10), (0.5, 64, 28), (1 / 7, 10, 2), (0.19 / 0.7, 100, 29)),
        *((2.0, 100, 100), (-3.0, 100, 1), (-1 / 7, 8, 1), (0.0, 3, 1), (1.0, 0, 0)),
    ],
)
def test_importance_lies_between_one_direction_and_all(importance: float, size: int, rank: int) -> None:
    assert Importance().rank_of(size, importance) == rank


def test_only_energy_needs_the_spectrum() -> None:
    for policy in (Fraction(0.5), Rank(3), Schedule(2, 5)):
        assert isinstance(policy, SizePolicy)
        assert isinstance(policy, RankPolicy)
    assert not isinstance(Energy(0.5), SizePolicy)
    assert isinstance(Energy(0.5), RankPolicy)


@given(st.floats(0, 1), SPECTRA)
def test_energy_takes_the_smallest_sufficient_rank(share: float, squares: torch.Tensor) -> None:
    rank = Energy(share).choose(squares)
    total = float(squares.sum())
    assert 0 <= rank <= len(squares)
    assert float(squares[:rank].sum()) >= share * total * (1 - 1e-9)
    if rank:
        assert float(squares[: rank - 1].sum()) <= share * total * (1 + 1e-9)


def test_energy_of_everything_stops_at_the_true_rank() -> None:
    assert Energy(1.0).choose(torch.tensor([4.0, 1.0, 1e-17, 0.0], dtype=torch.float64)) == 2
    assert Energy(0.8).choose(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64)) == 1
    assert Energy(0.9).choose(torch.zeros(5, dtype=torch.float64)) == 0


def test_default_is_half() -> None:
    assert as_policy(None) == Fraction(0.5)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_shares_outside_0_to_1_are_refused(share: float) -> None:
    for make in (Fraction, Energy, as_policy):
        with pytest.raises(ValueError, match="between 0 and 1"):
            make(share)
    with pytest.raises(ValueError, match="unfreeze_rank_ratio must lie"):
        as_policy(None, unfreeze_rank_ratio=share)


def test_unusable_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="0 or more"):
        Rank(-1)
    for bad in (2.0, True, "4"):
        with pytest.raises(TypeError, match="rank must be an int"):
            Rank(bad)  # type: ignore[arg-type]
    for count in (64, np.int64(64)):
        with pytest.raises(TypeError, match=r"protect=Rank\(64\)"):
            as_policy(count)  # type: ignore[arg-type]
    assert as_policy(np.float32(0.5)) == as_policy(0.5)  # type: ignore[arg-type]
    for bad in ("half", Rank, Importance):
        with pytest.raises(TypeError, match=r"protect must be a float, Rank\(\.\.\.\), Energy\(\.\.\.\), Importance"):
            as_policy(bad)  # type: ignore[arg-type]
    for task, n_tasks in ((0, 3), (4, 3), (1, 0)):
        with pytest.raises(ValueError, match=f"task must lie between 1 and n_tasks={n_tasks}, got {task}"):
            Schedule(task, n_tasks)
    for bad in (2.0, True):
        with pytest.raises(TypeError, match="task must be an int"):
            Schedule(bad, 4)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="n_tasks must be an int"):
            Schedule(1, bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mrr must not exceed trr=0\.1, got 0\.8"):
        Importance(0.8, 0.1)
    with pytest.raises(ValueError, match=r"trr must lie between 0 and 1, got 1\.5"):
        Importance(0.1, 1.5)
    with pytest.raises(TypeError, match="mrr must be a number"):
        Importance("a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not both"):
        as_policy(0.5, unfreeze_rank_ratio=0.5)

"""How many singular directions of a matrix to protect: by size, by task, by energy held, by importance on data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from .linalg import smallest_rank

__all__ = ["Energy", "Fraction", "Importance", "Rank", "RankPolicy", "Schedule", "SizePolicy", "as_policy"]

# 1 - 0.9 is 0.09999999999999998 and 0.29 * 100 is 28.999999999999996: without this slack the floor loses a direction.
_ROUNDING = 1e-9


@runtime_checkable
class RankPolicy(Protocol):
    """What `Subspaces.from_model(protect=...)` takes apart from a plain fraction and `Importance`.

    A policy of one's own costs the full spectrum of every matrix, unless it is a `SizePolicy`.
    """

    def choose(self, squares: Tensor) -> int:
        """The protected rank of a matrix with these squared singular values (min(m, n),), descending."""
        ...


@runtime_checkable
class SizePolicy(RankPolicy, Protocol):
    """A policy that needs no spectrum, only min(m, n): the cheapest decomposition for its rank is used."""

    def rank_of(self, size: int) -> int:
        """The protected rank of a matrix with min(m, n) = `size`."""
        ...

    def choose(self, squares: Tensor) -> int:
        return self.rank_of(len(squares))


@dataclass(frozen=True)
class Fraction(SizePolicy):
    """Protect floor(`share` * min(m, n)) directions.

    Published scripts take the fraction of max(m, n) (arXiv 2504.07097, code); the text and this package of min(m, n).
    Raises TypeError unless `share` is a number, ValueError unless it lies between 0 and 1.
    """

    share: float

    def __post_init__(self) -> None:
        _check_share("share", self.share)

    def rank_of(self, size: int) -> int:
        return math.floor(self.share * size + _ROUNDING)


@dataclass(frozen=True)
class Rank(SizePolicy):
    """Protect `rank` directions of every matrix, or all of a matrix that has fewer.

    Raises TypeError unless an int, ValueError if negative.
    """

    rank: int

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int):
            raise TypeError(f"rank must be an int, got {self.rank!r}; a share of min(m, n) is given as a plain float")
        if self.rank < 0:
            raise ValueError(f"rank must be 0 or more, got {self.rank}")

    def rank_of(self, size: int) -> int:
        return min(self.rank, size)


@dataclass(frozen=True)
class Schedule(SizePolicy):
    """Protect floor((`task` - 1) / `n_tasks` * min(m, n)) directions at task `task` of `n_tasks`, counted from 1.

    Nothing at the first task, and more with every task learned: the schedule of the scripts published with arXiv
    2504.07097. Raises TypeError unless both are ints, ValueError unless 1 <= task <= n_tasks.
    """

    task: int
    n_tasks: int

    def __post_init__(self) -> None:
        for name, value in (("task", self.task), ("n_tasks", self.n_tasks)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
        if not 1 <= self.task <= self.n_tasks:
            raise ValueError(f"task must lie between 1 and n_tasks={self.n_tasks}, got {self.task}")

    def rank_of(self, size: int) -> int:
        return (self.task - 1) * size // self.n_tasks


@dataclass(frozen=True)
class Energy:
    """Protect the smallest number of directions whose squared singular values hold at least `share` of their sum.

    A matrix of zeros has no direction to protect: rank 0. Raises
    TypeError unless `share` is a number, ValueError unless it lies between 0 and 1.
    """

    share: float

    def __post_init__(self) -> None:
        _check_share("share", self.share)

    def choose(self, squares: Tensor) -> int:
        total = float(squares.double().sum())
        if self.share == 0 or total == 0:
            return 0
        return smallest_rank(squares, self.share, total) or len(squares)


@dataclass(frozen=True)
class Importance:
    """Protect floor((`mrr` + I (`trr` - `mrr`)) * min(m, n)) directions, at least 1 and at most min(m, n), I being the
    layer's importance on the batches given to `Subspaces.from_model`.

    I = mean over tokens of cos(x, W x), x what enters the layer, divided by its mean over all layers (arXiv 2504.07097,
    section 3.2, after AdaSVD, arXiv 2502.01403; for m != n of the first min(m, n) entries of both, as in the published
    code). mrr is the minimum, trr the target retention ratio; a layer whose cosine is negative falls below mrr.

    A mean near 0 makes nearly every layer end at 1 or at min(m, n), and where it is not above 0 negative cosines count
    as 0: so on SmolLM2-135M, where it is -0.0003 to -0.001 on 32 rows of AG News, DBpedia or Yelp. A fraction or
    `Energy` depends on no such accident.

    Raises TypeError unless both are numbers, ValueError unless 0 <= mrr <= trr <= 1.
    """

    mrr: float = 0.1
    trr: float = 0.8

    def __post_init__(self) -> None:
        _check_share("mrr", self.mrr)
        _check_share("trr", self.trr)
        if self.mrr > self.trr:
            raise ValueError(f"mrr must not exceed trr={self.trr}, got {self.mrr}")

    def rank_of(self, size: int, importance: float) -> int:
        """The protected rank of a matrix with min(m, n) = `size` in a layer of this normalised importance."""
        share = self.mrr + importance * (self.trr - self.mrr)
        return min(max(math.floor(share * size + _ROUNDING), 1), size)


def _check_share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number from 0 to 1, got {value!r}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie between 0 and 1, got {value}")


def as_policy(
    protect: float | RankPolicy | Importance | None, unfreeze_rank_ratio: float | None = None
) -> RankPolicy | Importance:
    """The rank policy meant by `protect` (the protected share, default 0.5) or its complement `unfreeze_rank_ratio`."""
    if unfreeze_rank_ratio is not None:
        if protect is not None:
            raise ValueError(
                f"give protect (the protected share) or unfreeze_rank_ratio (the free share), not both: "
                f"got protect={protect!r} and unfreeze_rank_ratio={unfreeze_rank_ratio!r}"
            )
        _check_share("unfreeze_rank_ratio", unfreeze_rank_ratio)
        return Fraction(1.0 - unfreeze_rank_ratio)
    if protect is None:
        return Fraction(0.5)
    if isinstance(protect, float | np.floating):
        protect = float(protect)
        _check_share("protect", protect)
        return Fraction(protect)
    if isinstance(protect, int | np.integer):
        share = f"protect={float(protect)} for a share of min(m, n) or " if 0 <= protect <= 1 else ""
        raise TypeError(
            f"protect={protect!r} could be a share or a number of directions: write {share}"
            f"protect=Rank({int(protect)}) for a rank"
        )
    if isinstance(protect, RankPolicy | Importance) and not isinstance(protect, type):
        return protect
    raise TypeError(
        f"protect must be a float, Rank(...), Energy(...), Importance(...) or Schedule(...), got {protect!r}"
    )

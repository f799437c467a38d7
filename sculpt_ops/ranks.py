"""How many singular directions of a matrix to protect: by fraction, by number, or by the energy they hold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["Energy", "Fraction", "Rank", "RankPolicy", "as_policy"]

# 1 - 0.9 is 0.09999999999999998 and 0.29 * 100 is 28.999999999999996: without this slack the floor loses a direction.
_ROUNDING = 1e-9


@runtime_checkable
class RankPolicy(Protocol):
    """What `Subspaces.from_model(protect=...)` takes apart from a plain fraction."""

    def choose(self, squares: Tensor) -> int:
        """The protected rank of a matrix with these squared singular values (min(m, n),), descending."""
        ...


@dataclass(frozen=True)
class Fraction:
    """Protect floor(`share` * min(m, n)) directions.

    Published scripts take the fraction of max(m, n) (arXiv 2504.07097, code); the text and this package of min(m, n).
    Raises TypeError unless `share` is a number, ValueError unless it lies between 0 and 1.
    """

    share: float

    def __post_init__(self) -> None:
        _check_share("share", self.share)

    def choose(self, squares: Tensor) -> int:
        return math.floor(self.share * len(squares) + _ROUNDING)


@dataclass(frozen=True)
class Rank:
    """Protect `rank` directions of every matrix, or all of a matrix that has fewer.

    Raises TypeError unless an int, ValueError if negative.
    """

    rank: int

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int):
            raise TypeError(f"rank must be an int, got {self.rank!r}; a share of min(m, n) is given as a plain float")
        if self.rank < 0:
            raise ValueError(f"rank must be 0 or more, got {self.rank}")

    def choose(self, squares: Tensor) -> int:
        return min(self.rank, len(squares))


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
        held = squares.double().cumsum(0)
        if self.share == 0 or len(held) == 0 or held[-1] == 0:
            return 0
        # The sum carries rounding of its own; asking for all of it must not run into the noise of a low-rank matrix.
        return int((held < held[-1] * self.share * (1 - 1e-12)).sum()) + 1


def _check_share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number from 0 to 1, got {value!r}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie between 0 and 1, got {value}")


def as_policy(protect: float | RankPolicy | None, unfreeze_rank_ratio: float | None = None) -> RankPolicy:
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
    if isinstance(protect, float):
        _check_share("protect", protect)
        return Fraction(protect)
    if isinstance(protect, int):
        raise TypeError(
            f"protect={protect!r} could be a share or a number of directions: write protect={float(protect)} "
            f"for a share of min(m, n) or protect=Rank({int(protect)}) for a rank"
        )
    if isinstance(protect, RankPolicy) and not isinstance(protect, type):
        return protect
    raise TypeError(f"protect must be a float, Rank(...) or Energy(...), got {protect!r}")

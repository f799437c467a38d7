"""The plan of a model's training: a row for every way to train it, and which of ours is the cheapest."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ...optim.options import State
from ...optim.precision import Master
from .gpus import Gpu
from .storage import Footprint

__all__ = ["Method", "Plan", "Row", "Setting"]

Method = Literal["AdamW", "sculpt", "PEFT OSF", "mini_trainer OSFT"]

# Floors that differ by less are a tie: real steps do not follow their floors that closely.
TIE = 1.05


@dataclass(frozen=True)
class Setting:
    """One way to train. protect: as `sculpt train` takes it. dtype: of the weights; autocast: float32 ones under
    bfloat16 autocast. state, master, basis_dtype, in_backward: of ours."""

    method: Method
    dtype: str
    autocast: bool
    protect: str | None = None
    state: State = "full"
    master: Master = "none"
    basis_dtype: str | None = None
    in_backward: bool = False


@dataclass(frozen=True)
class Row:
    """memory: in bytes; None for a method that does not take this model, and a note. seconds: of one step at least (see
    `Plan`), None where float32 is multiplied."""

    setting: Setting
    memory: Footprint | None = None
    seconds: float | None = None
    note: str | None = None

    @property
    def peak(self) -> int:
        """Bytes; of steps in the backward pass if that is the setting."""
        assert self.memory is not None
        in_backward = self.memory.peak_in_backward
        return in_backward if self.setting.in_backward and in_backward is not None else self.memory.peak


@dataclass(frozen=True)
class Plan:
    """parameters: numbers in the model; protected: of them in the `matrices` that get a basis.

    rows, length: of the tokens in one forward pass. The seconds of a row are a floor: the matrix products of the
    forward and backward pass (attention itself not counted) at the rate of `gpu`, then every byte of the optimizer's
    step once, and the projections. gpu_given: whether it is more than the source of those rates.
    """

    model: str
    parameters: int
    matrices: int
    protected: int
    rows: int
    length: int
    sides: str
    gradient_checkpointing: bool
    gpu: Gpu
    gpu_given: bool
    settings: tuple[Row, ...]

    def cheapest(self, protect: str) -> Row | None:
        """Of our settings for `protect` that fit the GPU the one with the shortest floor; within 5 % of that weights
        with all their digits before stochastic rounding, then a step after the backward pass, which leaves clipping
        possible, then float32 bases before 16 bit, then the lowest peak. None if none fits."""
        fitting = [row for row in self._ours(protect) if row.peak <= self.gpu.memory]
        shortest = min((row.seconds or 0.0 for row in fitting), default=0.0)
        tied = [row for row in fitting if (row.seconds or 0.0) <= TIE * shortest]
        return min(tied, key=_preference, default=None)

    def smallest(self, protect: str) -> Row:
        """Of our settings for `protect` the one with the lowest peak."""
        return min(self._ours(protect), key=lambda row: row.peak)

    @property
    def protects(self) -> list[str]:
        """What was asked to be protected, in that order."""
        return list(dict.fromkeys(row.setting.protect for row in self.settings if row.setting.protect is not None))

    def _ours(self, protect: str) -> list[Row]:
        rows = [row for row in self.settings if row.setting.method == "sculpt" and row.setting.protect == protect]
        return rows + [replace(row, setting=replace(row.setting, in_backward=True)) for row in rows]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: bytes and seconds. cheapest: by what is protected, None where nothing fits."""
        found = {protect: self.cheapest(protect) for protect in self.protects if self.gpu_given}
        cheapest = {
            protect: None if row is None else {"setting": asdict(row.setting), "peak": row.peak}
            for protect, row in found.items()
        }
        return asdict(self) | {"cheapest": cheapest}


def _preference(row: Row) -> tuple[bool, bool, bool, int]:
    setting = row.setting
    return setting.master == "stochastic", setting.in_backward, setting.basis_dtype is not None, row.peak

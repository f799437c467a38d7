"""Numbers kept in more digits than their tensor has: bfloat16 weights with a master, 16-bit moments."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..dtensor import is_dtensor
from ..ops.rounding import add_split_, join_halves, round_stochastic_

__all__ = [
    "Master",
    "add_to_weight_",
    "has_master",
    "integer_bits",
    "read_weight",
    "rounding_seed",
    "transported_bits",
    "wide",
    "write_moment_",
]

Master = Literal["none", "split", "stochastic"]


def wide(dtype: torch.dtype) -> torch.dtype:
    """What a step is computed in: float32, for float64 float64."""
    return torch.promote_types(dtype, torch.float32)


def has_master(parameter: Tensor, master: Master) -> bool:
    """Whether `master` concerns this parameter: only bfloat16 weights have one."""
    return master != "none" and parameter.dtype is torch.bfloat16


def read_weight(parameter: Tensor, low: Tensor | None) -> Tensor:
    """The weight in `wide` precision, with its low bits where it has them."""
    weight = parameter.detach()
    return weight.to(wide(weight.dtype)) if low is None else join_halves(weight, low)


def transported_bits(low: Tensor) -> Tensor:
    """Low bits as state dicts have them, as bfloat16: collectives of gloo and NCCL take no int16."""
    return _bits(low, torch.bfloat16)


def integer_bits(low: Tensor) -> Tensor:
    """Low bits as they are used, of what `transported_bits` may have made of them."""
    return _bits(low, torch.int16)


def _bits(low: Tensor, dtype: torch.dtype) -> Tensor:
    if low.dtype is dtype:
        return low
    if not is_dtensor(low):
        return low.view(dtype)
    from torch.distributed.tensor import DTensor

    assert isinstance(low, DTensor)
    mesh, placements = low.device_mesh, low.placements
    bits = low.to_local().view(dtype)
    return DTensor.from_local(bits, mesh, placements, run_check=False, shape=low.shape, stride=low.stride())


def add_to_weight_(parameter: Tensor, step: Tensor, low: Tensor | None, seed: int | None) -> None:
    """parameter += step (`wide`, without `low` the parameter's dtype too): exactly into the two halves with `low`,
    rounded stochastically with `seed`."""
    if low is not None:
        add_split_(parameter, low, step)
    elif seed is not None:
        round_stochastic_(parameter, step.to(wide(step.dtype)).add_(parameter), seed=seed)
    else:
        parameter.add_(step)


def write_moment_(moment: Tensor, value: Tensor, seed: int | None) -> None:
    """moment = value. With beta2 = 0.999 the second moment changes by less than half a unit of bfloat16 a step: rounded
    to nearest it would never move, hence `seed`."""
    if seed is None:
        moment.copy_(value)
    else:
        round_stochastic_(moment, value, seed=seed)


def rounding_seed(seed: int, step: Tensor, index: int, slot: int) -> int:
    """A key of Philox of its own for every step, parameter (by its place in the optimizer) and tensor of it.

    Reads `step` on the host."""
    word = (seed * 1_000_003 + 4 * index + slot) % 2**31
    return (word << 32) | (int(step) % 2**32)

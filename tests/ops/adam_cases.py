"""Lists of tensors as AdamW's elementwise op takes them, for its tests on CPUs and GPUs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sculpt_ops.ops import rounding

from .accuracy import gaussian

BF16, F32, F64, I16 = torch.bfloat16, torch.float32, torch.float64, torch.int16
SHAPES = [(), (1,), (17,), (3, 1, 5), (130, 1001), (0,), (40_001,)]
HYPERPARAMETERS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


class Case(NamedTuple):
    """The op's lists, by the names of its arguments."""

    steps: list[Tensor]
    grads: list[Tensor]
    firsts: list[Tensor]
    seconds: list[Tensor]
    counts: list[Tensor]
    weights: list[Tensor | None]
    lows: list[Tensor | None]
    starts: list[Tensor | None]
    lr: Tensor

    def clone(self) -> Case:
        return Case(*[[t if t is None else t.clone() for t in column] for column in self[:-1]], self.lr.clone())

    def written(self) -> list[Tensor]:
        return [*self.steps, *self.firsts, *self.seconds, *self.counts]

    def all(self) -> list[Tensor]:
        return [t for column in self[:-1] for t in column if t is not None]


def a_case(
    shapes: list[tuple[int, ...]],
    grad_dtype: torch.dtype = F32,
    decays: str = "float32",
    lr: float = 1e-3,
    *,
    moment_dtype: torch.dtype = F32,
    step_dtype: torch.dtype = F32,
) -> Case:
    """Moments as after some steps; NaN where the op has to write. decays: none, float32, bfloat16, halves, start."""
    case = Case([], [], [], [], [], [], [], [], torch.tensor(lr, dtype=F64))
    for i, shape in enumerate(shapes):

        def draw(seed: int, dtype: torch.dtype = F32, shape: tuple[int, ...] = shape, i: int = i) -> Tensor:
            return gaussian(max(math.prod(shape), 1), dtype=dtype, seed=10 * i + seed)[: math.prod(shape)].view(shape)

        weight, start, low = draw(4), draw(5), None
        if decays in ("bfloat16", "start in bfloat16"):
            weight, start = weight.to(BF16), start.to(BF16)
        if decays == "halves":
            high, low = torch.empty(shape, dtype=BF16), torch.empty(shape, dtype=I16)
            rounding.split_(weight, high, low)
            weight = high
        case.steps.append(torch.full(shape, math.nan, dtype=step_dtype))
        case.grads.append(draw(1).to(grad_dtype))
        case.firsts.append((0.1 * draw(2)).to(moment_dtype))
        case.seconds.append((0.01 * draw(3).square()).to(moment_dtype))
        case.counts.append(torch.tensor(float(3 * i)))
        case.weights.append(None if decays == "none" else weight)
        case.lows.append(low)
        case.starts.append(start if decays.startswith("start") else None)
    return case


DECAYS = ["none", "float32", "bfloat16", "halves", "start", "start in bfloat16"]

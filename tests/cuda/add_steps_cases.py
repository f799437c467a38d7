"""Weights and steps as `_cuda_add_steps_` takes them, and what it must make of them: for the CPU and a GPU."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sculpt_ops import reference
from sculpt_ops.ops.rounding import split_

from ..ops.accuracy import gaussian

BF16, F32, I16 = torch.bfloat16, torch.float32, torch.int16
MODES = ["float32", "bfloat16", "halves", "stochastic"]
# Ends inside a group of eight, more blocks than one, and more tensors than a launch takes.
SHAPES: list[tuple[int, ...]] = [(), (1,), (8,), (17,), (130, 1001), (0,), (40_001,), *[(3, 7)] * 300]


class Case(NamedTuple):
    """lows, seeds: empty, or one for each weight."""

    weights: list[Tensor]
    lows: list[Tensor]
    steps: list[Tensor]
    seeds: list[int]

    def clone(self) -> Case:
        return Case(*[[tensor.clone() for tensor in column] for column in self[:3]], list(self.seeds))

    def cuda(self) -> Case:
        return Case(*[[tensor.cuda() for tensor in column] for column in self[:3]], list(self.seeds))


def a_case(mode: str, shapes: list[tuple[int, ...]] = SHAPES) -> Case:
    """Steps of about half a unit of a bfloat16 weight; some numbers are not finite, and some are the largest."""
    case = Case([], [], [], [])
    for i, shape in enumerate(shapes):
        size = math.prod(shape)
        weight = gaussian(max(size, 1), dtype=F32, seed=2 * i)[:size]
        step = 2**-9 * gaussian(max(size, 1), dtype=F32, seed=2 * i + 1)[:size]
        odd = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 3.3895e38, -3.3895e38, 1e-40])
        weight[100:108] = odd[: weight[100:108].numel()]
        step[112:120] = odd[: step[112:120].numel()]
        weight, step = weight.view(shape), step.view(shape)
        high = weight if mode == "float32" else weight.to(BF16)
        if mode == "halves":
            low = torch.empty(shape, dtype=I16)
            split_(weight, high, low)
            case.lows.append(low)
        if mode == "stochastic":
            case.seeds.append((-1) ** i * (2**33 + 977 * i))
        case.weights.append(high)
        case.steps.append(step)
    return case


def add_(case: Case) -> None:
    """Tensor by tensor, as the optimizer does."""
    for i, (weight, step) in enumerate(zip(case.weights, case.steps, strict=True)):
        if case.lows:
            reference.add_split_(weight, case.lows[i], step)
        elif case.seeds:
            reference.round_stochastic_(weight, step + weight, seed=case.seeds[i])
        else:
            weight.add_(step)


def same(ours: Case, twin: Case) -> None:
    """To the bit, but a NaN is a NaN."""
    for a, b in zip(ours.weights, twin.weights, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True)
        whole = I16 if a.dtype is BF16 else torch.int32
        finite = ~b.isnan()
        assert torch.equal(a.cpu().view(whole)[finite], b.view(whole)[finite])
    for a, b in zip(ours.lows, twin.lows, strict=True):
        assert torch.equal(a.cpu(), b)

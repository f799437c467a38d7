"""Identities of orthogonal projectors, for drawn shapes, ranks and flags."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sculpt_ops

from .accuracy import gaussian, orthonormal

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-13}


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, float]:
    m, n = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    r, s = draw(st.integers(0, m)), draw(st.integers(0, n))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    seed = draw(st.integers(0, 1000))
    grad = gaussian(m, n, dtype=dtype, seed=seed)
    left, right = orthonormal(m, r, dtype, seed=seed + 1), orthonormal(n, s, dtype, seed=seed + 2)
    return grad, left, right, TOLERANCE[dtype] * max(1.0, float(grad.norm()))


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance)


FLAGS = st.sampled_from(
    [
        {},
        {"keep_left": True},
        {"keep_right": True},
        {"keep_left": True, "keep_right": True},
        {"block": True},
    ]
)


@given(problems(), FLAGS)
def test_idempotent_and_norm_not_grown(problem: tuple[Tensor, Tensor, Tensor, float], flags: dict[str, bool]) -> None:
    grad, left, right, tolerance = problem
    once = sculpt_ops.project(grad, left, right, **flags)
    assert close(sculpt_ops.project(once, left, right, **flags), once, tolerance)
    assert once.norm() <= grad.norm() + tolerance


@given(problems(), FLAGS)
def test_self_adjoint(problem: tuple[Tensor, Tensor, Tensor, float], flags: dict[str, bool]) -> None:
    grad, left, right, tolerance = problem
    other = gaussian(*grad.shape, dtype=grad.dtype, seed=77)
    here = (sculpt_ops.project(grad, left, right, **flags) * other).sum()
    there = (grad * sculpt_ops.project(other, left, right, **flags)).sum()
    assert abs(here - there) <= tolerance * max(1.0, float(other.norm()))


@given(problems())
def test_nothing_is_left_in_the_removed_space(problem: tuple[Tensor, Tensor, Tensor, float]) -> None:
    grad, left, right, tolerance = problem
    out = sculpt_ops.project(grad, left, right)
    assert (left.mT @ out).norm() <= tolerance
    assert (out @ right).norm() <= tolerance
    blocked = sculpt_ops.project(grad, left, right, block=True)
    assert (left.mT @ blocked @ right).norm() <= tolerance


@given(problems())
def test_both_sides_are_left_then_right_in_either_order(problem: tuple[Tensor, Tensor, Tensor, float]) -> None:
    grad, left, right, tolerance = problem
    both = sculpt_ops.project(grad, left, right)
    assert close(sculpt_ops.project(sculpt_ops.project(grad, left), None, right), both, tolerance)
    assert close(sculpt_ops.project(sculpt_ops.project(grad, None, right), left), both, tolerance)


@given(problems())
def test_kept_and_removed_parts_add_up(problem: tuple[Tensor, Tensor, Tensor, float]) -> None:
    grad, left, right, tolerance = problem
    assert close(sculpt_ops.project(grad, left) + sculpt_ops.project(grad, left, keep_left=True), grad, tolerance)
    kept = sculpt_ops.project(grad, None, right, keep_right=True)
    assert close(sculpt_ops.project(grad, None, right) + kept, grad, tolerance)
    inside = sculpt_ops.project(grad, left, right, keep_left=True, keep_right=True)
    assert close(sculpt_ops.project(grad, left, right, block=True) + inside, grad, tolerance)


@given(problems())
def test_the_transpose_swaps_the_sides(problem: tuple[Tensor, Tensor, Tensor, float]) -> None:
    grad, left, right, tolerance = problem
    here = sculpt_ops.project(grad, left, right, keep_left=True)
    there = sculpt_ops.project(grad.mT.contiguous(), right, left, keep_right=True)
    assert close(here, there.mT, tolerance)

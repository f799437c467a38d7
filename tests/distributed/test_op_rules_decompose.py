"""Decompositions of DTensors: those of one rank to rounding, and derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Replicate

import sculpt_ops
from sculpt_ops.ops import test_matrix as draw
from tests.ops.accuracy import gaussian, orthonormal

from .placed import COLUMNS, ROWS, WHOLE, line, place, placements, whole
from .ranks import Ranks

TOLERANCE = {torch.float32: 2e-5, torch.float64: 2e-12, torch.bfloat16: 2e-5}
# Tall and wide, uneven, and with fewer rows than ranks.
SHAPES = [(60, 40), (40, 61), (13, 3), (3, 13)]


def decaying(m: int, n: int, dtype: torch.dtype) -> Tensor:
    scale = 0.8 ** torch.arange(n, dtype=torch.float64)
    return (gaussian(m, n) * scale).to(dtype)


def sketch_everywhere() -> None:
    for m, n in SHAPES[1:3]:
        for dtype, bound in TOLERANCE.items():
            matrix = decaying(m, n, dtype)
            for mesh, how in placements():
                given = place(matrix, mesh, *how)
                for transpose in (False, True):
                    keywords = {"seed": 3, "transpose": transpose, "row": 2, "column": 1}
                    omega = draw(given, 5, **keywords)
                    assert torch.equal(whole(omega), draw(matrix, 5, **keywords))
                    assert close(
                        sculpt_ops.sketch(given, 5, **keywords), sculpt_ops.sketch(matrix, 5, **keywords), bound
                    )
                    product = torch.ops.sculpt._product(given, omega, transpose=transpose)
                    assert close(product, sculpt_ops.sketch(matrix, 5, **keywords), bound)
                    gram = torch.ops.sculpt._gram(given, transpose=transpose, double=True)
                    assert close(gram, torch.ops.sculpt._gram(matrix, transpose=transpose, double=True), bound)
                    values, vectors = torch.ops.sculpt._eigh(gram)
                    rebuilt = whole(vectors) * whole(values) @ whole(vectors).mT
                    assert (rebuilt - whole(gram)).abs().max() < 1e-10


def orthonormalize_everywhere() -> None:
    for m, q in ((60, 40), (13, 3)):
        for dtype, bound in TOLERANCE.items():
            matrix = decaying(m, q, dtype)
            for mesh, how in placements():
                given = place(matrix, mesh, *how)
                basis = sculpt_ops.orthonormalize(given)
                assert basis.placements == given.placements
                assert close(basis, sculpt_ops.orthonormalize(matrix), bound)


def orthonormalize_ill_conditioned() -> None:
    """At condition 1e10, with columns that are equal, zero and 1e20 apart in scale."""
    left, right = orthonormal(64, 12, torch.float64), orthonormal(12, 12, torch.float64, seed=1)
    steep = left * torch.logspace(0, -10, 12, dtype=torch.float64) @ right.mT
    dependent = gaussian(64, 12)
    dependent[:, 3], dependent[:, 7], dependent[:, 9] = dependent[:, 1], 0.0, 1e20 * dependent[:, 9]
    for matrix in (steep, dependent):
        for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
            basis = whole(sculpt_ops.orthonormalize(place(matrix.to(dtype), line(), ROWS))).double()
            assert (basis.mT @ basis - torch.eye(12)).abs().max() < bound
            rest = matrix.to(dtype).double()
            outside = (rest - basis @ (basis.mT @ rest)).norm(dim=0) / rest.norm(dim=0).clamp(min=1e-300)
            assert outside.max() < bound


def rsvd_everywhere() -> None:
    for m, n in SHAPES[::3]:
        for dtype, bound in TOLERANCE.items():
            matrix = decaying(m, n, dtype)
            start = gaussian(n, 2, dtype=torch.promote_types(dtype, torch.float32))
            for mesh, how in placements():
                given = place(matrix, mesh, *how)
                # A sketch of 4 columns, with and without a start, and one as wide as the matrix.
                for oversample, columns in ((2, None), (2, start), (100, None)):
                    options = {"oversample": oversample, "seed": 5}
                    begin = None if columns is None else place(columns, mesh, WHOLE)
                    U, S, V = ours = sculpt_ops.rsvd(given, 2, **options, start=begin)
                    alone = sculpt_ops.rsvd(matrix, 2, **options, start=columns)
                    assert all(close(a, b, bound) for a, b in zip(ours, alone, strict=True))
                    assert list(U.placements) == [ROWS if kind == ROWS else WHOLE for kind in how]
                    assert list(V.placements) == [ROWS if kind == COLUMNS else WHOLE for kind in how]
                    assert all(kind == WHOLE for kind in S.placements)


def top_subspace_everywhere() -> None:
    for m, n in SHAPES:
        for dtype, bound in TOLERANCE.items():
            matrix = decaying(m, n, dtype)
            if dtype is not torch.bfloat16:
                matrix = matrix * 2.0**70  # squares beyond float32
            for mesh, how in placements():
                given = place(matrix, mesh, *how)
                ours, alone = sculpt_ops.top_subspace(given, 2), sculpt_ops.top_subspace(matrix, 2)
                for name in ("left", "right", "free_left", "free_right"):
                    a, b = whole(getattr(ours, name)), getattr(alone, name)
                    assert a.shape == b.shape
                    assert (a @ a.mT - b @ b.mT).abs().max() < bound
                    assert (a.mT.double() @ a.double() - torch.eye(a.shape[1])).abs().max() < min(bound, 5e-7)
                assert close(ours.singular_values, alone.singular_values, bound)
                assert abs(ours.energy - alone.energy) < 1e-6
                shares = [sculpt_ops.top_subspace(each, energy=0.9).rank for each in (given, matrix)]
                assert shares[0] == shares[1]
                near = ours.left if m < n else ours.right
                assert all(isinstance(placement, Replicate) for placement in near.placements)


def top_subspace_of_zeros_and_changed() -> None:
    nothing = sculpt_ops.top_subspace(place(torch.zeros(9, 5), line(), ROWS), energy=0.5)
    assert (nothing.rank, nothing.energy) == (0, 1.0)
    assert nothing.free_left.shape == (9, 9)
    given = place(gaussian(9, 5, dtype=torch.float32), line(), ROWS)
    late = sculpt_ops.top_subspace(given, 2)
    given.mul_(2.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        _ = late.left


def derivatives() -> None:
    grad, left, right = gaussian(12, 8), orthonormal(12, 3, torch.float64), orthonormal(8, 2, torch.float64)
    weight = gaussian(12, 8, seed=5)
    for flags in ({}, {"keep_left": True}, {"block": True}):
        plain = [t.clone().requires_grad_() for t in (grad, left, right)]
        (sculpt_ops.project(*plain, **flags) * weight).sum().backward()
        for how, long in ((ROWS, WHOLE), (ROWS, ROWS), (COLUMNS, WHOLE), (WHOLE, WHOLE)):
            given = [place(t, line(), p).requires_grad_() for t, p in ((grad, how), (left, long), (right, WHOLE))]
            (sculpt_ops.project(*given, **flags) * place(weight, line(), how)).sum().backward()
            assert all(close(a.grad, b.grad, 1e-12) for a, b in zip(given, plain, strict=True))
    alone = grad.clone().requires_grad_()
    doubled = alone * 2
    sculpt_ops.project_(doubled, left)
    (doubled * weight).sum().backward()
    given = place(grad, line(), ROWS).requires_grad_()
    doubled = given * 2
    sculpt_ops.project_(doubled, place(left, line(), WHOLE))
    (doubled * place(weight, line(), ROWS)).sum().backward()
    assert close(given.grad, alone.grad, 1e-12)
    for function in (
        lambda matrix: sculpt_ops.sketch(matrix, 8, seed=1),
        sculpt_ops.orthonormalize,
        lambda matrix: sculpt_ops.rsvd(matrix, 8)[0],
        lambda matrix: sculpt_ops.rsvd(matrix, 3)[1],
    ):
        alone, given = grad.clone().requires_grad_(), place(grad, line(), ROWS).requires_grad_()
        for matrix, spread in ((alone, False), (given, True)):
            out = function(matrix)
            weights = gaussian(*out.shape, seed=6)
            (out * (place(weights, line(), *out.placements) if spread else weights)).sum().backward()
        assert close(given.grad, alone.grad, 1e-10)


def close(ours: Tensor, alone: Tensor, bound: float) -> bool:
    return bool((whole(ours) - alone).abs().max() <= bound * max(float(alone.abs().max()), 1.0))


def test_sketches_products_and_gram_matrices(ranks: Ranks) -> None:
    ranks.run(sketch_everywhere)


def test_orthonormalize(ranks: Ranks) -> None:
    ranks.run(orthonormalize_everywhere)


def test_orthonormalize_at_any_condition(ranks: Ranks) -> None:
    ranks.run(orthonormalize_ill_conditioned)


def test_rsvd(ranks: Ranks) -> None:
    ranks.run(rsvd_everywhere)


def test_top_subspace(ranks: Ranks) -> None:
    ranks.run(top_subspace_everywhere)


def test_top_subspace_of_zeros_and_of_a_matrix_that_changed(two_ranks: Ranks) -> None:
    two_ranks.run(top_subspace_of_zeros_and_changed)


def test_derivatives(ranks: Ranks) -> None:
    ranks.run(derivatives)

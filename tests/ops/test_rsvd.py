"""rsvd: values against the float64 SVD and the plain twin, conventions, tracing and errors."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import sculpt_ops
from sculpt_ops import reference

from .accuracy import gaussian, orthonormal

OP = torch.ops.sculpt.rsvd.default
LINALG_ERROR: Any = torch.linalg.LinAlgError  # type: ignore[attr-defined]
NAN, INF = float("nan"), float("inf")
SPECTRA = {
    "flat": torch.ones(60),
    "slow": torch.arange(1, 61) ** -0.5,
    "steep": torch.arange(1, 61) ** -2.0,
    "exponential": torch.logspace(0, -10, 60),
    "clustered": torch.tensor([10.0] * 6 + [1.0] * 20 + [0.1] * 34),
    "cut inside a cluster": torch.tensor([10.0] * 30 + [1.0] * 30),
    "rank 4": torch.tensor([5.0, 4.0, 3.0, 2.0] + [0.0] * 56),
}
SHAPES = [(90, 60), (60, 110), (60, 60)]
RANK = 10
# Of orthonormality, and of Uᵀ A V = S relative to the largest singular value.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def matrix_of(name: str, m: int, n: int, seed: int = 0) -> Tensor:
    spectrum = SPECTRA[name].double()
    return orthonormal(m, 60, torch.float64, seed) * spectrum @ orthonormal(n, 60, torch.float64, seed + 1).mT


def spectral(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, ord=2))


def residual(matrix: Tensor, U: Tensor, S: Tensor, V: Tensor) -> float:
    return spectral(matrix.double() - (U.double() * S.double()) @ V.double().mT)


def assert_triplets(matrix: Tensor, U: Tensor, S: Tensor, V: Tensor, rank: int) -> None:
    """Shapes, dtypes, orthonormal factors, Uᵀ A V = S descending, and the sign convention."""
    batch, (m, n) = matrix.shape[:-2], matrix.shape[-2:]
    assert (U.shape, S.shape, V.shape) == ((*batch, m, rank), (*batch, rank), (*batch, n, rank))
    dtype = torch.float64 if matrix.dtype is torch.float64 else torch.float32
    largest = U.gather(-2, U.abs().argmax(dim=-2, keepdim=True))
    assert bool((largest > 0).all())
    assert bool((S >= 0).all())
    assert bool((S.diff(dim=-1) <= 0).all())
    matrix, eye = matrix.double(), torch.eye(rank, dtype=torch.float64)
    for factor in (U, S, V):
        assert factor.dtype is dtype
        assert factor.is_contiguous()
    U, S, V = U.double(), S.double(), V.double()
    for factor in (U, V):
        assert float((factor.mT @ factor - eye).abs().max()) <= TOLERANCE[dtype]
    off = U.mT @ matrix @ V - torch.diag_embed(S)
    assert float(off.abs().max()) <= TOLERANCE[dtype] * float(matrix.norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_against_the_exact_svd_and_the_twin(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = matrix_of(name, *shape).to(dtype)
    exact = torch.linalg.svdvals(matrix.double())
    triplets = sculpt_ops.rsvd(matrix, RANK)
    assert_triplets(matrix, *triplets, RANK)
    floor = 20 * torch.finfo(dtype).eps * float(exact[0])
    error, optimum = residual(matrix, *triplets), float(exact[RANK])
    twin = residual(matrix, *reference.rsvd(matrix.double(), RANK))
    assert error <= 1.02 * twin + floor
    assert error <= 1.02 * optimum + floor
    # Singular values of a projection of the matrix: never above the exact ones.
    below = exact[:RANK] - triplets[1].double()
    assert float(below.min()) >= -floor
    assert float(below.max()) <= 0.02 * float(exact[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_vectors_are_the_exact_ones_where_the_spectrum_falls_fast(shape: tuple[int, int]) -> None:
    matrix = matrix_of("exponential", *shape)
    U, S, V = sculpt_ops.rsvd(matrix, RANK)
    exact_u, exact_s, exact_v = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(S, exact_s[:RANK], rtol=1e-10, atol=0)
    sign = (U * exact_u[:, :RANK]).sum(0).sgn()
    torch.testing.assert_close(U, exact_u[:, :RANK] * sign, rtol=0, atol=1e-8)
    torch.testing.assert_close(V, exact_v.mT[:, :RANK] * sign, rtol=0, atol=1e-8)


def test_small_singular_values_keep_their_digits() -> None:
    """Of a matrix with graded columns, an SVD of R knows 1e-9 of the largest to a few digits; a Gram matrix, none."""
    matrix = orthonormal(80, 30, torch.float64) * torch.logspace(0, -12, 30, dtype=torch.float64)
    S = sculpt_ops.rsvd(matrix, 20, n_iter=1)[1]
    torch.testing.assert_close(S, torch.logspace(0, -12, 30, dtype=torch.float64)[:20], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["slow", "clustered", "steep"])
def test_half_precision_matrices_give_float32_factors(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = matrix_of(name, *shape).to(dtype)
    exact = torch.linalg.svdvals(matrix.double())
    triplets = sculpt_ops.rsvd(matrix, RANK)
    assert_triplets(matrix, *triplets, RANK)
    assert residual(matrix, *triplets) <= 1.02 * float(exact[RANK]) + 1e-5 * float(exact[0])
    whole = sculpt_ops.rsvd(matrix, 60)
    assert residual(matrix, *whole) <= 1e-5 * float(exact[0])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 9), (9, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("n_iter", [0, 2])
def test_full_rank_is_the_whole_svd(shape: tuple[int, int], n_iter: int, dtype: torch.dtype) -> None:
    matrix, rank = gaussian(*shape, dtype=dtype), min(shape)
    triplets = sculpt_ops.rsvd(matrix, rank, n_iter=n_iter)
    assert_triplets(matrix, *triplets, rank)
    assert residual(matrix, *triplets) <= TOLERANCE[dtype] * spectral(matrix.double())


def test_options() -> None:
    """More iterations and a wider sketch each come closer; without either it is the plain range finder."""
    matrix = matrix_of("slow", 90, 60)
    coarse = residual(matrix, *sculpt_ops.rsvd(matrix, RANK, oversample=0, n_iter=0))
    wider = residual(matrix, *sculpt_ops.rsvd(matrix, RANK, oversample=20, n_iter=0))
    sharper = residual(matrix, *sculpt_ops.rsvd(matrix, RANK, oversample=20, n_iter=4))
    optimum = float(torch.linalg.svdvals(matrix)[RANK])
    assert coarse > wider > sharper >= optimum * (1 - 1e-12)
    assert sharper <= 1.0001 * optimum
    torch.testing.assert_close(
        sculpt_ops.rsvd(matrix, RANK, oversample=1000)[1], torch.linalg.svdvals(matrix)[:RANK], rtol=1e-12, atol=0
    )


def test_seeds_and_determinism() -> None:
    matrix = matrix_of("slow", 90, 60).float()
    before = matrix.clone()
    first = sculpt_ops.rsvd(matrix, RANK, seed=3, n_iter=0)
    again = sculpt_ops.rsvd(matrix, RANK, seed=3, n_iter=0)
    other = sculpt_ops.rsvd(matrix, RANK, seed=4, n_iter=0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(matrix, before)
    assert not torch.equal(first[0], other[0])
    large = sculpt_ops.rsvd(matrix, RANK, seed=-(2**63))
    assert_triplets(matrix, *large, RANK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_batches(dtype: torch.dtype) -> None:
    stack = [matrix_of(name, 70, 62, seed=i).to(dtype) for i, name in enumerate(("slow", "steep", "rank 4", "flat"))]
    stack = [*stack, torch.zeros(70, 62, dtype=dtype), gaussian(70, 62, dtype=dtype)]
    batch = torch.stack(stack).unflatten(0, (2, 3))
    triplets = sculpt_ops.rsvd(batch, RANK)
    assert_triplets(batch, *triplets, RANK)
    assert all(torch.equal(a, b) for a, b in zip(triplets, sculpt_ops.rsvd(batch, RANK), strict=True))
    for at, matrix in enumerate(stack):
        alone = sculpt_ops.rsvd(matrix, RANK)
        mine = [t.flatten(0, 1)[at] for t in triplets]
        limit = 1.01 * residual(matrix, *alone) + 1e-5 * spectral(matrix.double())
        assert residual(matrix, *mine) <= limit
        if at == 0:  # the same counters of the test matrix, so the same bits
            assert all(torch.equal(a, b) for a, b in zip(alone, mine, strict=True))


def test_empty_batch() -> None:
    U, S, V = sculpt_ops.rsvd(torch.empty(2, 0, 9, 7), 3)
    assert (U.shape, S.shape, V.shape) == ((2, 0, 9, 3), (2, 0, 3), (2, 0, 7, 3))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_zeros_and_extreme_scales(shape: tuple[int, int]) -> None:
    zeros = torch.zeros(shape)
    U, S, V = sculpt_ops.rsvd(zeros, RANK)
    assert_triplets(zeros, U, S, V, RANK)
    assert not S.any()
    for scale in (1e-30, 1e30):  # squares of float32 numbers of this size do not exist
        matrix = (matrix_of("steep", *shape) * scale).float()
        triplets = sculpt_ops.rsvd(matrix, RANK)
        assert_triplets(matrix, *triplets, RANK)
        assert residual(matrix, *triplets) <= 1.02 * scale * float(SPECTRA["steep"][RANK])


def test_strides_do_not_matter() -> None:
    matrix = matrix_of("exponential", 90, 60).float()
    spread = torch.full((180, 120), NAN)[::2, ::2]
    spread.copy_(matrix)
    for view in (matrix.t().contiguous().t(), spread):
        for mine, theirs in zip(sculpt_ops.rsvd(view, 4), sculpt_ops.rsvd(matrix, 4), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    expanded = matrix[:1].expand(30, 60)
    assert_triplets(expanded, *sculpt_ops.rsvd(expanded, 2), 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_start_takes_the_place_of_the_test_matrix(shape: tuple[int, int]) -> None:
    matrix = matrix_of("slow", *shape)
    V = torch.linalg.svd(matrix)[2].mT[:, :RANK].contiguous()
    optimum = float(torch.linalg.svdvals(matrix)[RANK])
    cold = residual(matrix, *sculpt_ops.rsvd(matrix, RANK, n_iter=0))
    warm = sculpt_ops.rsvd(matrix, RANK, n_iter=0, start=V)
    assert_triplets(matrix, *warm, RANK)
    assert residual(matrix, *warm) <= optimum * (1 + 1e-12) < 1.05 * optimum < cold
    for start in (V[:, :0], V[:, :3], torch.cat((V, gaussian(shape[1], 40)), dim=1), torch.zeros_like(V)):
        triplets = sculpt_ops.rsvd(matrix, RANK, start=start)
        assert_triplets(matrix, *triplets, RANK)
        assert residual(matrix, *triplets) <= 1.05 * optimum
    none, empty = sculpt_ops.rsvd(matrix, RANK), sculpt_ops.rsvd(matrix, RANK, start=V[:, :0])
    torch.testing.assert_close(empty, none)
    half = sculpt_ops.rsvd(matrix.bfloat16().unsqueeze(0), RANK, n_iter=0, start=V.float().unsqueeze(0))
    assert residual(matrix, *[t[0] for t in half]) <= 1.05 * optimum


def test_opcheck() -> None:
    wide, tall = gaussian(6, 9, dtype=torch.float32), gaussian(2, 9, 6)
    opcheck(OP, (wide, 3), {"n_iter": 1})
    opcheck(OP, (wide.requires_grad_(), 3, gaussian(9, 2, dtype=torch.float32)), {"oversample": 1, "seed": 5})
    opcheck(OP, (tall.requires_grad_(), 6))
    opcheck(OP, (gaussian(7, 7, dtype=torch.bfloat16).requires_grad_(), 2))


def test_compile_with_dynamic_shapes() -> None:
    compiled = torch.compile(lambda a: sculpt_ops.rsvd(a, 3, seed=1), fullgraph=True, dynamic=True)
    for m, n in ((7, 9), (12, 5), (30, 31)):
        matrix = gaussian(m, n)
        torch.testing.assert_close(compiled(matrix), sculpt_ops.rsvd(matrix, 3, seed=1))


class Module(torch.nn.Module):
    def forward(self, matrix: Tensor, start: Tensor) -> Tensor:
        U, S, V = sculpt_ops.rsvd(matrix, 3, n_iter=1, seed=2, start=start)
        return (U * S) @ V.mT


def test_export() -> None:
    args = gaussian(7, 9), gaussian(9, 2, seed=3)
    program: Any = torch.export.export(Module(), args)
    torch.testing.assert_close(program.module()(*args), Module()(*args))
    torch.testing.assert_close(program.run_decompositions().module()(*args), Module()(*args))


def test_export_of_any_height() -> None:
    class Wrapped(torch.nn.Module):
        def forward(self, matrix: Tensor) -> tuple[Tensor, ...]:
            return sculpt_ops.rsvd(matrix, 2)

    rows = torch.export.Dim("rows", min=6, max=100)
    program: Any = torch.export.export(Wrapped(), (gaussian(9, 5),), dynamic_shapes=({0: rows},))
    assert_all_equal(program.module()(gaussian(60, 5)), sculpt_ops.rsvd(gaussian(60, 5), 2))


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        *((torch.float32, scale) for scale in (2.0**122, 2.0**-100)),
        *((torch.bfloat16, scale) for scale in (2.0**122, 2.0**-100)),
        *((torch.float64, scale) for scale in (2.0**1000, 2.0**520, 2.0**-560, 2.0**-1000)),
    ],
)
def test_matrices_whose_squares_have_no_number(dtype: torch.dtype, scale: float) -> None:
    plain = torch.stack([matrix_of("slow", 60, 70), matrix_of("slow", 60, 70, 5)]).to(dtype).requires_grad_()
    scaled = (plain.detach() * torch.tensor([[[scale]], [[1.0]]], dtype=dtype)).requires_grad_()
    expected, (U, S, V) = sculpt_ops.rsvd(plain, RANK), sculpt_ops.rsvd(scaled, RANK)
    S = S / torch.tensor([[scale], [1.0]], dtype=S.dtype)
    for found, wanted in zip((U, S, V), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert not sculpt_ops.rsvd(torch.zeros_like(plain), RANK)[1].any()
    for matrix, values in ((plain, expected[1]), (scaled, S)):
        values[1].sum().backward()
        assert matrix.grad is not None
    torch.testing.assert_close(scaled.grad, plain.grad, rtol=1e-2, atol=1e-3)


def test_vmap_is_the_batched_call() -> None:
    batch, start = gaussian(4, 7, 9), gaussian(4, 9, 2, seed=3)

    def one(matrix: Tensor, first: Tensor | None = None) -> tuple[Tensor, ...]:
        return sculpt_ops.rsvd(matrix, 3, n_iter=1, oversample=1, start=first)

    assert_all_equal(torch.vmap(one)(batch), sculpt_ops.rsvd(batch, 3, n_iter=1, oversample=1))
    expected = sculpt_ops.rsvd(batch, 3, n_iter=1, oversample=1, start=start)
    assert_all_equal(torch.vmap(one, in_dims=(2, 1))(batch.movedim(0, 2), start.movedim(0, 1)), expected)
    expected = sculpt_ops.rsvd(batch, 3, n_iter=1, oversample=1, start=start[:1].expand_as(start))
    assert_all_equal(torch.vmap(one, in_dims=(0, None))(batch, start[0]), expected)
    expected = sculpt_ops.rsvd(batch[:1].expand_as(batch), 3, n_iter=1, oversample=1, start=start)
    assert_all_equal(torch.vmap(one, in_dims=(None, 0))(batch[0], start), expected)


def assert_all_equal(mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


A = torch.ones(4, 3)
WRONG: list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ("rank 0", (A, 0), {}, ValueError, r"rsvd: rank: given 0, wanted 1 to 3 for a matrix of shape \(4, 3\)"),
    ("negative rank", (A, -2), {}, ValueError, "rsvd: rank: given -2, wanted 1 to 3"),
    ("rank above min(m, n)", (A, 4), {}, ValueError, "rsvd: rank: given 4, wanted 1 to 3"),
    ("no rows", (torch.ones(0, 3), 1), {}, ValueError, "rsvd: rank: given 1, wanted 1 to 0"),
    ("1-d", (torch.ones(3), 1), {}, ValueError, r"given shape \(3,\), wanted a matrix \(\.\.\., m, n\)"),
    ("integer", (A.int(), 1), {}, TypeError, "given dtype int32, wanted float32"),
    ("complex", (A * 1j, 1), {}, TypeError, "given dtype complex64, wanted float32"),
    ("oversample", (A, 1), {"oversample": -1}, ValueError, "rsvd: oversample: given -1, wanted 0 or more"),
    ("n_iter", (A, 1), {"n_iter": -3}, ValueError, "rsvd: n_iter: given -3, wanted 0 or more"),
    ("start rows", (A, 1), {"start": torch.ones(4, 1)}, ValueError, r"start: given shape \(4, 1\), wanted \(3, j\)"),
    ("start 1-d", (A, 1), {"start": torch.ones(3)}, ValueError, r"start: given shape \(3,\), wanted \(3, j\)"),
    ("start batch", (A[None], 1), {"start": torch.ones(3, 1)}, ValueError, r"start: given .* wanted \(1, 3, j\)"),
    ("start dtype", (A, 1), {"start": torch.ones(3, 1).double()}, TypeError, "start: given dtype float64, wanted"),
    ("start device", (A, 1), {"start": torch.ones(3, 1, device="meta")}, ValueError, "start: given device meta"),
]  # fmt: skip
NOT_FINITE = [
    ("NaN", (torch.tensor([[1.0, NAN]]), 1), {}, "rsvd: matrix: given NaN or Inf, wanted finite numbers"),
    ("Inf", (torch.tensor([[1.0, INF]]), 1), {}, "rsvd: matrix: given NaN or Inf"),
    ("bf16 NaN", (torch.full((3, 3), NAN).bfloat16(), 1), {}, "rsvd: matrix: given NaN or Inf"),
    ("one of a batch", (torch.stack([A, A * INF]), 1), {}, "rsvd: matrix: given NaN or Inf"),
    ("start NaN", (A, 1), {"start": torch.full((3, 1), NAN)}, "rsvd: start: given NaN or Inf"),
]


@pytest.mark.parametrize(
    ("args", "options", "error", "words"),
    [w[1:] for w in WRONG] + [(*w[1:3], LINALG_ERROR, w[3]) for w in NOT_FINITE],
    ids=[w[0] for w in WRONG] + [w[0] for w in NOT_FINITE],
)
def test_refuses(args: tuple[Any, ...], options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        sculpt_ops.rsvd(*args, **options)


@pytest.mark.parametrize(("args", "options", "words"), [(w[1], w[2], w[4]) for w in WRONG], ids=[w[0] for w in WRONG])
def test_the_op_itself_refuses(args: tuple[Any, ...], options: dict[str, Any], words: str) -> None:
    positional = (*args, options["start"]) if "start" in options else args
    keyword = {k: v for k, v in options.items() if k != "start"}
    with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError)):
        OP(*positional, **keyword)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises((ValueError, TypeError), match=words):
        OP(*[mode.from_tensor(p) if isinstance(p, Tensor) else p for p in positional], **keyword)


def test_finite_numbers_whose_squares_overflow_are_not_refused() -> None:
    matrix = torch.full((4, 3), 3e38)
    assert bool(torch.linalg.vector_norm(matrix).isinf())
    half = torch.full((300, 200), 6e4, dtype=torch.float16)
    S = sculpt_ops.rsvd(half, 1)[1]
    torch.testing.assert_close(S, torch.tensor([6e4 * 60000**0.5]), rtol=1e-3, atol=0)
    assert bool(sculpt_ops.rsvd(matrix / 16, 1)[0].isfinite().all())


def test_graph_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["sculpt_ops.ops.rsvd"], "is_capturing", lambda _: True)
    with pytest.raises(RuntimeError, match="rsvd: matrix: given during CUDA graph capture, wanted a call outside it"):
        sculpt_ops.rsvd(A, 1)


def test_non_finite_input_is_left_to_the_caller_where_no_value_can_be_read() -> None:
    """Under tracing the check would need the host; shapes are still checked."""
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.full((4, 3), NAN))
        assert sculpt_ops.rsvd(fake, 2)[0].shape == (4, 2)
        with pytest.raises(ValueError, match="rsvd: rank: given 9"):
            sculpt_ops.rsvd(fake, 9)
    assert sculpt_ops.rsvd(torch.empty(4, 3, device="meta"), 2)[2].shape == (3, 2)

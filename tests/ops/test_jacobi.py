"""SVD by Jacobi rotations on the CPU: values against float64, small singular values, ranks, tracing, errors; and its
schedule and rotation by themselves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from sculpt_ops import _host, reference
from sculpt_ops.ops.jacobi import MAX_SIZE, jacobi_on_gpu, jacobi_svd

from .accuracy import gaussian, orthonormal
from .jacobi_cases import EPS, F64, KEPT, SIZES, cases, check, check_kept

OP = torch.ops.sculpt._jacobi_svd.default
NAN, INF = float("nan"), float("inf")
LINALG_ERROR: Any = torch.linalg.LinAlgError  # type: ignore[attr-defined]


@pytest.mark.parametrize("q", SIZES)
def test_values_of_every_kind(q: int) -> None:
    for kind, matrix in cases(q).items():
        before = matrix.clone()
        U, S, V = jacobi_svd(matrix)
        check(matrix, U, S, V)
        assert torch.equal(matrix, before), kind
        if kind in KEPT:
            check_kept(matrix, S)


@given(q=st.integers(1, 24), rank=st.integers(0, 24), grade=st.integers(0, 12), exponent=st.integers(-30, 30))
def test_values_of_any_matrix(q: int, rank: int, grade: int, exponent: int) -> None:
    seed = 1000 * q + 40 * rank + grade
    columns = torch.logspace(0, -grade, q, dtype=F64)
    matrix = gaussian(q, min(rank, q), seed=seed) @ gaussian(min(rank, q), q, seed=seed + 1)
    matrix = (matrix * columns * 10.0**exponent).float()
    check(matrix, *jacobi_svd(matrix))


@given(entries=st.lists(st.integers(-3, 3), min_size=16, max_size=16))
def test_matrices_of_small_integers(entries: list[int]) -> None:
    """Equal, opposite and zero columns, and exact cancellation."""
    matrix = torch.tensor(entries, dtype=torch.float32).view(4, 4)
    check(matrix, *jacobi_svd(matrix))


def test_a_batch_of_different_matrices_is_each_by_itself() -> None:
    kinds = list(cases(33).values())
    batch = torch.stack(kinds + kinds[::-1]).unflatten(0, (2, -1))
    U, S, V = jacobi_svd(batch)
    assert (U.shape, S.shape, V.shape) == (batch.shape, batch.shape[:-1], batch.shape)
    for i, matrix in enumerate(kinds):
        for of_batch, alone in zip((U, S, V), jacobi_svd(matrix), strict=True):
            assert torch.equal(of_batch[0, i], alone)
            assert torch.equal(of_batch[1, len(kinds) - 1 - i], alone)


def test_threads_do_not_change_the_result() -> None:
    batch = gaussian(7, 40, 40, dtype=torch.float32)
    parallel = jacobi_svd(batch)
    try:
        torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(parallel, jacobi_svd(batch), strict=True))
    finally:
        torch.set_num_threads(2)


def test_any_strides() -> None:
    room = gaussian(3, 20, 40, dtype=torch.float32)
    for view in (room[:, :, ::2], room[:, :, :20].mT, room[:1, :, :20].expand(4, 20, 20)):
        for ours, copied in zip(jacobi_svd(view), jacobi_svd(view.contiguous()), strict=True):
            assert torch.equal(ours, copied)


def test_zero_singular_values_have_vectors_too() -> None:
    for q in (1, 2, 5, 40):
        U, S, V = jacobi_svd(torch.zeros(q, q))
        assert torch.equal(U, torch.eye(q))
        assert torch.equal(V, torch.eye(q))
        assert torch.equal(S, torch.zeros(q))
    # Below 9e-16 of the largest entry.
    S = jacobi_svd(torch.diag(torch.tensor([1.0, 1e-14, 1e-16])))[1]
    torch.testing.assert_close(S, torch.tensor([1.0, 1e-14, 0.0]), rtol=1e-6, atol=0)


def test_the_twin_is_near() -> None:
    matrix = (orthonormal(30, 30, F64) * torch.arange(30, 0, -1) @ orthonormal(30, 30, F64, 7).mT).float()
    ours, twin = jacobi_svd(matrix), reference.jacobi_svd(matrix)
    torch.testing.assert_close(ours[1], twin[1], rtol=1e-5, atol=0)
    sign = (ours[0] * twin[0]).sum(0).sgn()
    torch.testing.assert_close(ours[0], twin[0] * sign, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours[2], twin[2] * sign, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 0), (0, 3, 3), (2, 0, 0), (0, 5, 0, 0)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    U, S, V = jacobi_svd(torch.empty(shape))
    assert (U.shape, S.shape, V.shape) == (shape, shape[:-1], shape)


@pytest.mark.parametrize("shape", [(5, 5), (2, 3, 4, 4), (0, 0)], ids=str)
def test_opcheck(shape: tuple[int, ...]) -> None:
    opcheck(OP, (gaussian(*shape, dtype=torch.float32),))


def test_compile_in_one_graph() -> None:
    matrix = gaussian(6, 6, dtype=torch.float32)
    fast = torch.compile(lambda m: jacobi_svd(m)[1].sum(), fullgraph=True, backend="aot_eager")
    assert torch.equal(fast(matrix), jacobi_svd(matrix)[1].sum())


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_what_is_not_finite_is_refused_and_stays_in_its_matrix(value: float) -> None:
    batch = gaussian(3, 9, 9, dtype=torch.float32)
    batch[1, 4, 2] = value
    with pytest.raises(LINALG_ERROR, match="_jacobi_svd: input: given NaN or Inf"):
        jacobi_svd(batch)
    for factor in OP(batch):  # as in a graph or while tracing, where nobody looks
        assert factor[1].isnan().all()
        assert factor[[0, 2]].isfinite().all()


WRONG = {
    "one dimension": (torch.zeros(3), r"input: .*\(3,?\)"),
    "not square": (torch.zeros(2, 3), r"input: .*\(2, 3\)"),
    "too large": (torch.zeros(161, 161), r"input: .*\(161, 161\)|input: .*at most 160"),
    "float64": (torch.zeros(2, 2, dtype=F64), "input: .*float32"),
    "bfloat16": (torch.zeros(2, 2, dtype=torch.bfloat16), "input: .*float32"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_errors(wrong: str) -> None:
    matrix, words = WRONG[wrong]
    with pytest.raises((ValueError, TypeError), match=f"_jacobi_svd: {words}"):
        jacobi_svd(matrix)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=f"_jacobi_svd: {words}"):  # the C++ checks
        jacobi_svd(matrix)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises((ValueError, TypeError), match=words):
        jacobi_svd(mode.from_tensor(matrix))


def test_what_requires_grad_is_refused() -> None:
    leaf = torch.zeros(3, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="_jacobi_svd: input: given a tensor that requires grad"):
        jacobi_svd(leaf)
    with torch.no_grad():
        assert jacobi_svd(leaf)[1].shape == (3,)


def test_rsvd_takes_it_on_a_gpu_where_it_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_SIZE == 160
    monkeypatch.setattr("sculpt_ops.ops.jacobi.cuda_missing", lambda: None)
    device = torch.device("cpu")
    assert jacobi_on_gpu(torch.float32, 160, device)
    assert not jacobi_on_gpu(torch.float32, 161, device)
    assert not jacobi_on_gpu(torch.float64, 80, device)
    monkeypatch.setattr("sculpt_ops.ops.jacobi._has_code", lambda index: index != 1)
    assert jacobi_on_gpu(torch.float32, 80, torch.device("cuda", 0))
    assert not jacobi_on_gpu(torch.float32, 80, torch.device("cuda", 1))
    monkeypatch.setattr("sculpt_ops.ops.jacobi.cuda_missing", lambda: "not built")
    assert not jacobi_on_gpu(torch.float32, 80, device)


@pytest.mark.parametrize("q", [1, 2, 3, 4, 7, 64, 159, 160])
def test_every_pair_of_columns_meets_once_a_sweep(q: int) -> None:
    rounds = _host.jacobi_rounds(q)
    assert len(rounds) == q - 1 + q % 2
    met = [pair for pairs in rounds for pair in pairs]
    assert sorted(met) == [(i, j) for i in range(q) for j in range(i + 1, q)]
    for pairs in rounds:
        columns = [column for pair in pairs for column in pair]
        assert len(columns) == len(set(columns)) == q - q % 2


@given(
    alpha=st.floats(-12, 2), beta=st.floats(-12, 2), angle=st.floats(-1, 1)
)  # exponents of the norms, cosine of the angle
def test_a_rotation_makes_two_columns_orthogonal(alpha: float, beta: float, angle: float) -> None:
    a, b = 10.0**alpha, 10.0**beta
    gamma = angle * a * b
    sine, ratio, turns = _host.jacobi_rotation(a * a, b * b, gamma, 16)
    threshold = 4 * 2.0**-24
    if abs(angle) < 0.999 * threshold:
        assert not turns
        return
    if abs(angle) > 1.001 * threshold:
        assert turns
        cosine = 1 - sine * ratio
        assert cosine >= math.sqrt(0.5) * (1 - 1e-6)
        assert abs(cosine**2 + sine**2 - 1) <= EPS
        product = (cosine**2 - sine**2) * gamma + sine * cosine * (a * a - b * b)
        assert abs(product) <= 8 * EPS * (abs(gamma) + abs(sine) * max(a, b) ** 2)


@pytest.mark.parametrize(
    "squares", [(1.0, 0.0, 0.0), (0.0, 0.0, 0.0), (1e-31, 1.0, 1e-16), (NAN, 1.0, 0.5), (1.0, 1.0, NAN)]
)
def test_what_is_never_turned(squares: tuple[float, float, float]) -> None:
    """Columns of zeros, of less than 2^-100, and NaN."""
    assert _host.jacobi_rotation(*squares, 16) == (0.0, 0.0, False)


def test_the_other_results_are_not_of_the_input() -> None:
    matrix: Tensor = torch.eye(4)
    for factor in jacobi_svd(matrix):
        assert factor.data_ptr() != matrix.data_ptr()

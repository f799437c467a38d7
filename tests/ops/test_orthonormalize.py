"""orthonormalize: values on hard matrices, the gradient, tracing and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import sculpt_ops
from sculpt_ops import reference

from .accuracy import DTYPES, gaussian, orthonormal

OP = torch.ops.sculpt.orthonormalize.default
LINALG_ERROR: Any = torch.linalg.LinAlgError  # type: ignore[attr-defined]
FULL = [torch.float32, torch.float64]
ORTHONORMAL = {torch.float32: 1e-5, torch.float64: 1e-13}
# Of a column's own norm: what QR by Householder leaves too, times a few.
BACKWARD = {torch.float32: 3e-6, torch.float64: 1e-14}


def conditioned(m: int, q: int, condition: float) -> Tensor:
    spectrum = torch.logspace(0, -float(torch.tensor(condition).log10()), q, dtype=torch.float64)
    return orthonormal(m, q, torch.float64) * spectrum @ orthonormal(q, q, torch.float64, seed=3).mT


def hard_matrices() -> dict[str, Tensor]:
    base = gaussian(70, 24)
    zeros, copies = base.clone(), base.clone()
    zeros[:, [0, 5, 6, 23]] = 0
    copies[:, [4, 9, 20]] = base[:, [3, 3, 19]]
    index = torch.arange(40, dtype=torch.float64)
    integers = gaussian(60, 5, seed=4).mul(3).round() @ gaussian(5, 20, seed=5).mul(3).round()
    return {
        **{f"condition {c:.0e}": conditioned(300, 40, c) for c in (1.0, 1e3, 1e5, 1e7, 1e10)},
        "columns of norm 1 to 1e-30": base * torch.logspace(0, -30, 24, dtype=torch.float64),
        "columns of norm 1e30 to 1e-30": base * torch.logspace(30, -30, 24, dtype=torch.float64),
        "columns of growing norm": base * torch.logspace(-10, 10, 24, dtype=torch.float64),
        "zero columns": zeros,
        "duplicated columns": copies,
        "all zeros": torch.zeros(30, 8, dtype=torch.float64),
        "all equal": torch.ones(50, 12, dtype=torch.float64),
        "integers of rank 5": integers,
        "Hilbert": 1 / (index.unsqueeze(1) + index + 1),
        "square": gaussian(48, 48),
        "square of rank 20": gaussian(48, 20) @ gaussian(20, 48, seed=2),
        "square zeros": torch.zeros(9, 9, dtype=torch.float64),
        "one column": gaussian(33, 1),
        "one number": gaussian(1, 1),
        "identity": torch.eye(20, 7, dtype=torch.float64),
    }


HARD = hard_matrices()


def assert_factor(matrix: Tensor, Q: Tensor) -> None:
    """Q orthonormal; every column of the matrix within the span of as many columns of Q; R's diagonal not negative."""
    dtype = Q.dtype
    assert Q.shape == matrix.shape
    assert bool(Q.isfinite().all())
    Q, matrix = Q.double(), matrix.double()
    q = Q.shape[-1]
    assert (
        float(torch.linalg.matrix_norm(Q.mT @ Q - torch.eye(q, dtype=torch.float64), ord=2).max()) <= ORTHONORMAL[dtype]
    )
    norms = torch.linalg.vector_norm(matrix, dim=-2, keepdim=True)
    matrix = matrix / torch.where(norms > 0, norms, 1.0)
    R = Q.mT @ matrix
    limit = BACKWARD[dtype] * max(1.0, q / 8) ** 0.5
    assert float(R.tril(-1).abs().max()) <= limit
    assert float(torch.linalg.vector_norm(matrix - Q @ R, dim=-2).max()) <= limit
    assert float(R.diagonal(dim1=-2, dim2=-1).min()) >= -limit


@pytest.mark.parametrize("dtype", FULL, ids=str)
@pytest.mark.parametrize("name", HARD)
def test_hard_matrices(name: str, dtype: torch.dtype) -> None:
    matrix = HARD[name].to(dtype)
    assert_factor(matrix, sculpt_ops.orthonormalize(matrix))


@pytest.mark.parametrize("dtype", FULL, ids=str)
def test_hard_matrices_in_one_batch(dtype: torch.dtype) -> None:
    pool = [HARD[name][:30, :8] for name in ("zero columns", "all zeros", "all equal", "Hilbert", "square of rank 20")]
    batch = torch.stack([*pool, gaussian(30, 8)]).to(dtype).unflatten(0, (2, 3))
    assert_factor(batch, sculpt_ops.orthonormalize(batch))


@pytest.mark.parametrize("dtype", FULL, ids=str)
@pytest.mark.parametrize("shape", [(70, 24), (48, 48), (2, 3, 20, 6), (500, 3)], ids=str)
def test_equals_householder_qr_with_a_positive_diagonal(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    matrix = gaussian(*shape)
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-12}[dtype]
    expected = reference.orthonormalize(matrix)
    torch.testing.assert_close(sculpt_ops.orthonormalize(matrix.to(dtype)).double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_dtype_and_half_precision_input(dtype: torch.dtype) -> None:
    matrix = gaussian(40, 10, dtype=dtype)
    Q = sculpt_ops.orthonormalize(matrix)
    assert Q.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert Q.is_contiguous()
    assert_factor(matrix, Q)


@pytest.mark.parametrize("shape", [(5, 0), (0, 0), (0, 6, 3), (2, 0, 0), (3, 4, 0)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    assert sculpt_ops.orthonormalize(torch.empty(shape)).shape == shape


def test_strides_do_not_matter() -> None:
    matrix = gaussian(40, 12, dtype=torch.float32)
    wide = torch.full((80, 30), torch.nan)
    spread = wide[::2, 3:27:2]
    spread.copy_(matrix)
    expected = sculpt_ops.orthonormalize(matrix)
    for view in (matrix.t().contiguous().t(), spread):
        torch.testing.assert_close(sculpt_ops.orthonormalize(view), expected, rtol=0, atol=2e-6)
    expanded = matrix[:, :1].expand(40, 4)
    assert_factor(expanded, sculpt_ops.orthonormalize(expanded))


@pytest.mark.parametrize("name", ["square of rank 20", "condition 1e+07"])
def test_the_same_bits_every_time(name: str) -> None:
    matrix = HARD[name].float()
    before = matrix.clone()
    first = sculpt_ops.orthonormalize(matrix)
    assert torch.equal(sculpt_ops.orthonormalize(matrix), first)
    assert torch.equal(matrix, before)
    batch = torch.stack([gaussian(*matrix.shape, dtype=torch.float32), matrix])
    assert torch.equal(sculpt_ops.orthonormalize(batch)[1], first)


@pytest.mark.parametrize("shape", [(6, 3), (5, 5), (2, 6, 3), (4, 1)], ids=str)
def test_gradcheck_twice(shape: tuple[int, ...]) -> None:
    matrix = gaussian(*shape).requires_grad_()
    assert gradcheck(sculpt_ops.orthonormalize, (matrix,))
    assert gradgradcheck(sculpt_ops.orthonormalize, (matrix,))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("condition", [1.0, 1e3])
def test_gradient_equals_that_of_qr(condition: float, dtype: torch.dtype, tolerance: float) -> None:
    half = dtype is torch.bfloat16  # whose rounding of the matrix is no error of the gradient
    if half and condition > 1:
        condition = 10.0
    matrix = conditioned(50, 12, condition).to(dtype)
    weights = gaussian(50, 12, seed=8)
    ours, exact = matrix.clone().requires_grad_(), matrix.double().requires_grad_()
    (sculpt_ops.orthonormalize(ours) * weights).sum().backward()
    (reference.orthonormalize(exact) * weights).sum().backward()
    assert ours.grad is not None
    assert exact.grad is not None
    assert ours.grad.dtype is dtype
    tolerance = 4 * condition * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    tolerance += torch.finfo(dtype).eps / 2
    assert float((ours.grad.double() - exact.grad).norm()) <= tolerance * float(exact.grad.norm())


def test_opcheck() -> None:
    opcheck(OP, (gaussian(9, 4, dtype=torch.float32),))
    opcheck(OP, (gaussian(2, 9, 4).requires_grad_(),))
    opcheck(OP, (gaussian(9, 4, dtype=torch.bfloat16).requires_grad_(),))
    opcheck(OP, (gaussian(4, 9, dtype=torch.float32).t(),))


def test_compile_fullgraph_with_its_backward() -> None:
    weights = gaussian(9, 4, dtype=torch.float32, seed=6)

    def step(matrix: Tensor) -> Tensor:
        return sculpt_ops.orthonormalize(matrix * 2) * weights

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        leaf = gaussian(9, 4, dtype=torch.float32).requires_grad_()
        out = function(leaf)
        out.sum().backward()
        assert leaf.grad is not None
        results.append((out.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1])


class Module(torch.nn.Module):
    def forward(self, matrix: Tensor) -> Tensor:
        return sculpt_ops.orthonormalize(matrix)


def test_export() -> None:
    matrix = gaussian(9, 4, dtype=torch.float32)
    program: Any = torch.export.export(Module(), (matrix,))
    torch.testing.assert_close(program.module()(matrix), sculpt_ops.orthonormalize(matrix))


def test_vmap_is_the_batched_call() -> None:
    batch = gaussian(3, 5, 9, 4, dtype=torch.float32)
    expected = sculpt_ops.orthonormalize(batch)
    assert torch.equal(torch.vmap(torch.vmap(sculpt_ops.orthonormalize))(batch), expected)
    moved = torch.vmap(sculpt_ops.orthonormalize, in_dims=2, out_dims=1)(batch[0].movedim(0, 2))
    torch.testing.assert_close(moved, sculpt_ops.orthonormalize(batch[0]).movedim(0, 1))


WRONG: list[tuple[str, Tensor, type[Exception], str]] = [
    ("wide", torch.ones(3, 4), ValueError, r"orthonormalize: input: given shape \(3, 4\), wanted .* q at most m"),
    ("1-d", torch.ones(3), ValueError, r"orthonormalize: input: given shape \(3,\), wanted a matrix"),
    ("integer", torch.ones(4, 3, dtype=torch.int32), TypeError, "orthonormalize: input: given dtype int32, wanted"),
    ("complex", torch.ones(4, 3, dtype=torch.complex64), TypeError, "input: given dtype complex64, wanted"),
    ("NaN", torch.tensor([[1.0], [float("nan")]]), LINALG_ERROR, "orthonormalize: input: given NaN or Inf, wanted"),
    ("Inf", torch.tensor([[1.0], [-float("inf")]]), LINALG_ERROR, "orthonormalize: input: given NaN or Inf, wanted"),
]


@pytest.mark.parametrize(("input", "error", "words"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_refuses(input: Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        sculpt_ops.orthonormalize(input)


@pytest.mark.parametrize("input", [w[1] for w in WRONG[:4]], ids=[w[0] for w in WRONG[:4]])
def test_the_op_itself_refuses(input: Tensor) -> None:
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        OP(input)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises((ValueError, TypeError), match="input: given"):
        OP(mode.from_tensor(input))

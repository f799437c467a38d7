"""The sketch of a matrix and the test matrix Ω that it is taken with.

Source: the randomized range finder of Halko, Martinsson and Tropp, SIAM Review 53 (2011), section 4. Ω is a function of
the seed and of an entry's position alone (Philox4x32-10, ``csrc/common/philox.h``), the same to the bit on every
device, so that shards of a matrix agree on it without communicating.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .checks import check_sketch
from .cuda import triton_missing
from .derivatives import register_backward
from .library import LIBRARY, transformed_without_autocast

__all__ = ["sketch", "test_matrix"]

_SKETCH = torch.ops.sculpt.sketch.default
_TEST_MATRIX = torch.ops.sculpt.test_matrix.default


def sketch(
    input: Tensor,
    q: int,
    *,
    seed: int,
    transpose: bool = False,
    rademacher: bool = False,
    row: int = 0,
    column: int = 0,
) -> Tensor:
    """``input @ Ω``, or ``inputᵀ @ Ω``, with Ω = :func:`test_matrix` of the same arguments.

    Args:
        input: (..., m, n), float32, float64, bfloat16 or float16; any strides.
        q: columns of Ω, 0 or more; may exceed m and n.
        seed: any signed 64-bit integer.
        transpose: sketch the rows: ``inputᵀ @ Ω`` with Ω (..., m, q).
        rademacher: entries of Ω are -1 or 1 instead of normal.
        row, column: where in the whole Ω its first row and column lie. ``sketch(A, 16, column=8)`` is the last 16
            columns of ``sketch(A, 24)``; the sum of ``sketch(A[:, a:b], q, row=a)`` over column shards of A is
            ``sketch(A, q)``.

    Returns:
        (..., m, q), with ``transpose`` (..., n, q): float64 for a float64 input, else float32.

    Differentiable in ``input`` to any order, in forward mode and under torch.func too. Under vmap a mapped matrix gets
    the Ω of its place in the batch, as without vmap.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what was wanted.
    """
    check_sketch("sketch", input, q, transpose, row, column)
    with transformed_without_autocast(input):
        out: Tensor = _SKETCH(input, q, seed=seed, transpose=transpose, rademacher=rademacher, row=row, column=column)
    return out


def test_matrix(
    input: Tensor,
    q: int,
    *,
    seed: int,
    transpose: bool = False,
    rademacher: bool = False,
    row: int = 0,
    column: int = 0,
) -> Tensor:
    """Ω of :func:`sketch`: (..., n, q), with ``transpose`` (..., m, q), for an ``input`` of (..., m, n).

    Of ``input`` only shape, dtype and device count. Entry (i, j) of batch entry b (b counts over all leading
    dimensions) comes from word ``(column + j) % 4`` of Philox4x32-10 with the two halves of ``seed`` as key and counter
    (row + i, (column + j) // 4, b, 0). Normals are at most 5.77. float32, its values rounded to the dtype of a bfloat16
    or float16 input; for a float64 input the same float32 numbers in float64. Not differentiable.

    Raises:
        ValueError, TypeError: as :func:`sketch`.
    """
    check_sketch("test_matrix", input, q, transpose, row, column)
    out: Tensor = _TEST_MATRIX(input, q, seed=seed, transpose=transpose, rademacher=rademacher, row=row, column=column)
    return out


def _result_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype is torch.float64 else torch.float32


@torch.library.register_fake("sculpt::test_matrix")
def _test_matrix_fake(
    input: Tensor,
    q: int,
    *,
    seed: int,
    transpose: bool = False,
    rademacher: bool = False,
    row: int = 0,
    column: int = 0,
) -> Tensor:
    check_sketch("test_matrix", input, q, transpose, row, column)
    rows = input.shape[-2 if transpose else -1]
    return input.new_empty((*input.shape[:-2], rows, q), dtype=_result_dtype(input))


@torch.library.register_fake("sculpt::sketch")
def _sketch_fake(
    input: Tensor,
    q: int,
    *,
    seed: int,
    transpose: bool = False,
    rademacher: bool = False,
    row: int = 0,
    column: int = 0,
) -> Tensor:
    check_sketch("sketch", input, q, transpose, row, column)
    rows = input.shape[-1 if transpose else -2]
    return input.new_empty((*input.shape[:-2], rows, q), dtype=_result_dtype(input))


def test_matrix_cuda(
    input: Tensor,
    q: int,
    *,
    seed: int,
    transpose: bool = False,
    rademacher: bool = False,
    row: int = 0,
    column: int = 0,
) -> Tensor:
    check_sketch("test_matrix", input, q, transpose, row, column)
    if triton_missing():
        return reference.test_matrix(
            input, q, seed=seed, transpose=transpose, rademacher=rademacher, row=row, column=column
        )
    from ..triton_kernels.philox import fill_test_matrix

    rows = input.shape[-2 if transpose else -1]
    out = input.new_empty((*input.shape[:-2], rows, q), dtype=_result_dtype(input))
    rounding = input.dtype if input.dtype in (torch.bfloat16, torch.float16) else None
    fill_test_matrix(out, seed, row, column, rademacher=rademacher, rounding=rounding)
    return out


LIBRARY.impl("test_matrix", test_matrix_cuda, "CUDA")
# A constant as far as autograd is concerned.
LIBRARY.impl("test_matrix", torch.library.fallthrough_kernel, "Autograd")


def _sketch_expression(input: Tensor, q: int, **keywords: Any) -> Tensor:
    check_sketch("sketch", input, q, keywords["transpose"], keywords["row"], keywords["column"])
    omega = _TEST_MATRIX(input, q, **keywords)
    return torch.matmul((input.mT if keywords["transpose"] else input).to(omega.dtype), omega)


def _sketch_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    input, ctx.q = inputs
    ctx.shape, ctx.dtype, ctx.keywords = input.shape, input.dtype, keyword_only_inputs


def _sketch_backward(ctx: Any, go: Tensor) -> tuple[Tensor, None]:
    like = go.new_empty((), dtype=ctx.dtype).expand(ctx.shape)  # its shape counts alone
    omega = _TEST_MATRIX(like, ctx.q, **ctx.keywords)
    found = omega @ go.mT if ctx.keywords["transpose"] else go @ omega.mT
    return found.to(ctx.dtype), None


register_backward(_SKETCH, _sketch_backward, _sketch_setup, expression=_sketch_expression)


@torch.library.register_vmap("sculpt::test_matrix")
def _test_matrix_vmap(
    info: Any, in_dims: tuple[int, ...], input: Tensor, q: int, **keywords: Any
) -> tuple[Tensor, int]:
    return _TEST_MATRIX(input.movedim(in_dims[0], 0), q, **keywords), 0


@torch.library.register_vmap("sculpt::sketch")
def _sketch_vmap(info: Any, in_dims: tuple[int, ...], input: Tensor, q: int, **keywords: Any) -> tuple[Tensor, int]:
    return _SKETCH(input.movedim(in_dims[0], 0), q, **keywords), 0

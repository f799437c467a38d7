"""``orthonormalize``: an orthonormal basis of the span of the columns, nested as in Gram-Schmidt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .checks import check_orthonormalize
from .derivatives import register_backward
from .finite import check_finite
from .library import transformed_without_autocast

__all__ = ["orthonormalize"]

_ORTHONORMALIZE = torch.ops.sculpt.orthonormalize.default


def orthonormalize(input: Tensor) -> Tensor:
    """The Q of ``input = Q R``, with R upper triangular and its diagonal positive.

    Args:
        input: (..., m, q), m >= q; float32, float64, bfloat16 or float16, any strides. The scale of a column does not
            matter.

    Returns:
        (..., m, q) with ``QᵀQ = I`` to 1e-5 in float32 at any condition number; float64 for float64 input, otherwise
        float32. The first j columns of Q span those of ``input``, for every j. A column that depends on those before
        it to working precision (a zero column too) gives a direction orthogonal to all the others instead.

    Differentiable, twice too: the gradient is that of Q in the QR decomposition (Walter and Lehmann, "Algorithmic
    differentiation of linear algebra functions", 2010) and is defined where the columns are independent. With a
    dependent column it is Inf, NaN or large without meaning. Forward-mode derivatives and those of ``torch.func`` are
    those of the Householder QR in :mod:`sculpt_ops.reference`.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what was wanted.
        torch.linalg.LinAlgError: the input holds NaN or Inf; checked in eager mode only, not while a CUDA graph is
            captured.
    """
    check_orthonormalize(input)
    check_finite("orthonormalize", "input", input)
    with transformed_without_autocast(input):
        basis: Tensor = _ORTHONORMALIZE(input)
    return basis


@torch.library.register_fake("sculpt::orthonormalize")
def _fake(input: Tensor) -> Tensor:
    check_orthonormalize(input)
    return input.new_empty(input.shape, dtype=torch.promote_types(input.dtype, torch.float32))


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


def _backward(ctx: Any, gQ: Tensor) -> Tensor:
    """``(gQ - Q M) R⁻ᵀ`` with M the upper triangle of ``Qᵀ gQ`` mirrored below."""
    input, Q = ctx.saved_tensors
    # Float64 for R⁻ᵀ: at condition 1e7 nothing of a float32 solve is left.
    matrix, Q, gQ = input.double(), Q.double(), gQ.double()
    R = (Q.mT @ matrix).triu()
    overlap = Q.mT @ gQ
    mirrored = overlap.triu() + overlap.triu(1).mT
    gradient: Tensor = torch.linalg.solve_triangular(R.mT, gQ - Q @ mirrored, upper=False, left=False)
    return gradient.to(input.dtype)


def _expression(input: Tensor) -> Tensor:
    check_orthonormalize(input)
    # As the gradient of `_backward`: in float32 it is a hundred times less exact at condition 1e6.
    return reference.orthonormalize(input.double()).to(torch.promote_types(input.dtype, torch.float32))


register_backward(_ORTHONORMALIZE, _backward, _setup, expression=_expression)


@torch.library.register_vmap("sculpt::orthonormalize")
def _vmap(info: Any, in_dims: tuple[int], input: Tensor) -> tuple[Tensor, int]:
    return _ORTHONORMALIZE(input.movedim(in_dims[0], 0)), 0

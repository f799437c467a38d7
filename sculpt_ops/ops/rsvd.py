"""``rsvd``: the top singular triplets by a randomized range finder.

Source: Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 53 (2011), arXiv 0909.4061:
algorithm 4.4 (power iterations, re-orthonormalised each half step), then 5.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..triton_kernels.tables import is_capturing
from .checks import check_rsvd
from .derivatives import register_backward
from .finite import check_finite, has_values
from .jacobi import jacobi_on_gpu
from .svd_gradient import svd_gradient

__all__ = ["rsvd"]

_RSVD = torch.ops.sculpt.rsvd.default


def rsvd(
    matrix: Tensor,
    rank: int,
    *,
    oversample: int = 16,
    n_iter: int = 2,
    seed: int = 0,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The top ``rank`` singular triplets: ``matrix ≈ U diag(S) Vᵀ``.

    Args:
        matrix: (..., m, n); float32, float64, bfloat16 or float16, any strides.
        rank: from 1 to min(m, n).
        oversample: columns that the sketch is wider than ``rank``; clipped to what min(m, n) allows.
        n_iter: power iterations, two products each: 0 is enough where the spectrum falls off a cliff, a flat one takes
            more than 2 for the vectors next to the cut (``top_subspace`` goes on until the energy has converged).
        seed: of the test matrix; the same on every device. Same seed, same device: the same bits.
        start: (..., n, j), matrix's leading dimensions: columns in place of the first j of the test matrix, such as
            the V of an earlier, similar matrix. Those beyond its width, ``rank + oversample``, are left out. Float32,
            or float64 with a float64 matrix.

    Returns:
        U (..., m, rank), S (..., rank), descending, V (..., n, rank), not transposed; float64 for a float64 matrix,
        otherwise float32: a half-precision matrix gives factors of nearly float32 accuracy. The entry of largest
        magnitude in each column of U is positive.

    Differentiable once, in ``matrix``: the gradient of the exact truncated decomposition at U, S and V; in U and V the
    part of the spectrum that was cut off takes its share. With S alone it costs next to nothing, otherwise an
    eigendecomposition of the shorter side in float64. It is exact for functions that do not depend on the signs of
    the triplets, and for others too as long as the largest entries of U stay where they are. Where ``n_iter`` has not
    converged it is off by as much as U and V are. A second derivative is refused.

    Equal singular values: a function that depends on how their vectors are mixed, or tells S_k from an equal S_k+1
    that was cut off, has no gradient there. What is returned is finite: each 1/(s_i - s_j) is ``x / (x² + (e S_1)²)``
    with e = eps^(3/4) (6e-6, or 2e-12 for float64), so equal values do not act on each other. Zero singular values
    likewise.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what was wanted.
        torch.linalg.LinAlgError: the matrix holds NaN or Inf; checked in eager mode only.
        RuntimeError: during CUDA graph capture (the small decompositions are library calls that synchronise), and in
            a double backward.
    """
    check_rsvd("matrix", matrix, rank, start, oversample, n_iter)
    # Not while exporting, which would take the smaller of the two for the only one.
    if not torch.compiler.is_compiling() and is_capturing(matrix.device):
        width = min(rank + oversample, *matrix.shape[-2:])
        if not jacobi_on_gpu(torch.promote_types(matrix.dtype, torch.float32), width, matrix.device):
            raise RuntimeError(
                "rsvd: matrix: given during CUDA graph capture, wanted a call outside it: the library's decompositions "
                "synchronise; sketch and orthonormalize can be captured"
            )
    if start is not None:
        check_finite("rsvd", "start", start)
    options = {"oversample": oversample, "n_iter": n_iter, "seed": seed}
    # NaN and Inf reach every entry of the small factor: looking there is free, at the matrix it took 3 % of the time.
    try:
        triplets: tuple[Tensor, Tensor, Tensor] = _RSVD(matrix, rank, start, **options)
    except RuntimeError:  # the library's SVD of such a factor
        check_finite("rsvd", "matrix", matrix)
        if not has_values(matrix) or _in_range(_peaks(matrix)):
            raise
    else:
        if not has_values(matrix) or _in_range(triplets[1][..., :1]):
            return triplets
        check_finite("rsvd", "matrix", matrix)
    exponents = _peaks(matrix).frexp().exponent
    U, S, V = _RSVD(_times_power_of_two(matrix, -exponents), rank, start, **options)
    return U, _times_power_of_two(S, exponents.squeeze(-1)), V


def _peaks(matrix: Tensor) -> Tensor:
    """The largest magnitude (..., 1, 1) of each matrix."""
    return matrix.detach().abs().amax((-2, -1), keepdim=True)


def _in_range(values: Tensor) -> bool:
    """Whether squares of numbers around these are far from the ends of what their dtype has; zeros are."""
    widest = 400 if values.dtype is torch.float64 else 40
    exponents = values.detach().frexp().exponent
    return bool(values.isfinite().all() and exponents.abs().le(widest).all())


def _times_power_of_two(matrix: Tensor, exponents: Tensor) -> Tensor:
    """In two steps: 2^149, which the smallest float32 takes, is none itself."""
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    one = torch.ones_like(exponents, dtype=matrix.dtype)
    half = exponents // 2
    return matrix * torch.ldexp(one, half) * torch.ldexp(one, exponents - half)


@torch.library.register_fake("sculpt::rsvd")
def _fake(
    input: Tensor, rank: int, start: Tensor | None = None, *, oversample: int = 16, n_iter: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    check_rsvd("input", input, rank, start, oversample, n_iter)
    *batch, m, n = input.shape
    dtype = torch.promote_types(input.dtype, torch.float32)
    shapes = (*batch, m, rank), (*batch, rank), (*batch, n, rank)
    U, S, V = (input.new_empty(shape, dtype=dtype) for shape in shapes)
    return U, S, V


class _Once(torch.autograd.Function):
    """A gradient that says so when it is differentiated again. torch's once_differentiable misses S alone: with a
    constant incoming gradient nothing else tells it that the matrix takes part."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, *sources: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise RuntimeError(
            "rsvd: matrix: given a double backward, wanted a single one: rsvd has no second derivative; detach its "
            "results or use torch.linalg.svd"
        )


def _setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], *output)


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
    matrix, U, S, V = ctx.saved_tensors
    if not ctx.needs_input_grad[0]:
        return None, None, None
    with torch.no_grad():
        gradient = svd_gradient(matrix, U, S, V, *gradients)
    if torch.is_grad_enabled():
        gradient = _Once.apply(gradient, matrix, *gradients)
    return gradient, None, None


register_backward(_RSVD, _backward, _setup)


@torch.library.register_vmap("sculpt::rsvd")
def _vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    input: Tensor,
    rank: int,
    start: Tensor | None = None,
    **options: int,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int]]:
    def first(tensor: Tensor, dim: int | None) -> Tensor:
        return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

    if start is not None:
        start = first(start, in_dims[2])
    return _RSVD(first(input, in_dims[0]), rank, start, **options), (0, 0, 0)

"""The products that randomized decompositions are made of: private ops, shared by ``rsvd`` and ``top_subspace``.

``_product(input, factor)``: ``input @ factor`` (or ``inputᵀ @ factor``) of a matrix in any float dtype and a float32 or
float64 factor, summed and returned in the factor's dtype. ``_gram(input)``: ``inputᵀ input`` in float32
or float64. ``_eigh(input)``: eigenvalues, ascending, and vectors of symmetric matrices, vector after vector in memory.

On the CPU they are kernels (csrc/cpu/matmul.h, eigh.cpp), elsewhere calls of aten (csrc/linalg/any_device.cpp). Here
are `_product` on CUDA and what stands for all of them under tracing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .derivatives import register_backward
from .library import LIBRARY

__all__ = ["product_library"]

_PRODUCT = torch.ops.sculpt._product.default


def _sum_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype is torch.float64 else torch.float32


def product_library(input: Tensor, factor: Tensor, *, transpose: bool = False) -> Tensor:
    """Library products. A bf16 matrix is exact on tensor cores, so only the thin factor is split, hi + lo: the error
    is 2^-17 of the factor. The two halves stand side by side and the matrix is read once. A float16 matrix is two bf16
    parts exactly."""
    matrix = input.mT if transpose else input
    # HIP's products have no out_dtype.
    if input.dtype.itemsize != 2 or factor.dtype is not torch.float32 or not input.is_cuda or torch.version.hip:
        return matrix.to(factor.dtype) @ factor
    high = factor.bfloat16()
    halves = torch.cat((high, (factor - high.float()).bfloat16()), dim=-1)
    rounded = matrix.bfloat16()
    wide = _wide(rounded, halves)
    if rounded.dtype is not matrix.dtype:
        wide += _wide((matrix.float() - rounded.float()).bfloat16(), halves)
    high_part, low_part = wide.chunk(2, dim=-1)
    return high_part + low_part


def _wide(matrix: Tensor, factor: Tensor) -> Tensor:
    """matrix factor of bfloat16 in float32."""
    if matrix.dim() == 2:
        out: Tensor = torch.mm(matrix, factor, out_dtype=torch.float32)
        return out
    out = torch.bmm(matrix.flatten(0, -3), factor.flatten(0, -3), out_dtype=torch.float32)
    return out.view(*matrix.shape[:-2], *out.shape[-2:])


LIBRARY.impl("_product", product_library, "CUDA")


@torch.library.register_fake("sculpt::_product")
def _product_fake(input: Tensor, factor: Tensor, *, transpose: bool = False) -> Tensor:
    rows = input.shape[-1] if transpose else input.shape[-2]
    return factor.new_empty((*input.shape[:-2], rows, factor.shape[-1]))


@torch.library.register_fake("sculpt::_gram")
def _gram_fake(input: Tensor, *, transpose: bool = False, double: bool = False) -> Tensor:
    size = input.shape[-2] if transpose else input.shape[-1]
    dtype = torch.float64 if double else _sum_dtype(input)
    return input.new_empty((*input.shape[:-2], size, size), dtype=dtype)


@torch.library.register_fake("sculpt::_eigh")
def _eigh_fake(input: Tensor) -> tuple[Tensor, Tensor]:
    return input.new_empty(input.shape[:-1]), input.new_empty(input.shape).mT


def _product_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.transpose = keyword_only_inputs["transpose"]


def _product_backward(ctx: Any, go: Tensor) -> tuple[Tensor | None, Tensor | None]:
    input, factor = ctx.saved_tensors
    d_input = d_factor = None
    if ctx.needs_input_grad[0]:
        d_input = (factor @ go.mT if ctx.transpose else go @ factor.mT).to(input.dtype)
    if ctx.needs_input_grad[1]:
        d_factor = _PRODUCT(input, go.contiguous(), transpose=not ctx.transpose)
    return d_input, d_factor


register_backward(_PRODUCT, _product_backward, _product_setup)


def _no_gradient(ctx: Any, *go: Tensor) -> None:
    raise RuntimeError("sculpt::_gram and sculpt::_eigh have no gradient: detach their input")


register_backward(torch.ops.sculpt._gram.default, _no_gradient)
register_backward(torch.ops.sculpt._eigh.default, _no_gradient)

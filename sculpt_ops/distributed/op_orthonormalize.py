"""``orthonormalize`` on DTensors: shifted CholeskyQR on float64 Gram matrices that are summed over the ranks.

Pass by pass what csrc/linalg/cholesky_qr.cpp does, where its constants are explained: q x q numbers are summed a pass.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .op_collectives import reduced
from .op_exchange import redistribute, whole
from .op_layout import LEFT, Layout, Span, common_mesh, local_of, wrap

__all__ = ["Rows", "orthonormal", "orthonormalize", "well_conditioned"]

_PRODUCT = torch.ops.sculpt._product.default
_GRAM = torch.ops.sculpt._gram.default
_TEST_MATRIX = torch.ops.sculpt.test_matrix.default

_DEPENDENT = 1e4
_PASSES = 3
_ENOUGH = 1e-8
_SEED = 1
_NOISE, _WIDE_NOISE = 2.0**-24, 2.0**-50


class Rows(NamedTuple):
    """The rows of a thin matrix that are on this rank, and for which op the ranks talk."""

    op: str
    mesh: DeviceMesh
    span: Span

    def sum(self, tensor: Tensor) -> Tensor:
        return reduced(self.op, self.mesh, self.span.dims, tensor)

    def largest(self, tensor: Tensor) -> Tensor:
        return reduced(self.op, self.mesh, self.span.dims, tensor, largest=True)


def orthonormalize(input: Tensor) -> Tensor:
    """Split as `input` is; columns that are split change to split rows and back."""
    mesh = common_mesh("orthonormalize", {"input": input})
    assert isinstance(input, DTensor)
    tall = whole("orthonormalize", input, -1, -2)
    layout = Layout.of("orthonormalize", "input", tall)
    basis = orthonormal(local_of(tall), Rows("orthonormalize", mesh, layout.rows))
    placed = wrap(basis, mesh, layout.placed(LEFT, input.ndim), input.shape)
    return redistribute("orthonormalize", placed, input.placements)


def orthonormal(y: Tensor, rows: Rows) -> Tensor:
    """This rank's rows of the orthonormal basis, from those of the matrix (..., m, q)."""
    shift = _shift(y, rows)
    if y.dtype is torch.float64:
        y = _moderate(y, rows)
        for _ in range(_PASSES):
            y = _wide_pass(y, shift, rows)
        return _wide_pass(y, 0.0, rows).contiguous()
    for _ in range(_PASSES):
        y, error = _pass(y, shift, rows)
        # Waiting for a GPU costs more than the passes left out. All ranks leave together: a rounding may differ.
        if not (y.is_cuda or torch.compiler.is_compiling()) and float(rows.largest(error)) < _ENOUGH:
            break
    return y.float()


def well_conditioned(y: Tensor, rows: Rows) -> Tensor:
    """The same span, the columns not orthonormal: one pass, `y` float32 or float64."""
    scale, _, inverse = _factor(y, _shift(y, rows), rows)
    out: Tensor = _PRODUCT(y, (inverse * scale.unsqueeze(-1)).to(y.dtype))
    return out


def _shift(y: Tensor, rows: Rows) -> float:
    return math.ldexp(rows.span.size + 8 * y.shape[-1], -53)


def _factor(y: Tensor, shift: float, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """scale (..., q), R and R⁻¹ with ``RᵀR = (y scale)ᵀ (y scale) + shift I``."""
    gram = rows.sum(_GRAM(y, double=True))
    squares = gram.diagonal(dim1=-2, dim2=-1).clone()
    some = squares > 0
    scale = torch.where(some, squares.rsqrt(), 1.0)
    scaled = gram * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    scaled.diagonal(dim1=-2, dim2=-1).copy_(some.to(gram.dtype) + shift)
    R = torch.linalg.cholesky_ex(scaled).L.mT
    identity = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device).expand_as(R)
    return scale, R, torch.linalg.solve_triangular(R, identity, upper=True)


def _pass(y: Tensor, shift: float, rows: Rows) -> tuple[Tensor, Tensor]:
    """Also a bound of ``||QᵀQ - I||``, of all batch entries."""
    scale, R, inverse = _factor(y, shift, rows)
    Q = _PRODUCT(y, inverse * scale.unsqueeze(-1))
    noise = _noise(R, shift, _NOISE)
    Q = Q + _random(Q, rows) @ (inverse * noise.unsqueeze(-1))
    sums = inverse.square().sum((-2, -1)).flatten()
    return Q, shift * torch.nn.functional.pad(sums, (0, 1)).amax()  # of a batch of none there is no maximum


def _wide_pass(y: Tensor, shift: float, rows: Rows) -> Tensor:
    """In float64, where an explicit inverse would leave 7e-12 of the input outside the span."""
    scale, R, _ = _factor(y, shift, rows)
    scaled = y * scale.unsqueeze(-2)
    if shift > 0:
        scaled = scaled + _random(y, rows) * _noise(R, shift, _WIDE_NOISE).unsqueeze(-2)
    out: Tensor = torch.linalg.solve_triangular(R, scaled, upper=True, left=False)
    return out


def _noise(R: Tensor, shift: float, size: float) -> Tensor:
    """`size` for dependent columns and 0 elsewhere."""
    return torch.where(R.diagonal(dim1=-2, dim2=-1).square() < _DEPENDENT * shift, size, 0.0)


def _random(y: Tensor, rows: Rows) -> Tensor:
    """(rows, q): the fixed random columns, whatever the number of ranks: m + q numbers seen through overlapping
    windows."""
    m, q = rows.span.size, y.shape[-1]
    shape = y.new_empty(m + q, 1, dtype=torch.float64)
    numbers = _TEST_MATRIX(shape, 1, seed=_SEED, transpose=True).view(-1) / math.sqrt(m)
    own: Tensor = numbers[rows.span.start : rows.span.start + rows.span.length + q].unfold(0, q, 1)
    return own[: rows.span.length]


def _moderate(y: Tensor, rows: Rows) -> Tensor:
    """Columns scaled by powers of two to about one: their squares then neither overflow nor vanish."""
    padded = torch.nn.functional.pad(y.abs(), (0, 0, 0, 1))
    exponent = torch.frexp(rows.largest(padded.amax(dim=-2, keepdim=True))).exponent
    return torch.ldexp(y, -exponent)

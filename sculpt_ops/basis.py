"""One side's basis as it is stored: of the protected space, of the free one, or a reflector; in 32 or 16 bit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .dtensor import local_nbytes
from .linalg import orthonormal
from .ops.project import project

__all__ = ["BASIS_DTYPES", "Basis", "Form"]

Form = Literal["protected", "free", "reflector"]

BASIS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The entries of N - I are about 2^-9 / sqrt(d) for bfloat16, below the normal numbers of float16 (6e-5) from d = 1024
# on. Multiplied by this they are rounded to 2^-11 of themselves: an error of N of less than 1e-7.
_CORRECTION_SCALE = 256.0
# Below this squared singular value of L1 the polar factor from the eigenvectors of L1ᵀ L1 moves the protected space by
# more than 1e-8, in float64 by more than 1e-13.
_SMALLEST_SQUARE = {torch.float32: 1e-8, torch.float64: 1e-2}


def _product(matrix: Tensor, factor: Tensor) -> Tensor:
    out: Tensor = torch.ops.sculpt._product(matrix, factor)
    return out


@dataclass(frozen=True, eq=False, repr=False)
class Basis:
    """Splits R^d into a protected space of k dimensions and a free one of d - k.

    columns: (d, k) for the forms "protected" and "reflector", (d, d - k) for "free"; float32 or float64, or 16-bit.
    form: "protected" and "free" are orthonormal bases of that space. A "reflector" is B with BᵀB = 2 I, so that
        Q = I - B Bᵀ is symmetric and orthogonal; it takes the protected space to the first k coordinates, the free one
        to the others (Schreiber and Parlett, "Block reflectors", SIAM J. Numer. Anal. 25, 1988). `project` with B
        applies it, and (d - k) coordinates of the free space cost k stored columns.
    correction: with 16-bit columns C the (r, r) float16 matrix 256 (N - I), N = (CᵀC)^(-1/2) (for a reflector
        (CᵀC / 2)^(-1/2)). C N is orthonormal to 3e-7 (bfloat16: 5e-7, 2e-6 below d = 256, by the rounding of N): what
        is protected is the span of the ROUNDED columns, which is 2e-3 (float16: 3e-4) away from the one they were
        rounded from, and protects as well.
    """

    columns: Tensor
    form: Form
    correction: Tensor | None = None

    @classmethod
    def store(cls, basis: Tensor, form: Literal["protected", "free"], dtype: torch.dtype | None = None) -> Basis:
        """`basis` (d, r), orthonormal, in `dtype`. A protected one becomes a reflector in 16 bit: rounded again later,
        it would be another space, of which the sketches that `leak` compares with know nothing."""
        stored = cls(basis.contiguous(), form)
        if dtype is None or dtype.itemsize > 2:
            return stored
        return stored.reflector()._rounded(dtype)

    @property
    def keep(self) -> bool:
        """Whether `span` is the free space."""
        return self.form == "free"

    @property
    def length(self) -> int:
        return self.columns.shape[0]

    @property
    def free(self) -> int:
        """Dimensions of the free space."""
        stored = self.columns.shape[1]
        return stored if self.form == "free" else self.length - stored

    @property
    def nbytes(self) -> int:
        """Bytes on this rank: none on the meta device."""
        if self.columns.is_meta:
            return 0
        return local_nbytes(self.columns) + (0 if self.correction is None else self.correction.nbytes)

    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored."""
        return (self.columns,) if self.correction is None else (self.columns, self.correction)

    @property
    def is_span(self) -> bool:
        """Whether `span` is what is stored, at no cost."""
        return self.form != "reflector" and self.correction is None

    def to(self, device: torch.device | str) -> Basis:
        if self.columns.is_meta:
            return self
        moved = None if self.correction is None else self.correction.to(device)
        return replace(self, columns=self.columns.to(device), correction=moved)

    def matrix(self) -> Tensor:
        """The columns in float32 (float64), orthonormal; those of a reflector times the root of 2."""
        if self.correction is None:
            return self.columns
        columns = self.columns.float()
        # Of the columns as they are stored: on a GPU products of bfloat16 are 15 times as fast as of float32, and two
        # parts hold all of a correction in float16.
        columns += _product(self.columns, self.correction.float() / _CORRECTION_SCALE)
        return columns

    def in_full(self) -> Basis:
        """The same split with the columns that `matrix` gives."""
        return self if self.correction is None else Basis(self.matrix(), self.form)

    def span(self) -> Tensor:
        """Orthonormal basis (d, r) of the free space if `keep`, otherwise of the protected one."""
        matrix = self.matrix()
        if matrix.is_meta:
            return matrix
        if self.form != "reflector":
            return matrix
        k = matrix.shape[1]
        span = _product(matrix, matrix[:k].mT.contiguous()).neg_()
        span.diagonal().add_(1.0)
        # The rounding of the columns comes in twice: 1.6e-6 of 576 x 288 in float32.
        return orthonormal(span) if span.dtype is torch.float32 else span

    def free_columns(self) -> Tensor:
        """Orthonormal basis (d, free) of the free space: the one whose coordinates `LayerSubspace.to_coordinates`
        gives. Not for the form "protected", which has none."""
        matrix = self.matrix()
        if self.form == "free":
            return matrix
        assert self.form == "reflector"
        k = matrix.shape[1]
        columns = _product(matrix, matrix[k:].mT.contiguous()).neg_()
        columns[k:].diagonal().add_(1.0)
        return columns

    def protected(self, x: Tensor) -> Tensor:
        """P x of x (d, c), P the projector onto the protected space; in the dtype of x."""
        matrix = self.matrix().to(x.dtype)
        if self.form != "reflector":
            return project(x, matrix, keep_left=not self.keep)
        turned = project(x, matrix)
        turned[matrix.shape[1] :] = 0.0
        return project(turned, matrix)

    def reflector(self) -> Basis:
        """The same split with a protected basis folded into a reflector, others as they are."""
        if self.form != "protected":
            return self
        if self.columns.is_meta:
            return replace(self, form="reflector")
        basis = self.span().double()
        k = basis.shape[1]
        # L1 = U H, U orthogonal and H = X σ Xᵀ: V = L + [U; 0] has VᵀV = 2 (I + H), of condition 2 at most, and
        # I - V (I + H)^-1 Vᵀ takes L to -[U; 0].
        top = basis[:k]
        squares, X = torch.ops.sculpt._eigh(top.mT @ top)
        if k and float(squares[0]) > _SMALLEST_SQUARE[self.columns.dtype]:
            sigma = squares.sqrt()
            U = top @ ((X / sigma) @ X.mT)
        else:
            P, sigma, Xh = torch.linalg.svd(top)
            U, X = P @ Xh, Xh.mT
        V = basis.clone()
        V[:k] += U
        # (I + H)^(-1/2) / sqrt(2), so that the columns are orthonormal as far as those of L are.
        scale = (X * (2.0 * (1.0 + sigma)).rsqrt()) @ X.mT
        columns = _product(V, scale).to(self.columns.dtype)
        columns = (orthonormal(columns) if columns.dtype is torch.float32 else columns) * 2**0.5
        return Basis(columns, "reflector")

    def _rounded(self, dtype: torch.dtype) -> Basis:
        columns = self.columns.to(dtype)
        gram = torch.ops.sculpt._gram(columns, double=True)
        if self.form == "reflector":
            gram = gram / 2.0
        # (I - E)^(-1/2) - I, cut off below 1e-10: E is 1e-2 at most, so that float32 products lose nothing.
        error = (torch.eye(len(gram), dtype=gram.dtype, device=gram.device) - gram).float()
        square = _product(error, error)
        series = 0.5 * error + 0.375 * square
        series += _product(square, 0.3125 * error + 0.2734375 * square)
        return Basis(columns, self.form, (series * _CORRECTION_SCALE).half())

    def __repr__(self) -> str:
        return f"Basis({tuple(self.columns.shape)}, {self.form}, {self.columns.dtype})"

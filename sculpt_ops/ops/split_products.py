"""A bfloat16 matrix with float32 bases in library products on bfloat16 tensor cores.

The matrix is exact in bfloat16. A thin factor x is two parts, its rounding and what that took: x = h + l to 2^-17. A
basis L lies as [h, l, h]: the first two thirds give Lᵀ G in one product, whose result C lies as [h; h; l], and the
whole L C = h h + l h + h l in one more. 2 + 3 products of rank r, where a float32 copy of the matrix takes 2 without
tensor cores and three more passes over memory: on an H200 at rank 64 that copy took five times as long as a bfloat16
basis (208 us and 38 us, 4096 x 4096).

The bfloat16 rounding of the coefficient, which the plain expression with a bfloat16 basis makes, would leave 6e-4 of
the protected part; with two parts less than 2e-5 of the matrix is left before the result itself is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .heuristics import stacked

__all__ = ["can_split", "project_split"]

# Most r + s of two sides at once. On an H200, 4096 x 11008 and 11008 x 4096, that took 0.94 to 0.97 of the sides' own
# times at 128, and 1.08 to 1.10 at 256 (bench/results/nvidia-h200-2026-11-26.json).
AT_ONCE = 128


def can_split(grad: Tensor, left: Tensor | None, right: Tensor | None) -> bool:
    """One bfloat16 matrix, at least one float32 basis. Not float16, whose coefficients could overflow."""
    bases = [basis for basis in (left, right) if basis is not None]
    return (
        grad.dtype == torch.bfloat16
        and any(basis.dtype == torch.float32 for basis in bases)
        and all(tensor.dim() == 2 for tensor in (grad, *bases))
    )


def _wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """a b of bfloat16 in float32."""
    if a.is_cuda and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _tall(x: Tensor) -> Tensor:
    """[h, l, h] beside each other."""
    r = x.shape[1]
    parts = x.new_empty(x.shape[0], 3 * r, dtype=torch.bfloat16)
    high = parts[:, :r].copy_(x)
    parts[:, r : 2 * r].copy_(x - high)
    parts[:, 2 * r :].copy_(high)
    return parts


def _flat(x: Tensor) -> Tensor:
    """[h; h; l] below each other."""
    r = x.shape[0]
    parts = x.new_empty(3 * r, x.shape[1], dtype=torch.bfloat16)
    high = parts[:r].copy_(x)
    parts[r : 2 * r].copy_(high)
    parts[2 * r :].copy_(x - high)
    return parts


class _Basis:
    """A basis and its parts."""

    def __init__(self, basis: Tensor) -> None:
        self.rank = basis.shape[1]
        self.tall = _tall(basis)

    @property
    def across(self) -> Tensor:
        """Its transpose as [h; h; l]: what comes before has [h, l, h]."""
        r = self.rank
        return torch.cat([self.tall[:, :r], self.tall[:, :r], self.tall[:, r : 2 * r]], 1).mT

    def of_left(self, grad: Tensor) -> Tensor:
        """Lᵀ G of a bfloat16 G, float32."""
        both = _wide_mm(self.tall[:, : 2 * self.rank].mT, grad)
        return both[: self.rank] + both[self.rank :]

    def of_right(self, grad: Tensor) -> Tensor:
        """G R of a bfloat16 G, float32."""
        both = _wide_mm(grad, self.tall[:, : 2 * self.rank])
        return both[:, : self.rank] + both[:, self.rank :]

    def clear_left(self, x: Tensor) -> Tensor:
        """x - L (Lᵀ x) of a float32 x."""
        return x - _wide_mm(self.tall, _flat(self.span_left(x)))

    def span_left(self, x: Tensor) -> Tensor:
        """Lᵀ x of a float32 x: (h + l)ᵀ (h + l) but for l l."""
        r = self.rank
        first = torch.cat([self.tall[:, :r], self.tall[:, r : 2 * r], self.tall[:, :r]], 0)
        return _wide_mm(first.mT, _flat(x))

    def keep_right(self, x: Tensor) -> Tensor:
        """(x R) Rᵀ of a float32 x."""
        r = self.rank
        second = torch.cat([self.tall[:, :r], self.tall[:, :r], self.tall[:, r : 2 * r]], 0)
        return _wide_mm(_tall(_wide_mm(_tall(x), second)), self.across)


def project_split(
    grad: Tensor, left: Tensor | None, right: Tensor | None, out: Tensor, keep_left: bool, keep_right: bool, block: bool
) -> None:
    """Write the projection of what `can_split` takes into out, which may be grad itself."""
    L, R = (None if basis is None else _Basis(basis) for basis in (left, right))
    m, n = grad.shape
    if L is not None and R is not None and not (keep_left or keep_right or block):
        if L.rank + R.rank > AT_ONCE or not stacked(m, n, 3 * L.rank, 3 * R.rank, grad.dtype):
            project_split(grad, left, None, out, False, False, False)
            project_split(out, None, right, out, False, False, False)
            return
        wide, tall = L.of_left(grad), R.of_right(grad)
        # One of the thin factors is cleared of what both contain: the shorter one.
        if m <= n:
            tall = L.clear_left(tall)
        else:
            wide = wide - R.keep_right(wide)
        factors = torch.cat([L.tall, _tall(tall)], 1), torch.cat([_flat(wide), R.across], 0)
    elif L is not None and (R is None or keep_left or block):
        wide = L.of_left(grad)
        if R is not None:
            spanned = R.keep_right(wide)
            wide = spanned if keep_right or block else wide - spanned
        factors = L.tall, _flat(wide)
    else:
        assert R is not None
        tall = R.of_right(grad)
        if L is not None:
            tall = L.clear_left(tall)
        factors = _tall(tall), R.across
    keeps = not block and ((keep_left and L is not None) or (keep_right and R is not None))
    if not keeps:
        torch.addmm(grad, *factors, alpha=-1, out=out)
    elif out.is_contiguous():
        torch.mm(*factors, out=out)
    else:
        out.copy_(torch.mm(*factors))

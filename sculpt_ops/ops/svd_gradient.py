"""The gradient of a truncated singular value decomposition, exact for a truncated spectrum too.

Within the span of the triplets: Townsend, "Differentiating the singular value decomposition" (2016), as in
torch.linalg.svd. Outside it that formula takes the rest of the spectrum for zero; here the rest takes part.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["svd_gradient"]


def svd_gradient(
    matrix: Tensor, U: Tensor, S: Tensor, V: Tensor, gU: Tensor | None, gS: Tensor | None, gV: Tensor | None
) -> Tensor:
    """Gradient with respect to ``matrix`` (..., m, n), in its dtype, from those of its top k singular triplets.

    U (..., m, k), S (..., k), V (..., n, k): float32 or float64; gU, gS, gV: their gradients, None where zero.

    With B the rest of the matrix, ``(I - U Uᵀ) A (I - V Vᵀ)``, the parts of dU and dV outside the spans solve
    ``s_i dU_i - B dV_i = (I - U Uᵀ) dA v_i`` and ``s_i dV_i - Bᵀ dU_i = (I - V Vᵀ) dAᵀ u_i``. The adjoint solves the
    same symmetric system, for all i at once by one eigendecomposition of the Gram matrix of B on the shorter side.
    Float64 inside, since that Gram matrix squares the singular values. gS alone needs none of this.

    Every reciprocal 1/x, of a difference or sum of two singular values or of one, is ``x / (x² + (e S_1)²)`` with
    e = eps^(3/4), eps that of S's dtype (6e-6 for float32, 2e-12 for float64): finite everywhere, 0 at 0.
    """
    if gU is None and gV is None:
        core = torch.zeros_like(S) if gS is None else gS
        return ((U * core.unsqueeze(-2)) @ V.mT).to(matrix.dtype)
    if matrix.shape[-2] > matrix.shape[-1]:
        return svd_gradient(matrix.mT, V, S, U, gV, gS, gU).mT

    # Within a cluster the numerators are rounding, eps, and 1/x blows them up: with e = eps to eps^0, with eps^(3/4) to
    # eps^(1/4). From x = eps^(1/2) S_1 on it is off by less than the rounding of S. The constant is for S_1 = 0.
    resolved: Tensor = torch.finfo(S.dtype).eps ** 0.75 * S[..., :1, None].double()
    floor = resolved.square() + torch.finfo(torch.float64).tiny

    def reciprocal(x: Tensor) -> Tensor:
        return x / (x.square() + floor)

    dtype = matrix.dtype
    matrix, U, S, V = (t.double() for t in (matrix, U, S, V))
    gU = torch.zeros_like(U) if gU is None else gU.double()
    gV = torch.zeros_like(V) if gV is None else gV.double()
    row, column = S.unsqueeze(-2), S.unsqueeze(-1)

    # [(Ku s_j + s_i Kv) / (s_j² - s_i²)], by parts: functions of U Vᵀ have Ku + Kv = 0 and stay exact at equal values.
    Ku, Kv = _skew(U.mT @ gU), _skew(V.mT @ gV)
    inside = ((Ku + Kv) * reciprocal(row - column) + (Ku - Kv) * reciprocal(row + column)) / 2
    if gS is not None:
        inside = inside + torch.diag_embed(gS.double())

    left, right = gU - U @ (U.mT @ gU), gV - V @ (V.mT @ gV)
    if S.shape[-1] < matrix.shape[-2]:
        rest = matrix - U @ (U.mT @ matrix)
        rest = rest - (rest @ V) @ V.mT
        squares, vectors = torch.linalg.eigh(rest @ rest.mT)
        values = squares.clamp(min=0).sqrt().unsqueeze(-1)
        scale = reciprocal(row - values) * reciprocal(row + values)
        left = vectors @ (scale * (vectors.mT @ (left * row + rest @ right)))
        right = right + rest.mT @ left
    else:
        left = torch.zeros_like(left)  # U spans the shorter side: nothing is outside it, but for rounding
    right = right * reciprocal(row)
    gradient = (U @ inside + left) @ V.mT + U @ right.mT
    return gradient.to(dtype)


def _skew(x: Tensor) -> Tensor:
    return x - x.mT

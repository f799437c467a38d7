"""Orthonormal bases of a span and of all that is orthogonal to it, and the rank that a share of the energy takes."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import products as _products  # noqa: F401  (the ops exist once it is imported)
from .ops.finite import LinAlgError

__all__ = ["LinAlgError", "complement", "orthonormal", "smallest_rank"]

_GRAM = torch.ops.sculpt._gram.default
_PRODUCT = torch.ops.sculpt._product.default


def orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal basis (n, k) of the span of `columns` (n, k), n >= k, to 3e-7 for float32 and 1e-13 for float64. A
    column that depends on those before it becomes a random direction."""
    if columns.dtype is torch.float32:
        gram = _GRAM(columns, double=True)
        scale = gram.diagonal().rsqrt()
        error = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) - gram.mul_(scale).mul_(scale[:, None])
        size = float(error.norm()) if len(error) else 0.0
        # Singular vectors and their images are orthogonal but for rounding: then (I - E)^-1/2, a series cut off below
        # 3e-8, takes one product of this size where the op takes three passes in float64.
        if size <= 1e-2:
            error, scale = error.float(), scale.float()
            step = 0.5 * error
            if size > 3e-4:
                square = _PRODUCT(error, error)
                step += 0.375 * square + 0.3125 * _PRODUCT(error, square)
            scaled = columns * scale
            basis: Tensor = scaled + _PRODUCT(scaled, step)
            return basis
    basis = torch.ops.sculpt.orthonormalize(columns)
    return basis


def smallest_rank(squares: Tensor, share: float, total: float) -> int | None:
    """The smallest number of `squares` (descending) whose sum is at least `share` of `total`; None if all are less."""
    # The sum carries rounding of its own; asking for all of it must not run into the noise of a low-rank matrix.
    rank = int((squares.double().cumsum(0) < total * share * (1 - 1e-12)).sum()) + 1
    return rank if rank <= len(squares) else None


def complement(columns: Tensor) -> Tensor:
    """Orthonormal basis (n, n - k) of the orthogonal complement of the k columns of `columns` (n, k), k <= n."""
    n, k = columns.shape
    reflectors, tau = torch.geqrf(columns)
    rest = torch.zeros(n, n - k, dtype=columns.dtype, device=columns.device)
    rest[k:].fill_diagonal_(1.0)
    return rest if 0 in (k, n - k) else torch.ormqr(reflectors, tau, rest)

"""How far a decomposition is from the best one of its rank, against the singular values in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from weights import Matrix

# With 100 Krylov vectors the norm of the residuals here is exact to better than 1e-4 (checked against float64 SVDs).
KRYLOV = 100


class Factors(NamedTuple):
    """left (m, k), right (n, k) with orthonormal columns; values (k,), None where only the subspaces were asked for."""

    left: Tensor
    values: Tensor | None
    right: Tensor


class Bases(NamedTuple):
    """What a package stores of one protected matrix: bases of the protected space, or of the rest where *_free."""

    left: Tensor
    left_free: bool
    right: Tensor
    right_free: bool


def accuracy(matrix: Matrix, found: Factors) -> dict[str, float]:
    """Errors over those of the optimum of the same rank k; 1 is the optimum.

    spectral, frobenius: the norm of matrix - left diag(values) rightᵀ, or for subspaces the larger one of
        matrix - left leftᵀ matrix and matrix - matrix right rightᵀ, over that of the optimum, or over the rounding
        of float32, eps sqrt(m + n) times the norm of the matrix, where that is larger (rank-deficient matrices).
    energy: share of the optimum's squared norm inside the subspace, the smaller of the two sides.
    orthogonality: Frobenius norm of QᵀQ - I, the larger of the two sides.
    """
    values, squares = matrix.values.double(), matrix.sigma.square()
    left, right = found.left.double(), found.right.double()
    rank = left.shape[1]
    best_spectral = matrix.sigma[rank] if rank < len(squares) else torch.zeros((), dtype=torch.float64)
    rounding = torch.finfo(torch.float32).eps * sum(values.shape) ** 0.5
    best_spectral = torch.maximum(best_spectral, rounding * matrix.sigma[0])
    best_frobenius = torch.maximum(squares[rank:].sum().sqrt(), rounding * squares.sum().sqrt())
    rows, columns = left.mT @ values, values @ right
    if found.values is not None:
        residuals = [values - (left * found.values.double()) @ right.mT]
    else:
        residuals = [values - left @ rows, values - columns @ right.mT]
    energy = min(rows.square().sum(), columns.square().sum()) / squares[:rank].sum()
    off = [torch.linalg.matrix_norm(q.mT @ q - torch.eye(rank, dtype=q.dtype)) for q in (left, right)]
    return {
        "spectral": max(spectral_norm(residual) for residual in residuals) / float(best_spectral),
        "frobenius": max(float(torch.linalg.matrix_norm(residual)) for residual in residuals) / float(best_frobenius),
        "energy": float(energy),
        "orthogonality": float(max(off)),
    }


def model_energy(weights: Mapping[str, Tensor], bases: Mapping[str, Bases]) -> dict[str, float]:
    """Share of the optimum's energy in the protected half of each matrix: the least and the mean, over both sides."""
    shares = []
    for name, found in bases.items():
        weight = weights[name].double()
        weight = weight if weight.shape[0] <= weight.shape[1] else weight.mT
        squares = torch.linalg.eigvalsh(weight @ weight.mT).flip(0)
        best, total = squares[: len(squares) // 2].sum(), squares.sum()
        for basis, free, matrix in (
            (found.left, found.left_free, weights[name].mT),
            (found.right, found.right_free, weights[name]),
        ):
            inside = (matrix.double() @ basis.detach().double()).square().sum()
            shares.append(float((total - inside if free else inside) / best))
    return {"matrices": len(bases), "energy": min(shares), "energy_mean": sum(shares) / len(shares)}


def spectral_norm(matrix: Tensor) -> float:
    """The largest singular value, by Lanczos with full reorthogonalisation: an SVD of 4096 x 4096 takes 20 s."""
    size = float(matrix.abs().max())
    if size == 0:
        return 0.0
    scaled = (matrix / size).float()
    m, n = scaled.shape
    steps = min(KRYLOV, m, n)
    basis, images = torch.zeros(n, steps, dtype=torch.float64), torch.zeros(m, steps, dtype=torch.float64)
    vector = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for step in range(steps):
        for _ in range(2):
            vector -= basis @ (basis.mT @ vector)
        length = torch.linalg.vector_norm(vector)
        if length < 1e-12:
            break
        basis[:, step] = vector / length
        images[:, step] = scaled @ basis[:, step].float()
        vector = (scaled.mT @ images[:, step].float()).double()
    return size * float(torch.linalg.matrix_norm(images, 2))

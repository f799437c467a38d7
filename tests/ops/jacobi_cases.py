"""Small square matrices of every kind, and what a decomposition of them must satisfy: for the CPU and the GPU tests."""

from __future__ import annotations

import torch
from torch import Tensor

from .accuracy import gaussian, orthonormal

SIZES = (1, 2, 3, 17, 80, 144, 160)
EPS = 2.0**-23
F64 = torch.float64


def spectrum(size: int, condition: float = 1e7) -> Tensor:
    return torch.logspace(0, -torch.tensor(condition).log10().item(), size, dtype=F64)


def triangle(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix)[1]


def cases(q: int) -> dict[str, Tensor]:
    """Float32 matrices q x q, by kind."""
    G, left, right = gaussian(q, q), orthonormal(q, q, F64, 2), orthonormal(q, q, F64, 3)
    graded = spectrum(q)
    dense = left * graded @ right.mT
    ones = torch.ones(q, q, dtype=F64)
    found = {
        "gaussian": G,
        "orthogonal": left,
        "nearly the identity": torch.eye(q, dtype=F64) + 1e-3 * G,
        "triangle of a gaussian": triangle(G),
        "triangle of condition 1e7": triangle(dense),
        "lower triangle of condition 1e7": triangle(dense).mT,
        "graded columns": triangle(G) * graded,
        "graded columns, small ones first": triangle(G) * graded.flip(0),
        "triangle of graded columns": triangle(G * graded),
        "dense of condition 1e7": dense,
        "graded rows": graded.flip(0)[:, None] * G,
        "clusters": (left * torch.where(torch.arange(q) < q // 3, 10.0, 1.0)) @ right.mT,
        "rank 2": G[:, :2] @ G[:2],
        "equal columns": G[:, :1] * ones,
        "ones": ones,
        "a column of zeros": G * (torch.arange(q) != q // 2),
        "zero": 0 * ones,
        "diagonal": torch.diag(torch.randperm(q, generator=torch.Generator().manual_seed(0)) + 1.0),
        "large": 1e36 * G,
        "tiny": 1e-35 * G,
    }
    return {name: matrix.float() for name, matrix in found.items()}


# Kinds whose singular values are all known to some roundings of themselves: a scaling of the columns makes them well
# conditioned, or the triangle that comes of a pivoted QR factorization does.
KEPT = (
    "orthogonal",
    "nearly the identity",
    "triangle of a gaussian",
    "triangle of condition 1e7",
    "lower triangle of condition 1e7",
    "graded columns",
    "graded columns, small ones first",
    "triangle of graded columns",
    "clusters",
    "diagonal",
)


def check(matrix: Tensor, U: Tensor, S: Tensor, V: Tensor) -> None:
    """Orthonormal factors, S descending and near the exact values, U diag(S) Vᵀ the matrix. Of one matrix."""
    q = matrix.shape[-1]
    for factor, shape in ((U, (q, q)), (S, (q,)), (V, (q, q))):
        assert factor.dtype is torch.float32
        assert factor.is_contiguous()
        assert factor.shape == shape
    assert bool((S >= 0).all())
    assert bool((S.diff() <= 0).all())
    U, S, V, matrix = (t.cpu().double() for t in (U, S, V, matrix))
    exact = torch.linalg.svdvals(matrix)
    eye = torch.eye(q, dtype=F64)
    # Seen over these sizes and kinds: 1.0e-6, 1.2e-6 and 4e-7 at q = 160.
    allowed = EPS * (2 + q**0.5)
    assert float((U.mT @ U - eye).abs().max()) <= allowed
    assert float((V.mT @ V - eye).abs().max()) <= allowed
    assert float((U * S @ V.mT - matrix).norm()) <= 1.5 * allowed * float(matrix.norm())
    assert float((S - exact).abs().max()) <= allowed * float(exact[0])


def check_kept(matrix: Tensor, S: Tensor) -> None:
    """Every singular value to some roundings of itself; of one matrix of the kinds above."""
    exact = torch.linalg.svdvals(matrix.cpu().double())
    error = float(((S.cpu().double() - exact) / exact).abs().max())
    # Seen: 1.1e-6 at q = 3, 1.7e-6 at 80, 1.6e-6 at 144.
    assert error <= EPS * (8 + 2 * matrix.shape[-1] ** 0.5), error

"""The gradient of rsvd: that of the exact truncated SVD, in U, S and V, whatever part of the spectrum was cut off.

Weightings are random. U, S and V are those of the exact decomposition where the sketch is as wide as the matrix or the
iterations have converged, and only there can the gradients be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import sculpt_ops

from .accuracy import gaussian, orthonormal

pytestmark = pytest.mark.usefixtures("one_thread")

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
WHICH = ["USV", "U", "S", "V", "US", "SV", "UV"]


def matrix_of(spectrum: Tensor, m: int, n: int, seed: int = 0) -> Tensor:
    size = len(spectrum)
    left, right = orthonormal(m, size, torch.float64, seed), orthonormal(n, size, torch.float64, seed + 1)
    return left * spectrum.double() @ right.mT


def svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Through torch.linalg.svd, whose own gradient knows the whole spectrum; cut and signed like ours."""
    U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
    U, V = U[..., :rank], Vt.mT[..., :rank]
    sign = U.detach().gather(-2, U.detach().abs().argmax(dim=-2, keepdim=True)).sgn()
    return U * sign, S[..., :rank], V * sign


def weighted(which: str, matrix: Tensor, rank: int) -> Loss:
    *batch, m, n = matrix.shape
    shapes = {"U": (*batch, m, rank), "S": (*batch, rank), "V": (*batch, n, rank)}
    weights = {name: gaussian(*shapes[name], seed=ord(name)) for name in which}

    def loss(U: Tensor, S: Tensor, V: Tensor) -> Tensor:
        parts = {"U": U, "S": S, "V": V}
        return torch.stack([(parts[name].double() * weight).sum() for name, weight in weights.items()]).sum()

    return loss


def gradient(matrix: Tensor, triplets: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], loss: Loss) -> Tensor:
    leaf = matrix.detach().clone().requires_grad_()
    loss(*triplets(leaf)).backward()
    assert leaf.grad is not None
    return leaf.grad


def assert_close(mine: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert float((mine.double() - theirs).norm()) <= tolerance * float(theirs.norm())


def rsvd_to(rank: int, **options: Any) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    return lambda matrix: sculpt_ops.rsvd(matrix, rank, **options)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (4, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("rank", [1, 3])
def test_gradcheck_of_every_entry(shape: tuple[int, ...], rank: int) -> None:
    """The sketch is as wide as the matrix, so that U, S and V are exact; rank 3 leaves nothing out of 3 x 4."""
    assert gradcheck(rsvd_to(rank), (gaussian(*shape).requires_grad_(),))


@pytest.mark.parametrize("shape", [(6, 8), (8, 6)], ids=str)
def test_gradcheck_of_a_narrow_sketch_that_has_converged(shape: tuple[int, int]) -> None:
    matrix = matrix_of(torch.tensor([5.0, 4.0, 0.9, 0.4, 0.3, 0.2]), *shape).requires_grad_()
    converged = rsvd_to(2, oversample=1, n_iter=10)
    assert gradcheck(converged, (matrix,))

    def gauge_invariant(matrix: Tensor) -> tuple[Tensor, ...]:
        U, S, V = converged(matrix)
        functions = U @ V.mT, (U * S) @ V.mT, U @ U.mT, V @ V.mT
        return tuple((f * gaussian(*f.shape, seed=i)).sum() for i, f in enumerate(functions))

    assert gradcheck(gauge_invariant, (matrix,))


SPECTRA = {
    "gap": torch.cat((torch.linspace(9, 6, 4), torch.linspace(2, 0.5, 36))),
    "long tail": torch.arange(1, 41) ** -0.5,
    "rank-deficient": torch.cat((torch.linspace(9, 2, 8), torch.zeros(32))),
}


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (40, 40)], ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_equals_autograd_through_the_full_svd(name: str, shape: tuple[int, int], which: str) -> None:
    matrix = matrix_of(SPECTRA[name], *shape)
    loss = weighted(which, matrix, 4)
    # The full SVD's gradient divides zero by zero within the null space of a deficient matrix: let it see 1e-6 there.
    full = matrix + 1e-6 * gaussian(*shape, seed=9) if name == "rank-deficient" else matrix
    exact = gradient(full, lambda a: svd(a, 4), loss)
    assert_close(gradient(matrix, rsvd_to(4, n_iter=30), loss), exact, 1e-4 if name == "rank-deficient" else 1e-9)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (6, 6)], ids=str)
def test_full_rank_equals_the_full_svd(shape: tuple[int, int], which: str) -> None:
    matrix = gaussian(*shape)
    loss = weighted(which, matrix, 6)
    assert_close(gradient(matrix, rsvd_to(6), loss), gradient(matrix, lambda a: svd(a, 6), loss), 1e-11)


def test_dropping_the_rest_would_be_seen() -> None:
    """The gradient that takes the rest of the spectrum for zero is 20 % off on the long tail: the tests above bite."""
    matrix = matrix_of(SPECTRA["long tail"], 40, 60)
    U, S, V = svd(matrix, 4)
    loss = weighted("UV", matrix, 4)
    exact = gradient(matrix, lambda a: svd(a, 4), loss)
    dropped = gradient((U * S) @ V.mT + 1e-9 * matrix, rsvd_to(4), loss)
    assert float((dropped - exact).norm()) >= 0.2 * float(exact.norm())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("which", ["USV", "S"])
def test_lower_precision(which: str, dtype: torch.dtype, tolerance: float) -> None:
    matrix = matrix_of(SPECTRA["gap"], 40, 60).to(dtype)
    loss = weighted(which, matrix, 4)
    mine = gradient(matrix, rsvd_to(4, n_iter=8), loss)
    assert mine.dtype is dtype
    assert_close(mine, gradient(matrix.double(), lambda a: svd(a, 4), loss), tolerance)


def test_batches_of_any_strides() -> None:
    batch = gaussian(2, 3, 8, 7).mT
    loss = weighted("USV", batch, 3)
    assert_close(gradient(batch, rsvd_to(3), loss), gradient(batch, lambda a: svd(a, 3), loss), 1e-10)


def test_singular_values_alone_need_no_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = gaussian(9, 8).requires_grad_()
    U, S, V = sculpt_ops.rsvd(matrix, 3)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    monkeypatch.setattr(torch.linalg, "eigh", lambda *_: pytest.fail("eigh was called"))
    (S * weights).sum().backward()
    assert matrix.grad is not None
    torch.testing.assert_close(matrix.grad, (U * weights) @ V.mT)


CLUSTERED = {
    "all equal": torch.ones(8),
    "equal within": torch.tensor([4.0, 4.0, 2.0, 2.0, 0.5, 0.4, 0.3, 0.2]),
    "equal at the cut": torch.tensor([4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 0.3, 0.2]),
    "almost equal": torch.tensor([4.0, 4.0 + 1e-6, 2.0, 1.0 + 1e-6, 1.0, 0.4, 0.3, 0.2]),
    "rank 2": torch.tensor([4.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
    "zeros": torch.zeros(8),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(8, 11), (11, 8), (8, 8)], ids=str)
@pytest.mark.parametrize("rank", [4, 8])
@pytest.mark.parametrize("name", CLUSTERED)
def test_clustered_and_zero_singular_values_give_finite_gradients(
    name: str, rank: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    matrix = matrix_of(CLUSTERED[name], *shape).to(dtype)
    for which in ("USV", "U", "V"):
        assert bool(gradient(matrix, rsvd_to(rank), weighted(which, matrix, rank)).isfinite().all())


@pytest.mark.parametrize("shape", [(8, 11), (11, 8), (8, 8)], ids=str)
def test_functions_that_do_not_mix_a_cluster_are_exact_there(shape: tuple[int, int]) -> None:
    matrix = matrix_of(CLUSTERED["equal within"], *shape)
    weights = gaussian(shape[0], shape[0], seed=6)

    def energy_inside(U: Tensor, S: Tensor, V: Tensor) -> Tensor:
        return ((U @ U.mT) * weights).sum() + S.square().sum()

    mine = gradient(matrix, rsvd_to(4), energy_inside)
    # The same function of a matrix whose cluster is spread by 1e-5: it depends on the sum of the cluster only.
    spread = torch.linspace(-1, 1, 8, dtype=torch.float64) * 1e-5 + CLUSTERED["equal within"]
    exact = gradient(matrix_of(spread, *shape), lambda a: svd(a, 4), energy_inside)
    assert_close(mine, exact, 1e-3)


def test_the_polar_factor_is_exact_at_equal_singular_values() -> None:
    """d(U Vᵀ) at the identity is the skew part of dA: by 1/(s_i + s_j), which has no pole there."""
    weights = gaussian(6, 6, seed=2)
    mine = gradient(torch.eye(6, dtype=torch.float64), rsvd_to(6), lambda U, S, V: ((U @ V.mT) * weights).sum())
    torch.testing.assert_close(mine, (weights - weights.mT) / 2, rtol=0, atol=1e-3)


@pytest.mark.parametrize("which", ["S", "USV"])
def test_a_second_derivative_is_refused(which: str) -> None:
    matrix = gaussian(6, 7).requires_grad_()
    loss = weighted(which, matrix, 3)(*sculpt_ops.rsvd(matrix, 3))
    (first,) = torch.autograd.grad(loss, matrix, create_graph=True)
    assert_close(first.detach(), gradient(matrix, lambda a: svd(a, 3), weighted(which, matrix, 3)), 1e-10)
    with pytest.raises(RuntimeError, match="rsvd: matrix: given a double backward, wanted a single one"):
        first.sum().backward()


def test_a_second_derivative_of_other_parts_is_left_alone() -> None:
    matrix, scale = gaussian(6, 7).requires_grad_(), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    loss = sculpt_ops.rsvd(matrix.detach(), 3)[1].sum() * scale**3
    (first,) = torch.autograd.grad(loss, scale, create_graph=True)
    first.backward()
    assert scale.grad is not None


def test_start_and_unused_results_take_no_gradient() -> None:
    matrix, start = gaussian(6, 7).requires_grad_(), gaussian(7, 2).requires_grad_()
    U = sculpt_ops.rsvd(matrix, 3, start=start)[0]
    (U * gaussian(6, 3, seed=3)).sum().backward()
    assert start.grad is None
    assert matrix.grad is not None
    assert not sculpt_ops.rsvd(matrix.detach(), 3)[0].requires_grad


def test_vectorized_jacobian() -> None:
    """The backward under vmap."""
    matrix = gaussian(5, 6)
    rows = torch.autograd.functional.jacobian(rsvd_to(2), matrix, vectorize=True)
    expected = torch.autograd.functional.jacobian(rsvd_to(2), matrix)
    torch.testing.assert_close(rows, expected)


def test_compile_fullgraph_with_its_backward() -> None:
    def step(matrix: Tensor) -> Tensor:
        U, S, V = sculpt_ops.rsvd(matrix * 2, 3, n_iter=3)
        return U.sum() + (S * S).sum() + V.square().mul(V).sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        leaf = gaussian(9, 7).requires_grad_()
        out = function(leaf)
        out.backward()
        assert leaf.grad is not None
        results.append((out.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1])

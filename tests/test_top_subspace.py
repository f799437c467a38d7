import gc
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sculpt_ops.bases import TopSubspace
from sculpt_ops.block_krylov import find_rank
from sculpt_ops.decompose import choose_method, top_subspace, top_subspaces
from sculpt_ops.linalg import complement, orthonormal

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@lru_cache
def orthonormal_columns(n: int, k: int, seed: int) -> Tensor:
    return torch.linalg.qr(gaussian(n, k, seed=seed)).Q


def with_spectrum(m: int, n: int, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A float64 matrix (m, n) with these singular values, and its singular vectors."""
    left, right = orthonormal_columns(m, len(values), 1), orthonormal_columns(n, len(values), 2)
    return (left * values) @ right.mT, left, right


def projector(basis: Tensor) -> Tensor:
    return basis.double() @ basis.double().mT


def distance(a: Tensor, b: Tensor) -> float:
    """Sine of the largest angle between two spaces of the same dimension."""
    return float(torch.linalg.matrix_norm(a.double() - b.double() @ (b.double().mT @ a.double()), 2))


def assert_orthonormal(basis: Tensor) -> None:
    tolerance = 1e-13 if basis.dtype == torch.float64 else 3e-7
    error = basis.double().mT @ basis.double() - torch.eye(basis.shape[1], dtype=torch.float64)
    assert error.abs().max().item() <= tolerance if basis.numel() else True


def assert_complete(top: TopSubspace, m: int, n: int) -> None:
    """Bases of the promised widths, orthonormal, each orthogonal to the other of its side."""
    for basis, free, size in ((top.left, top.free_left, m), (top.right, top.free_right, n)):
        assert basis.shape == (size, top.rank)
        assert free.shape == (size, size - top.rank)
        assert_orthonormal(basis)
        assert_orthonormal(free)
        if basis.numel() and free.numel():
            assert (basis.double().mT @ free.double()).abs().max() <= (1e-13 if basis.dtype == torch.float64 else 3e-6)


def optimum(matrix: Tensor, rank: int) -> float:
    return float((torch.linalg.svdvals(matrix.double())[:rank] ** 2).sum())


def captured(matrix: Tensor, top: TopSubspace) -> float:
    return min(
        float((top.left.double().mT @ matrix.double()).square().sum()),
        float((matrix.double() @ top.right.double()).square().sum()),
    )


def test_all_values_keep_their_digits() -> None:
    """A Gram matrix in float32 has the smallest of these 10 times too large."""
    spectrum = torch.exp(-torch.arange(40.0, dtype=torch.float64) / 3)
    matrix = with_spectrum(64, 40, spectrum)[0].float()
    values = top_subspace(matrix, 40).singular_values
    torch.testing.assert_close(values.double(), torch.linalg.svdvals(matrix.double()), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize(
    ("m", "n", "rank", "columns", "method"),
    [
        (32, 5000, 4, 0, "svd"),
        (64, 64, 1, 0, "gram"),
        (1023, 4096, 8, 0, "gram"),
        (1024, 4096, 81, 0, "rsvd"),
        (1024, 4096, 82, 0, "gram"),
        (4096, 1024, 512, 0, "gram"),
        (4096, 4096, 128, 0, "rsvd"),
        (4096, 4096, 1024, 1023, "gram"),
        (4096, 4096, 1024, 1024, "rsvd"),
        (4096, 4096, 1025, 2000, "gram"),
    ],
)
def test_method_follows_shape_and_rank(m: int, n: int, rank: int, columns: int, method: str) -> None:
    assert choose_method(m, n, rank, "cpu", columns=columns) == method
    assert choose_method(n, m, rank, "cpu", columns=columns) == method


@pytest.mark.parametrize(
    ("m", "n", "rank", "columns", "method"),
    [
        (32, 5000, 4, 0, "svd"),
        (576, 1536, 64, 0, "gram"),
        (1024, 4096, 8, 0, "gram"),
        (4096, 11008, 64, 64, "gram"),
        (4096, 4096, 2048, 0, "gram"),
        (8192, 8192, 655, 0, "rsvd"),
        (8192, 28672, 656, 0, "gram"),
        (8192, 8192, 2048, 2048, "rsvd"),
        (8192, 8192, 2049, 2049, "gram"),
    ],
)
def test_method_on_a_gpu(m: int, n: int, rank: int, columns: int, method: str) -> None:
    assert choose_method(m, n, rank, "cuda", columns=columns) == method
    assert choose_method(n, m, rank, "cuda", columns=columns) == method


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(20, 31), (48, 48), (90, 60), (60, 90)])
def test_bases_are_those_of_the_exact_svd(shape: tuple[int, int], dtype: torch.dtype) -> None:
    m, n = shape
    size = min(shape)
    values = torch.linspace(3.0, 1.0, size, dtype=torch.float64)
    matrix = with_spectrum(m, n, values)[0].to(dtype)
    U, S, Vh = torch.linalg.svd(matrix.double())
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    for rank in (1, size // 2, size - 2, size):
        top = top_subspace(matrix, rank)
        assert (top.rank, top.method) == (rank, "svd" if size <= 32 else "gram")
        assert_complete(top, m, n)
        assert {b.dtype for b in (top.left, top.right, top.free_left, top.singular_values)} == {wanted}
        # Rounding by eps moves a space by eps s_1 / (s_k - s_k+1), here 1.5 size eps; a Gram matrix ten times that.
        tolerance = 20 * size * torch.finfo(wanted).eps
        assert distance(top.left, U[:, :rank]) <= tolerance
        assert distance(top.right, Vh[:rank].mT) <= tolerance
        assert torch.allclose(top.singular_values.double(), S[:rank], rtol=20 * torch.finfo(wanted).eps)
        assert top.energy == pytest.approx(float((S[:rank] ** 2).sum() / (S**2).sum()), abs=1e-6)


def test_sides_are_paired() -> None:
    tall = gaussian(70, 50, dtype=torch.float32)
    for matrix in (tall, tall.mT):
        top = top_subspace(matrix, 20)
        near, far = (top.right, top.left) if matrix is tall else (top.left, top.right)
        image = tall.double() @ near.double()
        assert (image - projector(far) @ image).norm() <= 1e-6 * image.norm()


@given(
    st.integers(1, 60), st.integers(1, 60), st.integers(0, 40), st.integers(1, 60), st.integers(0, 10**6), st.booleans()
)
def test_rank_deficient_matrices_have_complete_bases(
    m: int, n: int, inner: int, rank: int, seed: int, integers: bool
) -> None:
    left, right = gaussian(m, inner, seed=seed), gaussian(inner, n, seed=seed + 1)
    if integers:  # exact zeros and repeated columns
        left, right = left.sign(), right.round()
    matrix = (left @ right).float()
    top = top_subspace(matrix, min(rank, m, n))
    assert_complete(top, m, n)
    if inner <= top.rank:  # then all of the matrix is in
        outside = matrix.double() - projector(top.left) @ matrix.double()
        assert outside.norm() <= 1e-5 * max(1.0, float(matrix.norm()))
        assert top.energy == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("shape", [(5, 7), (40, 50), (1024, 1030)])
def test_matrix_of_zeros(shape: tuple[int, int]) -> None:
    zeros = torch.zeros(shape)
    top = top_subspace(zeros, 3)
    assert top.energy == 1.0
    assert torch.equal(top.singular_values, torch.zeros(3))
    for basis in (top.left, top.right):
        assert_orthonormal(basis)
    nothing = top_subspace(zeros, energy=0.9)
    assert (nothing.rank, nothing.left.shape, nothing.right.shape) == (0, (shape[0], 0), (shape[1], 0))


@pytest.mark.parametrize(("size", "rank", "method"), [(96, 40, "gram"), (1024, 40, "rsvd")], ids=["gram", "rsvd"])
def test_small_singular_values_are_redone_in_float64(size: int, rank: int, method: str) -> None:
    # At sigma_k / sigma_1 = 1e-3 the squares of a float32 Gram matrix are rounding: without the second attempt the
    # distance is 0.5 to 1.
    values = torch.full((size,), 1e-4, dtype=torch.float64)
    values[:rank] = torch.logspace(0, -3, rank, dtype=torch.float64)
    matrix, left, right = with_spectrum(size, size, values)
    top = top_subspace(matrix.float(), rank)
    assert top.method == method
    assert distance(top.left, left[:, :rank]) <= 1e-3
    assert distance(top.right, right[:, :rank]) <= 1e-3
    assert torch.allclose(top.singular_values.double(), values[:rank], rtol=1e-3)


def test_float64_below_the_square_root_of_eps_takes_the_svd() -> None:
    values = torch.logspace(0, -12, 48, dtype=torch.float64)
    matrix, left, right = with_spectrum(48, 60, values)
    assert top_subspace(matrix, 20).method == "gram"
    top = top_subspace(matrix, 36)  # sigma_36 = 1e-9
    assert top.method == "svd"
    assert_complete(top, 48, 60)
    assert distance(top.left, left[:, :36]) <= 1e-5
    assert distance(top.right, right[:, :36]) <= 1e-5
    assert torch.allclose(top.singular_values, values[:36], rtol=1e-5)
    # A float32 matrix has nothing to tell down there.
    assert top_subspace(matrix.float(), 36).method == "gram"


def _spectra(size: int) -> dict[str, Tensor]:
    steps = torch.arange(1, size + 1, dtype=torch.float64)
    return {
        "flat": 1.0 + 0.5 * (1 - steps / size),  # flatter at the top than any feed-forward matrix
        "power": steps**-0.3,
        "steep": torch.logspace(0, -10, size, dtype=torch.float64),
        "steps": torch.where(steps <= 30, 10.0, torch.where(steps <= 60, 5.0, 1.0)),
        "low rank": (steps <= 15).double(),
    }


@pytest.mark.parametrize("spectrum", _spectra(4))
def test_rsvd_holds_the_optimal_energy(spectrum: str) -> None:
    values = _spectra(1024)[spectrum]
    matrix = with_spectrum(1024, 1100, values)[0].float()
    for rank in (5, 40):
        top = top_subspace(matrix, rank)
        best = float((values[:rank] ** 2).sum())
        # A plateau, such as "flat", may be too flat: then the Gram matrix takes over.
        assert top.method in ("rsvd", "gram")
        assert captured(matrix, top) >= (1 - 5e-4) * best
        assert top.energy == pytest.approx(captured(matrix, top) / float((values**2).sum()), abs=1e-5)
        assert_orthonormal(top.left)
        assert_orthonormal(top.right)


def test_rsvd_repeats_itself_to_the_bit_and_follows_its_seed() -> None:
    matrix = with_spectrum(1100, 1024, _spectra(1024)["power"])[0].to(torch.bfloat16)
    first, second, other = (top_subspace(matrix, 16, seed=seed) for seed in (0, 0, 1))
    assert first.method == "rsvd"
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)
    assert not torch.equal(first.right, other.right)
    assert captured(matrix, other) == pytest.approx(captured(matrix, first), rel=1e-3)
    assert_complete(first, 1100, 1024)


@pytest.mark.parametrize("share", [0.2, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("shape", [(30, 20), (60, 90)])
def test_energy_takes_the_smallest_sufficient_rank(shape: tuple[int, int], share: float) -> None:
    matrix = gaussian(*shape, dtype=torch.float32)
    squares = torch.linalg.svdvals(matrix.double()) ** 2
    exact = int((squares.cumsum(0) < share * (1 - 1e-12) * squares.sum()).sum()) + 1
    top = top_subspace(matrix, energy=share)
    assert top.rank == exact
    assert top.energy >= share - 1e-9


@pytest.mark.parametrize(
    ("spectrum", "share", "method"),
    [
        ("steep", 0.5, "rsvd"),
        ("steep", 0.97, "rsvd"),
        ("steep", 0.999, "gram"),
        ("low rank", 0.9, "rsvd"),
        ("steps", 0.5, "rsvd"),
        ("power", 0.3, "rsvd"),
        ("power", 0.9, "gram"),
        ("flat", 0.5, "gram"),
    ],
)
@pytest.mark.parametrize("wide", [False, True])
def test_energy_of_large_matrices(spectrum: str, share: float, method: str, wide: bool) -> None:
    values = _spectra(1024)[spectrum]
    matrix = with_spectrum(1100, 1024, values)[0].float()
    matrix = matrix.mT.contiguous() if wide else matrix
    held = (values**2).cumsum(0) / (values**2).sum()
    exact = int((held < share - 1e-6).sum()) + 1
    top = top_subspace(matrix, energy=share)
    assert top.method == method
    assert exact <= top.rank <= exact * 1.01 + 1
    assert captured(matrix, top) >= (share - 1e-5) * float((values**2).sum())
    assert top.energy >= share - 1e-6


def test_energy_of_everything_stops_at_the_true_rank() -> None:
    low = gaussian(80, 6) @ gaussian(6, 70, seed=1)
    for dtype in (torch.float32, torch.float64):
        assert top_subspace(low.double(), energy=1.0).rank == 6
        # Rounded to float32 the others are not zero: 1e-7 of the largest, 1e-14 of the energy.
        assert top_subspace(low.to(dtype), energy=1 - 1e-9).rank == 6


@pytest.mark.parametrize(("rank", "last", "share", "found"), [(200, 0.2, 0.1, True), (60, 0.5, 0.06, False)])
def test_start_after_a_change_in_the_free_space(rank: int, last: float, share: float, found: bool) -> None:
    matrix, left, right = with_spectrum(1024, 1024, torch.linspace(1.0, last, 1024, dtype=torch.float64))
    start = right[:, :rank].float()
    change = gaussian(1024, 64, seed=3) @ gaussian(64, 1024, seed=4)
    change -= left[:, :rank] @ (left[:, :rank].mT @ change)
    change -= (change @ right[:, :rank]) @ right[:, :rank].mT
    # Some of the change overtakes what was at the cut.
    changed = (matrix + share * float(matrix.norm() / change.norm()) * change).float()
    best = optimum(changed, rank)
    assert float((changed @ start).square().sum()) < 0.996 * best
    # In the flat spectrum the start is of no use; what it misses shows first at a depth of several blocks.
    assert (find_rank(changed, rank, 0, start) is not None) == found
    top = top_subspace(changed, rank, start=start)
    assert top.method == "rsvd"
    assert captured(changed, top) >= 0.9999 * best
    assert_orthonormal(top.left)


def test_numbers_of_numpy_are_numbers() -> None:
    matrix = gaussian(30, 20, dtype=torch.float32)
    assert top_subspace(matrix, np.int64(4)).rank == 4  # type: ignore[arg-type]
    assert top_subspace(matrix, energy=np.float32(0.5)).rank == top_subspace(matrix, energy=0.5).rank


def test_useless_start_does_no_harm() -> None:
    matrix = with_spectrum(1024, 1024, torch.linspace(1.0, 0.2, 1024, dtype=torch.float64))[0].float()
    start = torch.linalg.qr(gaussian(1024, 30, seed=5, dtype=torch.float32)).Q
    top = top_subspace(matrix, 30, start=start)
    assert captured(matrix, top) >= 0.9995 * optimum(matrix, 30)
    # Where a start is what makes the method worth trying, the Gram matrix takes over.
    assert top_subspace(matrix, 200, start=gaussian(1024, 200, seed=6, dtype=torch.float32)).method == "gram"


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("wanted", [{"rank": 40}, {"energy": 0.1}])
def test_a_start_as_wide_as_the_matrix_is_left_aside(wanted: dict[str, Any], turned: bool) -> None:
    matrix = gaussian(1100, 1040, dtype=torch.float32) * torch.logspace(0, -3, 1040)
    matrix = matrix.mT if turned else matrix
    top = top_subspace(matrix, **wanted, start=torch.eye(matrix.shape[1]))
    assert captured(matrix, top) >= 0.999 * optimum(matrix, top.rank)


@pytest.mark.parametrize("size", [24, 60, 1024])
@pytest.mark.parametrize(
    ("scale", "dtype"), [(1e-30, torch.float32), (1e30, torch.float32), (1e-250, torch.float64), (1e250, torch.float64)]
)
def test_extreme_scales(size: int, scale: float, dtype: torch.dtype) -> None:
    matrix = with_spectrum(size, size, torch.logspace(0, -1, size, dtype=torch.float64))[0]
    plain, scaled = (top_subspace((matrix * s).to(dtype), 8) for s in (1.0, scale))
    assert scaled.method == plain.method
    assert scaled.energy == pytest.approx(plain.energy, rel=1e-5)
    assert distance(plain.left, scaled.left) <= 1e-2
    assert torch.allclose(scaled.singular_values.double() / scale, plain.singular_values.double(), rtol=1e-5)


def test_subnormal_entries() -> None:
    top = top_subspace(torch.full((40, 50), 2.0**-140), 2)
    assert top.energy == pytest.approx(1.0, abs=1e-6)
    assert top.singular_values[0].item() == pytest.approx(2000**0.5 * 2.0**-140, rel=1e-3)
    assert_complete(top, 40, 50)


def test_strides_and_parameters() -> None:
    whole = gaussian(80, 120, dtype=torch.float32)
    view = whole[::2, 5:65]
    assert distance(top_subspace(view, 11).right, top_subspace(view.contiguous(), 11).right) <= 1e-5
    top = top_subspace(torch.nn.Parameter(whole), 11)
    assert not top.left.requires_grad
    assert not top.right.requires_grad
    with torch.inference_mode():
        assert_orthonormal(top_subspace(whole * 1.0, 11).left)


def test_a_changed_matrix_is_not_read() -> None:
    matrix = gaussian(60, 40, dtype=torch.float32)
    top, kept = top_subspace(matrix, 10), top_subspace(matrix, 10)
    left = kept.left
    matrix.add_(1.0)
    with pytest.raises(RuntimeError, match="top_subspace: matrix: changed in place before its bases were read"):
        _ = top.left
    assert kept.left is left
    assert_orthonormal(top.right)  # was found before


def test_no_float64_copy_of_the_matrix_stays_alive() -> None:
    matrix = gaussian(61, 47, dtype=torch.float32)
    top = top_subspace(matrix, 20)
    _ = top.left, top.right, top.free_left, top.free_right, top.singular_values
    gc.collect()
    # By type: isinstance wakes deprecated lazy objects of torch.
    tensors = [found for found in gc.get_objects() if type(found) is Tensor]
    shapes = [tuple(tensor.shape) for tensor in tensors if tensor.dtype == torch.float64]
    assert (61, 47) not in shapes


def test_batch_gives_what_each_gives_alone() -> None:
    matrices = [gaussian(50, 64, seed=seed, dtype=torch.float32) for seed in range(3)]
    matrices[1] = with_spectrum(50, 64, torch.logspace(0, -4, 50, dtype=torch.float64))[0].float()  # needs float64
    for alone, together in zip(
        [top_subspace(matrix, rank) for matrix, rank in zip(matrices, (5, 40, 50), strict=True)],
        top_subspaces(matrices, [5, 40, 50]),
        strict=True,
    ):
        assert torch.equal(alone.left, together.left)
        assert torch.equal(alone.right, together.right)
        assert alone.energy == together.energy
    shares = top_subspaces(matrices, energy=0.9)
    assert [top.rank for top in shares] == [top_subspace(matrix, energy=0.9).rank for matrix in matrices]
    assert top_subspaces([], 3) == []


@pytest.mark.parametrize("size", [20, 50])
def test_batch_takes_zero_and_functions(size: int) -> None:
    matrices = [gaussian(size, size + 6, seed=seed, dtype=torch.float32) for seed in range(4)]
    seen: list[Tensor] = []

    def choose(squares: Tensor) -> int:
        seen.append(squares)
        return 7

    none, chosen, all_of_it, least = top_subspaces(matrices, [0, choose, lambda _: 999, lambda _: -1])
    assert (none.rank, none.energy, none.left.shape) == (0, 0.0, (size, 0))
    assert_complete(none, size, size + 6)
    assert (chosen.rank, all_of_it.rank, least.rank) == (7, size, 0)
    exact = torch.linalg.svdvals(matrices[1].double()) ** 2
    assert torch.allclose(seen[0], exact, rtol=1e-10)


@pytest.mark.parametrize("skew", [1e-6, 3e-5, 1e-4, 1e-3, 1e-2, 1.0])
def test_nearly_orthonormal_columns_are_straightened(skew: float) -> None:
    exact = torch.linalg.qr(gaussian(300, 40)).Q
    columns = (exact + skew * gaussian(300, 40, seed=1) / 300**0.5).float() * torch.logspace(-20, 20, 40)
    basis = orthonormal(columns)
    assert_orthonormal(basis)
    assert distance(torch.linalg.qr(columns.double()).Q, basis) <= 1e-6


def test_completion() -> None:
    columns = torch.zeros(9, 4)
    columns[:, 1] = torch.arange(9.0)
    columns[:, 2] = 2 * columns[:, 1]
    columns[0, 3] = 1e-20
    basis = orthonormal(columns)
    assert_orthonormal(basis)
    assert distance(basis, basis) <= 1e-6
    for spanned in (columns[:, 1:2], columns[:, 3:]):
        assert distance(spanned / spanned.norm(), basis) <= 1e-6
    square = gaussian(5, 5)
    assert complement(square).shape == (5, 0)
    assert torch.equal(complement(square[:, :0]), torch.eye(5, dtype=torch.float64))


MATRIX = torch.ones(6, 4)
BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: top_subspace(MATRIX), ValueError, "rank, energy: given neither, wanted one of them"),
    (lambda: top_subspace(MATRIX, 2, energy=0.5), ValueError, "rank, energy: given both, wanted one of them"),
    (lambda: top_subspace(MATRIX, 0), ValueError, r"rank: given 0, wanted 1 to 4 for a matrix of shape \(6, 4\)"),
    (lambda: top_subspace(MATRIX, -1), ValueError, "rank: given -1, wanted 1 to 4"),
    (lambda: top_subspace(MATRIX, 5), ValueError, "rank: given 5, wanted 1 to 4"),
    (lambda: top_subspace(MATRIX, 2.0), TypeError, r"rank: given 2\.0, wanted an int"),  # type: ignore[arg-type]
    (lambda: top_subspace(MATRIX, True), TypeError, "rank: given True, wanted an int"),
    (lambda: top_subspace(MATRIX, energy=0.0), ValueError, r"energy: given 0\.0, wanted more than 0 and at most 1"),
    (lambda: top_subspace(MATRIX, energy=1.5), ValueError, r"energy: given 1\.5, wanted more than 0"),
    (lambda: top_subspace(MATRIX, energy=math.nan), ValueError, "energy: given nan, wanted more than 0"),
    (lambda: top_subspace(MATRIX, energy="all"), TypeError, "energy: given 'all', wanted a number"),  # type: ignore[arg-type]
    (lambda: top_subspace(MATRIX.int(), 2), TypeError, "matrix: given dtype int32, wanted float32"),
    (lambda: top_subspace(MATRIX.cfloat(), 2), TypeError, "matrix: given dtype complex64, wanted float32"),
    (lambda: top_subspace(MATRIX[0], 1), ValueError, r"matrix: given shape \(4,\), wanted"),
    (lambda: top_subspace(MATRIX[None], 1), ValueError, r"matrix: given shape \(1, 6, 4\), wanted \(m, n\)"),
    (lambda: top_subspace(MATRIX[:0], 1), ValueError, r"matrix: given shape \(0, 4\), wanted \(m, n\) with m, n >= 1"),
    (lambda: top_subspace(MATRIX / 0, 1), torch.linalg.LinAlgError, "matrix: given NaN or Inf, wanted finite numbers"),
    (lambda: top_subspace(MATRIX * math.nan, 1), torch.linalg.LinAlgError, "matrix: given NaN or Inf"),
    (lambda: top_subspace(MATRIX, 2, start=MATRIX), ValueError, r"start: given shape \(6, 4\), wanted \(4, j\)"),
    (
        lambda: top_subspace(MATRIX, 2, start=MATRIX[:4].double()),
        TypeError,
        "start: given dtype float64, wanted float32",
    ),
    (lambda: top_subspace(MATRIX, 2, start=MATRIX[:4] / 0), torch.linalg.LinAlgError, "start: given NaN or Inf"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_unusable_arguments_are_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"top_subspace: {message}"):
        call()

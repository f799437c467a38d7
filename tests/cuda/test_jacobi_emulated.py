"""The CUDA kernel of the Jacobi SVD, on an emulated GPU (tests/cuda/gpu)."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ..ops.jacobi_cases import KEPT, cases, check, check_kept
from .emulated_gpu import library

Run = Callable[..., tuple[Tensor, Tensor, Tensor]]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    jacobi = library("jacobi", "jacobi", tmp_path_factory.mktemp("emulated"))

    def call(matrices: Tensor, both: bool = True, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        q, matrices = matrices.shape[-1], matrices.contiguous()
        U, S, V = torch.empty_like(matrices), torch.empty(matrices.shape[:-1]), torch.empty_like(matrices)
        scratch = torch.full_like(matrices, float("nan"))
        places = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (matrices, U, S, V, scratch)]
        batch = ctypes.c_long(matrices.shape[:-2].numel())
        assert jacobi.jacobi(*places, batch, q, int(both), seed) == 0, jacobi.wrong()
        return U, S, V

    return call


@pytest.mark.parametrize("q", [1, 2, 5, 17, 33])
def test_values_do_not_depend_on_the_order_of_threads(run: Run, q: int) -> None:
    """A missing barrier would show: other bits, or NaN of shared memory that was not written yet."""
    kinds = cases(q)
    batch = torch.stack(list(kinds.values()))
    U, S, V = run(batch)
    for i, (kind, matrix) in enumerate(kinds.items()):
        check(matrix, U[i], S[i], V[i])
        if kind in KEPT:
            check_kept(matrix, S[i])
    for both, seed in ((True, 1), (False, 2)):
        for first, other in zip((U, S, V), run(batch, both, seed), strict=True):
            assert torch.equal(first, other)


@pytest.mark.parametrize("q", [80, 144])
def test_as_wide_as_rsvd_asks_for(run: Run, q: int) -> None:
    matrix = cases(q)["triangle of graded columns"]
    results = run(matrix)
    check(matrix, *results)
    check_kept(matrix, results[1])


def test_what_is_not_finite_stays_in_its_matrix(run: Run) -> None:
    batch = torch.stack([torch.eye(9), torch.full((9, 9), float("inf")), torch.ones(9, 9)])
    for factor in run(batch):
        assert factor[1].isnan().all()
        assert factor[[0, 2]].isfinite().all()

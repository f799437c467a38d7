"""The CUDA kernel of the Jacobi SVD, compiled for the CPU and run thread by thread."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ..ops.jacobi_cases import KEPT, cases, check, check_kept

ROOT = Path(__file__).parents[2]
ENTRY = """
extern "C" int run(const float* input, float* u, float* s, float* v, float* scratch, long batch, int q, int both,
                   int order) {
  emulated_order = order;
  return sculpt::jacobi_svd(input, u, s, v, scratch, batch, q, both, nullptr);
}
"""
Run = Callable[..., tuple[Tensor, Tensor, Tensor]]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("emulated")
    source = (ROOT / "csrc" / "cuda" / "jacobi.cu").read_text()
    source, shared = re.subn(r"extern __shared__ float memory\[\];", "float* memory = emulated_shared;", source)
    launch = r"kernel<<<(.*?), (32 \* .*?), (.*?), stream>>>\((.*?)\);"
    source, launches = re.subn(launch, r"emulated::launch(\1, \2, \3, [=] { kernel(\4); });", source, flags=re.DOTALL)
    assert (shared, launches) == (1, 1)
    (folder / "jacobi.cpp").write_text(source + ENTRY)
    includes = [f"-I{ROOT / 'tests' / 'cuda' / 'emulated'}", f"-I{ROOT / 'csrc'}"]
    # glibc's checked longjmp takes a jump to another stack for an error. Unique symbols would be shared with the other
    # emulation's library.
    flags = ["-O2", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-fno-gnu-unique"]
    command = ["g++", *flags, *includes, str(folder / "jacobi.cpp"), "-o", str(folder / "jacobi.so")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    library = ctypes.CDLL(str(folder / "jacobi.so"))

    def call(matrices: Tensor, both: bool = True, order: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        q, matrices = matrices.shape[-1], matrices.contiguous()
        U, S, V = torch.empty_like(matrices), torch.empty(matrices.shape[:-1]), torch.empty_like(matrices)
        scratch = torch.full_like(matrices, float("nan"))
        places = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (matrices, U, S, V, scratch)]
        batch = ctypes.c_long(matrices.shape[:-2].numel())
        assert library.run(*places, batch, q, int(both), order) == 0
        return U, S, V

    return call


@pytest.mark.parametrize("q", [1, 2, 5, 17, 33])
def test_values_do_not_depend_on_the_order_of_warps(run: Run, q: int) -> None:
    """A missing barrier would show: other bits, or NaN of shared memory that was not written yet."""
    kinds = cases(q)
    batch = torch.stack(list(kinds.values()))
    U, S, V = run(batch)
    for i, (kind, matrix) in enumerate(kinds.items()):
        check(matrix, U[i], S[i], V[i])
        if kind in KEPT:
            check_kept(matrix, S[i])
    for both, order in ((True, 1), (False, 2)):
        for first, other in zip((U, S, V), run(batch, both, order), strict=True):
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

"""The CUDA kernels' code paths without a GPU: library products run on CPU tensors, the choice of variant is pure."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sculpt_ops import reference
from sculpt_ops.ops import cuda
from sculpt_ops.ops.heuristics import choose, forced_backend

from .accuracy import DTYPES, REMOVE_AND_KEEP, assert_accurate, gaussian, orthonormal


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flags", REMOVE_AND_KEEP, ids=lambda f: "+".join(f) or "remove")
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_library_products(dtype: torch.dtype, flags: dict[str, bool], batch: tuple[int, ...]) -> None:
    grad = gaussian(*batch, 31, 45, dtype=dtype)
    left, right = orthonormal(31, 6, dtype), orthonormal(45, 9, dtype, seed=2)
    full = {"keep_left": False, "keep_right": False, "block": False, **flags}
    out = torch.empty_like(grad)
    cuda.project_cublas(grad, left, right, out, **full)
    assert_accurate(out, reference.project, grad, left, right, **flags)
    in_place = grad.clone()
    cuda.project_cublas(in_place, left, right, in_place, **full)
    assert torch.equal(in_place, out)


def test_library_products_of_a_half_matrix_with_a_float32_basis_and_of_one_side() -> None:
    grad, left = gaussian(31, 45, dtype=torch.bfloat16), orthonormal(31, 6, torch.float32)
    cuda.project_into(grad, left, None, out := torch.empty_like(grad), False, False, False)
    assert_accurate(out, reference.project, grad, left)
    right = orthonormal(45, 6, torch.bfloat16)
    cuda.project_into(grad, None, right, out := torch.empty_like(grad), False, True, False)
    assert_accurate(out, reference.project, grad, None, right, keep_right=True)


def test_the_choice_of_variant() -> None:
    bf16, f32 = torch.bfloat16, torch.float32
    assert choose(4096, 11008, 64, None, bf16, bf16) == "triton"
    assert choose(4096, 11008, None, 128, bf16, bf16) == "cublas"  # 4096 rows are fewer panels than multiprocessors
    assert choose(11008, 4096, None, 128, bf16, bf16) == "triton"
    assert choose(4096, 11008, 129, None, bf16, bf16) == "cublas"  # arithmetic is the limit
    assert choose(8192, 11008, 64, 65, bf16, bf16) == "cublas"
    assert choose(8192, 11008, 64, 64, bf16, bf16) == "triton"
    assert choose(8192, 11008, 65, None, bf16, f32) == "cublas"
    assert choose(8192, 11008, 64, None, f32, f32) == "triton"
    assert choose(8192, 11008, 16, None, torch.float64, torch.float64) == "cublas"
    assert choose(8192, 11008, 50, None, bf16, bf16) == "cublas"  # spills registers
    assert choose(64, 64, 16, None, bf16, bf16) == "cublas"  # two panels
    assert choose(64, 64, 16, None, bf16, bf16, batch=66) == "triton"


def test_the_backend_can_be_forced_and_fails_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCULPT_BACKEND", raising=False)
    assert forced_backend() is None
    monkeypatch.setenv("SCULPT_BACKEND", "cublas")
    assert forced_backend() == "cublas"
    monkeypatch.setenv("SCULPT_BACKEND", "mkl")
    with pytest.raises(ValueError, match="SCULPT_BACKEND: given 'mkl', wanted 'triton' or 'cublas'"):
        forced_backend()
    monkeypatch.setenv("SCULPT_BACKEND", "triton")
    grad, left = gaussian(31, 45), orthonormal(31, 6, torch.float64)
    before = grad.clone()
    with pytest.raises(RuntimeError, match=r"SCULPT_BACKEND: given 'triton', but it cannot run here: .*"):
        cuda.project_into(grad, left, None, grad, False, False, False)
    assert torch.equal(grad, before)


_INTERPRETED = """
import torch
from sculpt_ops import reference
from sculpt_ops.ops import cuda
torch.manual_seed(0)
def basis(*shape): return torch.linalg.qr(torch.randn(*shape))[0]
for batch in ((), (3,), (2, 2)):
    grad = torch.randn(*batch, 33, 50)
    for left, right in ((basis(33, 5), basis(50, 7)), (basis(*batch, 33, 16), basis(*batch[1:], 50, 3))):
        for flags in ({}, {"keep_left": True}, {"keep_right": True}, {"block": True}):
            full = {"keep_left": False, "keep_right": False, "block": False, **flags}
            for a, b in ((left, right), (left, None), (None, right)):
                if (a is None and ("keep_left" in flags or "block" in flags)) or (
                    b is None and ("keep_right" in flags or "block" in flags)):
                    continue
                out = torch.empty_like(grad)
                assert cuda.project_triton(grad, a, b, out, **full) is None
                torch.testing.assert_close(out, reference.project(grad, a, b, **flags), rtol=0, atol=2e-5)
                cuda.project_into(grad.clone(), a, b, out, **full)
                torch.testing.assert_close(out, reference.project(grad, a, b, **flags), rtol=0, atol=2e-5)
print("all equal")
"""


def test_the_triton_path_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    run = subprocess.run(
        [sys.executable, "-c", _INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1", "SCULPT_BACKEND": "triton"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "all equal"

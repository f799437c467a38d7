"""The private products that decompositions are made of: against float64, over layouts, and their gradients."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import sculpt_ops  # noqa: F401  (registers the ops)
from sculpt_ops.ops.products import product_library

from .accuracy import DTYPES, gaussian

PRODUCT = torch.ops.sculpt._product
GRAM = torch.ops.sculpt._gram
EIGH = torch.ops.sculpt._eigh
# Below one register tile, whole tiles, past one step of packed depth (1024) and past a panel of 192, uneven.
SHAPES = [(1, 1, 1), (5, 7, 3), (64, 48, 16), (100, 1500, 33), (1500, 100, 49), (17, 3000, 1), (1030, 1100, 144)]


def layouts(m: int, n: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "rows": gaussian(m, n, dtype=dtype),
        "columns": gaussian(n, m, dtype=dtype).mT,
        "every second column": gaussian(m, 2 * n, dtype=dtype)[:, ::2],
        "slice": gaussian(m, n + 3, dtype=dtype)[:, 1 : n + 1],
    }


def relative_error(given: Tensor, exact: Tensor) -> float:
    return float((given.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, n, q = shape
    wide = dtype is torch.float64
    # Sums of products of exact inputs: eps / 2 times a small multiple of sqrt(depth), whatever the input's own dtype.
    bound = 2e-14 if wide else 3e-6
    thin = gaussian(n, q, dtype=torch.float64 if wide else torch.float32, seed=2)
    tall = gaussian(q, m, dtype=thin.dtype, seed=3).mT
    for name, matrix in layouts(m, n, dtype).items():
        exact = matrix.double()
        results = {
            "product": (PRODUCT(matrix, thin), exact @ thin.double(), bound),
            "transposed product": (PRODUCT(matrix, tall, transpose=True), exact.mT @ tall.double(), bound),
            "product in float64": (PRODUCT(matrix, thin.double()), exact @ thin.double(), 2e-14),
            "gram": (GRAM(matrix), exact.mT @ exact, bound),
            "transposed gram": (GRAM(matrix, transpose=True), exact @ exact.mT, bound),
            "gram in float64": (GRAM(matrix, double=True), exact.mT @ exact, 2e-14),
        }
        for what, (result, wanted, allowed) in results.items():
            assert result.dtype is (torch.float64 if wide or "float64" in what else torch.float32)
            assert relative_error(result, wanted) <= allowed, (name, what)
        assert torch.equal(GRAM(matrix), GRAM(matrix).mT)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512bf16"])
def test_every_instruction_set(isa: str) -> None:
    program = """
import torch, sculpt_ops
generator = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    x = torch.randn(70, 1100, generator=generator).to(dtype)
    f = torch.randn(1100, 20, generator=generator).to(torch.float64 if dtype is torch.float64 else torch.float32)
    for given, exact in (
        (torch.ops.sculpt._product(x, f), x.double() @ f.double()),
        (torch.ops.sculpt._product(x.mT, f, transpose=True), x.double() @ f.double()),
        (torch.ops.sculpt._gram(x, transpose=True), x.double() @ x.double().mT),
        (torch.ops.sculpt._gram(x, double=True), x.double().mT @ x.double()),
    ):
        assert (given.double() - exact).abs().max() <= 3e-6 * exact.abs().max(), (dtype, given.shape)
"""
    environment = {**os.environ, "SCULPT_CPU": isa}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    if "that this processor runs" in run.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert run.returncode == 0, run.stderr


def test_batches_and_empty_shapes() -> None:
    matrix, thin = gaussian(2, 3, 20, 30), gaussian(2, 3, 30, 4, seed=2)
    assert relative_error(PRODUCT(matrix, thin), matrix @ thin) <= 1e-14
    assert relative_error(GRAM(matrix), matrix.mT @ matrix) <= 1e-14
    assert PRODUCT(matrix[:, :0], thin[:, :0]).shape == (2, 0, 20, 4)
    assert PRODUCT(torch.ones(3, 0), torch.ones(0, 2)).eq(0).all()
    assert GRAM(torch.ones(0, 3)).eq(0).all()


def test_eigenvectors_of_a_batch_are_those_of_its_entries() -> None:
    grams = GRAM(gaussian(2, 3, 50, 40, dtype=torch.float32))
    values, vectors = EIGH(grams)
    assert relative_error(vectors @ values.diag_embed() @ vectors.mT, grams.double()) <= 1e-5
    for i in range(2):
        for j in range(3):
            alone = EIGH(grams[i, j])
            assert torch.equal(values[i, j], alone[0])
            assert torch.equal(vectors[i, j], alone[1])


def test_library_product_is_what_stands_for_it_elsewhere() -> None:
    for dtype in DTYPES:
        matrix = gaussian(30, 20, dtype=dtype)
        thin = gaussian(20, 5, dtype=torch.float64 if dtype is torch.float64 else torch.float32, seed=2)
        assert relative_error(product_library(matrix, thin), matrix.double() @ thin.double()) <= 1e-6


def test_gradients_and_tracing() -> None:
    matrix, thin, tall = (
        gaussian(6, 5).requires_grad_(),
        gaussian(5, 3).requires_grad_(),
        gaussian(6, 3).requires_grad_(),
    )
    assert torch.autograd.gradcheck(PRODUCT, (matrix, thin))
    assert torch.autograd.gradcheck(lambda a, b: PRODUCT(a, b, transpose=True), (matrix, tall))
    with pytest.raises(RuntimeError, match="no gradient"):
        GRAM(matrix).sum().backward()
    single = gaussian(6, 5, dtype=torch.float32)
    torch.library.opcheck(PRODUCT.default, (single, gaussian(5, 3, dtype=torch.float32)))
    torch.library.opcheck(GRAM.default, (single,), {"double": True})
    torch.library.opcheck(EIGH.default, (GRAM(single),))


def test_errors_name_the_argument() -> None:
    with pytest.raises(RuntimeError, match=r"_product: factor: wanted shape \(..., 4, q\)"):
        PRODUCT(torch.ones(3, 4), torch.ones(3, 2))
    with pytest.raises(RuntimeError, match="_product: factor: wanted float64, or float32"):
        PRODUCT(torch.ones(3, 4), torch.ones(4, 2, dtype=torch.int64))

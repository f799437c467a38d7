"""The two-sided CUDA kernels on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sculpt_ops
from sculpt_ops.ops.variants import cuda_missing, why_not_cuda

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or cuda_missing() is not None, reason="needs a GPU and the CUDA C++ kernels"
)

FLOAT, HALF = torch.float32, torch.bfloat16
# Every padded rank; one cluster and many; widths and heights that are no multiple of anything.
SHAPES = [
    *((4096, 4096, 64, 64), (64, 64, 16, 16), (1, 1, 1, 1), (1, 300, 1, 20), (300, 1, 20, 1), (577, 131, 33, 7)),
    *((1024, 2048, 16, 32), (1001, 4095, 64, 16), (1024, 4096, 128, 100), (2048, 1100, 32, 128), (512, 11008, 32, 32)),
]
DTYPES = [(FLOAT, FLOAT), (HALF, HALF), (FLOAT, HALF)]


def made(m: int, n: int, r: int, s: int, dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(m + n)
    grad = torch.randn(m, n, device="cuda", generator=generator).bfloat16()
    left = torch.linalg.qr(torch.randn(m, r, device="cuda", generator=generator)).Q.to(dtypes[0]).contiguous()
    right = torch.linalg.qr(torch.randn(n, s, device="cuda", generator=generator)).Q.to(dtypes[1]).contiguous()
    return grad, left, right


def project(grad: Tensor, left: Tensor, right: Tensor, block: bool = False) -> None:
    # What the op refuses may end the process (sculpt_ops/ops/cuda_limits.py).
    assert why_not_cuda(grad, left, right, False, False, block) is None
    torch.ops.sculpt._cuda_project_(grad, left, right, block=block)


def near(out: Tensor, given: Tensor, left: Tensor, right: Tensor, block: bool) -> None:
    """Within the rounding of the result and 1e-5 of what was given. Where the sides may be one after the other, the
    first's result is rounded as well, and coefficients are in a basis of bfloat16."""

    def rounded(x: Tensor, basis: Tensor) -> Tensor:
        return x.bfloat16().double() if basis.dtype == HALF else x

    G, U, V = given.double(), left.double(), right.double()
    once = G - U @ (U.mT @ G)
    exact = G - U @ (U.mT @ G @ V) @ V.mT if block else once - (once @ V) @ V.mT
    expected = exact
    if not block:
        once = (G - U @ rounded(U.mT @ G, left)).bfloat16().double()
        expected = once - rounded(once @ V, right) @ V.mT
    allowed = (expected.bfloat16().double() - exact).norm()
    assert (out.double() - exact).norm() <= 1.02 * allowed + 1e-5 * G.norm()


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("m", "n", "r", "s"), SHAPES)
def test_values(m: int, n: int, r: int, s: int, dtypes: tuple[torch.dtype, torch.dtype], block: bool) -> None:
    grad, left, right = made(m, n, r, s, dtypes)
    given = grad.clone()
    project(grad, left, right, block=block)
    near(grad, given, left, right, block)


def test_a_matrix_of_which_next_to_nothing_is_left() -> None:
    """Coefficients in one bfloat16 part would leave 6e-4 of it."""
    _, left, right = made(1024, 2048, 64, 64, (FLOAT, FLOAT))
    grad = left @ torch.randn(64, 2048, device="cuda") + torch.randn(1024, 64, device="cuda") @ right.mT
    grad = grad.bfloat16()
    given = grad.clone()
    project(grad, left, right)
    near(grad, given, left, right, False)


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES[:2])
def test_it_is_the_same_to_the_bit_every_time(dtypes: tuple[torch.dtype, torch.dtype], block: bool) -> None:
    grad, left, right = made(4096, 4096, 64, 64, dtypes)
    first = grad.clone()
    project(first, left, right, block=block)
    again = torch.empty_like(grad)
    for _ in range(200):
        again.copy_(grad)
        project(again, left, right, block=block)
        assert torch.equal(first, again)


def test_a_graph() -> None:
    grad, left, right = made(1024, 2048, 32, 16, (HALF, HALF))
    eager = grad.clone()
    project(eager, left, right)
    torch.cuda.synchronize()
    work, graph = grad.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        project(work, left, right)
    work.copy_(grad)
    graph.replay()
    assert torch.equal(work, eager)


@pytest.mark.parametrize(
    ("change", "flags", "words"),
    [
        (lambda g, u, v: (g.half(), u, v), {}, "grad: wanted dtype bfloat16"),
        (lambda g, u, v: (g, torch.eye(512, 256, device="cuda"), v), {}, "left, right: wanted ranks of 1 to 128"),
        (lambda g, u, v: (g, u, v.mT.contiguous().mT), {}, "right: wanted contiguous memory"),
        (
            lambda g, u, v: (g, torch.eye(512, 100, device="cuda"), v),
            {"keep_left": True},
            "keep_left, keep_right: with both bases wanted only where each side by itself can run",
        ),
        (lambda g, u, v: (g.unsqueeze(0), u, v), {}, "grad: wanted one matrix"),
    ],
)
def test_what_they_cannot_do_is_refused_before_anything_is_written(
    change: object, flags: dict[str, bool], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(change)
    monkeypatch.setenv("SCULPT_BACKEND", "cuda")
    grad, left, right = change(*made(512, 640, 64, 32, (FLOAT, FLOAT)))
    before = grad.clone()
    with pytest.raises(RuntimeError, match=words):
        sculpt_ops.project_(grad, left, right, **flags)
    assert torch.equal(grad, before)

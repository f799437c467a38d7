"""The one-pass right projection on a GPU, against float64; not run yet anywhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sculpt_ops.ops.variants import cuda_missing

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or cuda_missing() is not None or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of capability 9.0 and the CUDA C++ kernels",
)

# 1024 x 4096 at ranks 16, 32 and 128 and 300 x 8192: other clusters, panels and buffers (`right_panels`).
SHAPES = [
    *((4096, 4096, 64), (64, 64, 16), (100, 70, 7), (1, 3, 1), (1, 1, 1), (577, 131, 33), (63, 2048, 128)),
    *((1024, 4096, 16), (1024, 4096, 32), (1024, 4096, 128), (300, 8192, 64), (1001, 4095, 64), (4096, 11008, 32)),
]


def made(m: int, n: int, s: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(m + n)
    grad = torch.randn(m, n, device="cuda", generator=generator).bfloat16()
    basis = torch.linalg.qr(torch.randn(n, s, device="cuda", generator=generator)).Q
    return grad, basis.to(dtype).contiguous()


def near(out: Tensor, exact: Tensor, given: Tensor) -> None:
    """Within the rounding of the result and 1e-5 of what was given."""
    rounding = (exact.bfloat16().double() - exact).norm()
    assert (out.double() - exact).norm() <= 1.02 * rounding + 1e-5 * given.double().norm()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "s"), SHAPES)
def test_values(m: int, n: int, s: int, dtype: torch.dtype, keep: bool) -> None:
    grad, basis = made(m, n, s, dtype)
    given, V = grad.clone(), basis.double()
    kept = (given.double() @ V) @ V.mT
    torch.ops.sculpt._cuda_project_(grad, None, basis, keep_right=keep)
    near(grad, kept if keep else given.double() - kept, given)


def test_a_matrix_of_which_next_to_nothing_is_left() -> None:
    """Coefficients in one bfloat16 part would leave 6e-4 of it."""
    _, basis = made(512, 4096, 64, torch.float32)
    grad = (torch.randn(512, 64, device="cuda") @ basis.mT).bfloat16()
    given, V = grad.clone(), basis.double()
    torch.ops.sculpt._cuda_project_(grad, None, basis)
    near(grad, given.double() - (given.double() @ V) @ V.mT, given)


def test_more_than_two_to_the_31_elements() -> None:
    m, n = 2**20 + 40, 2080
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB")
    grad = torch.empty(m, n, device="cuda", dtype=torch.bfloat16).normal_()
    _, basis = made(1, n, 16, torch.bfloat16)
    tail = grad[-300:].clone()
    torch.ops.sculpt._cuda_project_(grad, None, basis)
    near(grad[-300:], tail.double() - (tail.double() @ basis.double()) @ basis.double().mT, tail)


@pytest.mark.parametrize(("dtype", "s"), [(torch.float32, 64), (torch.bfloat16, 64), (torch.bfloat16, 128)])
def test_it_is_the_same_to_the_bit_every_time(dtype: torch.dtype, s: int) -> None:
    grad, basis = made(4096, 4096, s, dtype)
    first = grad.clone()
    torch.ops.sculpt._cuda_project_(first, None, basis)
    again = torch.empty_like(grad)
    for _ in range(200):
        again.copy_(grad)
        torch.ops.sculpt._cuda_project_(again, None, basis)
        assert torch.equal(first, again)


def test_a_graph() -> None:
    grad, basis = made(1024, 2048, 32, torch.bfloat16)
    eager = grad.clone()
    torch.ops.sculpt._cuda_project_(eager, None, basis)
    torch.cuda.synchronize()
    work, graph = grad.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.sculpt._cuda_project_(work, None, basis)
    work.copy_(grad)
    graph.replay()
    assert torch.equal(work, eager)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda g, v: (g.half(), v), "grad: wanted dtype bfloat16"),
        (lambda g, v: (g, torch.eye(4096, 256, device="cuda")), "right: wanted a rank of 1 to 128"),
        (lambda g, v: (g, v[:, :0].contiguous()), "right: wanted a rank of 1 to 128"),
        (lambda g, v: (g.mT, v), "grad: wanted contiguous"),
        (lambda g, v: (g, v[:, ::2]), "right: wanted contiguous"),
        (lambda g, v: (g[None], v), "grad: wanted one matrix"),
    ],
)
def test_what_it_cannot_do_is_refused_before_anything_is_written(change: object, words: str) -> None:
    assert callable(change)
    grad, basis = change(*made(4096, 4096, 64, torch.float32))
    before = grad.clone()
    with pytest.raises(RuntimeError, match=words):
        torch.ops.sculpt._cuda_project_(grad, None, basis)
    assert torch.equal(grad, before)


def test_too_wide_for_the_shared_memory_of_a_cluster() -> None:
    grad, basis = made(64, 32768, 64, torch.float32)
    before = grad.clone()
    with pytest.raises(RuntimeError, match="right: wanted a rank of 1 to 128 whose rows fit the shared memory"):
        torch.ops.sculpt._cuda_project_(grad, None, basis)
    assert torch.equal(grad, before)

"""The one-pass left projection on a GPU, against float64; not run yet anywhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sculpt_ops.ops.variants import cuda_missing

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or cuda_missing() is not None or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of capability 9.0 and the CUDA C++ kernels",
)

SHAPES = [(4096, 4096, 64), (64, 64, 16), (100, 70, 7), (1, 3, 1), (577, 130, 33), (2048, 63, 128), (4096, 11008, 32)]


def made(m: int, n: int, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(m + n)
    grad = torch.randn(m, n, device="cuda", generator=generator).bfloat16()
    basis = torch.linalg.qr(torch.randn(m, r, device="cuda", generator=generator)).Q
    return grad, basis.to(dtype).contiguous()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_values(m: int, n: int, r: int, dtype: torch.dtype, keep: bool) -> None:
    grad, basis = made(m, n, r, dtype)
    given, U = grad.double(), basis.double()
    kept = U @ (U.mT @ given)
    exact = kept if keep else given - kept
    plain = basis.bfloat16() @ (basis.bfloat16().mT @ grad)
    plain = (plain if keep else grad - plain).double()
    torch.ops.sculpt._cuda_project_(grad, basis, keep_left=keep)
    error, allowed = (grad.double() - exact).norm(), (plain - exact).norm()
    assert error <= 2 * allowed + 2**-8 * exact.norm() / 16


def test_it_is_the_same_to_the_bit_every_time() -> None:
    grad, basis = made(4096, 4096, 64, torch.float32)
    first = grad.clone()
    torch.ops.sculpt._cuda_project_(first, basis)
    for _ in range(1000):
        again = grad.clone()
        torch.ops.sculpt._cuda_project_(again, basis)
        assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda g, u: (g.half(), u), "wanted dtype bfloat16"),
        (lambda g, u: (g, torch.eye(4096, 256, device="cuda")), "wanted a rank of 1 to 128"),
        (lambda g, u: (g.mT, u), "contiguous"),
    ],
)
def test_what_it_cannot_do_is_refused_before_anything_is_written(change: object, words: str) -> None:
    assert callable(change)
    grad, basis = change(*made(4096, 4096, 64, torch.float32))
    before = grad.clone()
    with pytest.raises(RuntimeError, match=words):
        torch.ops.sculpt._cuda_project_(grad, basis)
    assert torch.equal(grad, before)

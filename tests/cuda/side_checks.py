"""The one-pass projection of one side on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sculpt_ops
from sculpt_ops import reference
from sculpt_ops.ops.variants import cuda_missing, why_not_cuda

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or cuda_missing() is not None or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of capability 9.0 and the CUDA C++ kernels",
)

# Length of the side, the other, rank. Rows of G are of a multiple of 8 numbers, so on the right the length is.
SHAPES = [(4096, 4096, 64), (64, 64, 16), (104, 72, 7), (8, 8, 1), (584, 136, 33), (2048, 64, 128), (4096, 11008, 32)]
ODD = (577, 136, 33)


def made(length: int, extent: int, r: int, dtype: torch.dtype, side: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(length + extent)
    shape = (length, extent) if side == "left" else (extent, length)
    grad = torch.randn(*shape, device="cuda", generator=generator).bfloat16()
    basis = torch.linalg.qr(torch.randn(length, r, device="cuda", generator=generator)).Q
    return grad, basis.to(dtype).contiguous()


def span_metric(basis: Tensor) -> Tensor:
    """(UᵀU)⁻¹, and a little that is not symmetric: which of two products it is in can be told."""
    r = basis.shape[1]
    exact = torch.linalg.inv(basis.double().mT @ basis.double())
    generator = torch.Generator(device="cuda").manual_seed(r)
    noise = torch.randn(r, r, device="cuda", generator=generator, dtype=torch.float64) / basis.shape[0] ** 0.5
    return (exact + 2**-10 * noise).float().contiguous()


def project(grad: Tensor, basis: Tensor, side: str, keep: bool, metric: Tensor | None = None) -> None:
    left, right = (basis, None) if side == "left" else (None, basis)
    metrics = {f"{name}_metric": metric if name == side else None for name in ("left", "right")}
    # What the op refuses may end the process (sculpt_ops/ops/cuda_limits.py).
    assert why_not_cuda(grad, left, right, keep and side == "left", keep and side == "right", False, **metrics) is None
    torch.ops.sculpt._cuda_project_(grad, **{side: basis, f"keep_{side}": keep}, **metrics)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_list_is_as_its_matrices_one_by_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when its tables are replayed by a graph, with other values at the same addresses."""
    monkeypatch.setenv("SCULPT_BACKEND", "cuda")
    sides = [(4096, 512, 64), (4096, 2048, 16), (512, 1024, 33), (11008, 256, 16), (64, 64, 5), (4096, 4096, 64)]
    lefts = [made(m, n, r, dtype, "left") for m, n, r in sides]
    rights = [made(n, m, r, dtype, "right") for m, n, r in sides]
    grads = [grad.clone() for grad, _ in lefts] + [grad.clone() for grad, _ in rights] + [lefts[0][0].clone()]
    left = [basis for _, basis in lefts] + [None] * 6 + [lefts[0][1]]
    right = [None] * 6 + [basis for _, basis in rights] + [made(512, 4096, 16, dtype, "right")[1]]
    keep = [i == 2 for i in range(13)]
    before = [grad.clone() for grad in grads]

    def run() -> None:
        sculpt_ops.foreach_project_(grads, left, right, keep_lefts=keep, keep_rights=[False] * 13)

    run()
    outs = [grad.clone() for grad in grads]
    for given, out, U, V, kept in zip(before, outs, left, right, keep, strict=True):
        alone = sculpt_ops.project(given, U, V, keep_left=kept)
        # The number of blocks, and so the order of sums, may differ.
        assert (out.double() - alone.double()).norm() <= 2e-3 * alone.double().norm()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
    for grad, given in zip(grads, before, strict=True):
        grad.copy_(given)
    torch.cuda.synchronize()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(grad, out) for grad, out in zip(grads, outs, strict=True))


@pytest.mark.parametrize("r", [16, 64])
@pytest.mark.parametrize("side", ["left", "right"])
def test_it_is_the_same_to_the_bit_every_time(side: str, r: int) -> None:
    grad, basis = made(4096, 4096, r, torch.float32, side)
    first = grad.clone()
    project(first, basis, side, False)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        again = grad.clone()
        project(again, basis, side, False)
        different += (again != first).any()
    assert int(different) == 0


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("length", "extent", "r", "side"),
    [*((*shape, side) for shape in SHAPES for side in ("left", "right")), (*ODD, "left")],
)
def test_values(length: int, extent: int, r: int, side: str, dtype: torch.dtype, keep: bool) -> None:
    grad, basis = made(length, extent, min(r, 64) if dtype is torch.float32 else r, dtype, side)
    grad = grad.half() if dtype is torch.float16 else grad
    bases = {side: basis.double()}
    exact = reference.project(grad.double(), **bases, **{f"keep_{side}": keep})
    plain = reference.project(grad, **{side: basis.to(grad.dtype)}, **{f"keep_{side}": keep}).double()
    project(grad, basis, side, keep)
    error, allowed = (grad.double() - exact).norm(), (plain - exact).norm()
    assert error <= 2 * allowed + torch.finfo(grad.dtype).eps / 2 * exact.norm() / 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_two_slots_and_two_stages_are_enough(side: str, dtype: torch.dtype) -> None:
    test_values(28672, 64, 16, side, dtype, False)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("length", "extent", "r", "side"),
    [*((*shape, side) for shape in SHAPES for side in ("left", "right")), (*ODD, "left")],
)
def test_values_with_a_metric(length: int, extent: int, r: int, side: str, keep: bool) -> None:
    """Of noise, and of what is next to all taken away."""
    noise, basis = made(length, extent, r, torch.bfloat16, side)
    metric = span_metric(basis)
    inside = basis.double() @ torch.randn(r, extent, device="cuda", dtype=torch.float64)
    for grad in (noise, (inside if side == "left" else inside.mT).bfloat16().contiguous()):
        bases = {side: basis.double(), f"{side}_metric": metric.double(), f"keep_{side}": keep}
        exact = reference.project(grad.double(), **bases)
        rounding = (exact.bfloat16().double() - exact).norm()
        out = grad.clone()
        project(out, basis, side, keep, metric)
        assert (out.double() - exact).norm() <= 1.02 * rounding + 8e-6 * grad.double().norm()


def test_a_list_with_metrics_is_as_its_matrices_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCULPT_BACKEND", "cuda")
    sides = [(4096, 512, 64), (512, 1024, 33), (11008, 256, 16), (64, 64, 5), (4096, 4096, 128)]
    given = [made(m, n, r, torch.bfloat16, "left") for m, n, r in sides]
    lefts = [basis for _, basis in given]
    rights = [made(n, m, 16, torch.bfloat16, "right")[1] if i % 2 else None for i, (m, n, _) in enumerate(sides)]
    metrics = [span_metric(basis) if i != 1 else None for i, basis in enumerate(lefts)]
    others = [None if basis is None else span_metric(basis) for basis in rights]
    grads = [grad.clone() for grad, _ in given]
    sculpt_ops.foreach_project_(grads, lefts, rights, left_metrics=metrics, right_metrics=others)
    for (before, _), out, *thin in zip(given, grads, lefts, rights, metrics, others, strict=True):
        exact = reference.project(before.double(), *(x if x is None else x.double() for x in thin))
        rounding = (exact.bfloat16().double() - exact).norm()
        # Two sides round twice.
        assert (out.double() - exact).norm() <= 2 * rounding + 2e-5 * before.double().norm()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda g, u: (g.float(), u), "wanted dtype bfloat16 or float16"),
        (lambda g, u: (g.half(), u), "left: wanted dtype float16"),
        (lambda g, u: (g, torch.eye(4096, 256, device="cuda")), "wanted a rank of 1 to 64"),
        (lambda g, u: (g, u.bfloat16().repeat(1, 4)), "wanted a rank of 1 to 128"),
        (lambda g, u: (g.mT, u), "contiguous"),
    ],
)
def test_what_it_cannot_do_is_refused_before_anything_is_written(
    change: object, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(change)
    monkeypatch.setenv("SCULPT_BACKEND", "cuda")
    grad, basis = change(*made(4096, 4096, 64, torch.float32, "left"))
    before = grad.clone()
    with pytest.raises(RuntimeError, match=words):
        sculpt_ops.project_(grad, basis)
    assert torch.equal(grad, before)

"""Projections with metrics, L M Lᵀ in the place of L Lᵀ: values, gradients, tracing, vmap and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import sculpt_ops
from sculpt_ops import reference
from sculpt_ops.ops import foreach_cuda
from sculpt_ops.ops.library_products import project_cublas

from .accuracy import DTYPES, REMOVE_AND_KEEP, assert_accurate, gaussian, orthonormal, sides

OPS = torch.ops.sculpt
FLAGS = pytest.mark.parametrize("flags", REMOVE_AND_KEEP, ids=lambda f: "+".join(f) or "remove")
SHAPES = [
    # m, n, r, s
    (199, 1128, 17, 33),
    (1128, 199, 150, 64),
    (64, 64, 16, 16),
    (1, 50, 1, 3),
    (1, 1, 1, 1),
    (40, 30, 0, 0),
    (300, 200, 290, 190),
]


def metric(rank: int, dtype: torch.dtype, seed: int = 5) -> Tensor:
    """Not symmetric, so that a transposed one is found out."""
    wide = torch.promote_types(dtype, torch.float32)
    return (torch.eye(rank, dtype=torch.float64) + 0.3 * gaussian(rank, rank, seed=seed) / max(1, rank) ** 0.5).to(wide)


def span_metric(basis: Tensor) -> Tensor:
    """(LᵀL)⁻¹ of columns that are not orthonormal."""
    return torch.linalg.inv(basis.double().mT @ basis.double()).to(torch.promote_types(basis.dtype, torch.float32))


def plain(grad: Tensor, left: Any, right: Any, left_metric: Any, right_metric: Any, **flags: bool) -> Tensor:
    return reference.project(grad, left, right, **flags, left_metric=left_metric, right_metric=right_metric)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@FLAGS
def test_values(dtype: torch.dtype, shape: tuple[int, int, int, int], flags: dict[str, bool]) -> None:
    m, n, r, s = shape
    grad, left, right = gaussian(m, n, dtype=dtype), orthonormal(m, r, dtype), orthonormal(n, s, dtype, seed=2)
    for a, b in sides(left, right, flags):
        ml, mr = None if a is None else metric(r, dtype), None if b is None else metric(s, dtype, 6)
        for one, other in ((ml, mr), (ml, None), (None, mr)):
            metrics = {"left_metric": one, "right_metric": other}
            views = grad.clone(), grad.t().clone().t(), gaussian(m, 2 * n, dtype=dtype)[:, ::2]
            for view in views:
                sculpt_ops.project_(view.copy_(grad), a, b, **flags, **metrics)
            found = sculpt_ops.project(grad, a, b, **flags, **metrics), *views
            assert_accurate(found, plain, grad, a, b, one, other, **flags)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@FLAGS
def test_float32_bases_batches_and_broadcast_metrics(half: torch.dtype, flags: dict[str, bool]) -> None:
    grad = gaussian(3, 2, 60, 90, dtype=half)
    left, right = orthonormal(60, 20, torch.float32), orthonormal(90, 30, half, seed=2)
    one = torch.stack([metric(20, half, seed) for seed in range(2)])
    other = torch.stack([metric(30, half, seed) for seed in range(6)]).reshape(3, 2, 30, 30)
    found = sculpt_ops.project(grad, left, right, **flags, left_metric=one, right_metric=other)
    assert_accurate(found, plain, grad, left, right, one, other, **flags)


@FLAGS
def test_a_list_equals_its_entries_to_the_bit(flags: dict[str, bool]) -> None:
    grads = [gaussian(70, 90, dtype=torch.bfloat16), gaussian(64, 300, dtype=torch.float32)]
    lefts = [orthonormal(70, 12, torch.bfloat16), orthonormal(64, 30, torch.float32)]
    rights = [orthonormal(90, 20, torch.bfloat16), orthonormal(300, 9, torch.float32)]
    left_metrics = [span_metric(lefts[0]), None]
    right_metrics = [None, metric(9, torch.float32)]
    lists = {f"{name}s": [value] * 2 for name, value in flags.items() if name != "block"}
    listed = [grad.clone() for grad in grads]
    sculpt_ops.foreach_project_(
        listed,
        lefts,
        rights,
        **lists,
        block=flags.get("block", False),
        left_metrics=left_metrics,
        right_metrics=right_metrics,
    )
    for i, grad in enumerate(grads):
        metrics = {"left_metric": left_metrics[i], "right_metric": right_metrics[i]}
        assert torch.equal(listed[i], sculpt_ops.project(grad, lefts[i], rights[i], **flags, **metrics))


@given(st.integers(2, 60), st.integers(1, 60), st.data())
def test_the_span_of_rounded_columns_is_projected_exactly(m: int, n: int, data: st.DataObject) -> None:
    """The identities of an orthogonal projector, of columns that are orthonormal to 2^-9 only."""
    r = data.draw(st.integers(1, m))
    rounded = orthonormal(m, r, torch.float64, seed=m).bfloat16()
    basis, own = rounded.float(), span_metric(rounded).float()
    grad, other = gaussian(m, n, dtype=torch.float32), gaussian(m, n, dtype=torch.float32, seed=9)
    norm = float(grad.norm())
    out = sculpt_ops.project(grad, basis, left_metric=own)
    assert (basis.mT @ out).norm() <= 1e-5 * norm
    assert (sculpt_ops.project(out, basis, left_metric=own) - out).norm() <= 1e-5 * norm
    assert out.norm() <= norm * (1 + 1e-5)
    here, there = (out * other).sum(), (grad * sculpt_ops.project(other, basis, left_metric=own)).sum()
    assert abs(here - there) <= 1e-5 * norm * other.norm()
    kept = sculpt_ops.project(grad, basis, keep_left=True, left_metric=own)
    assert (out + kept - grad).norm() <= 1e-5 * norm


def test_what_a_rounded_basis_leaves_without_its_metric_and_with_it() -> None:
    rounded = orthonormal(512, 128, torch.float64).bfloat16()
    inside = (rounded.double() @ gaussian(128, 256)).float()
    basis, own = rounded.float(), span_metric(rounded)
    without = sculpt_ops.project(inside, basis).norm() / inside.norm()
    with_it = sculpt_ops.project(inside, basis, left_metric=own).norm() / inside.norm()
    assert without > 1e-4
    assert with_it < 2e-6


def test_a_float64_matrix_takes_a_float32_metric() -> None:
    grad, left = gaussian(20, 30).requires_grad_(), orthonormal(20, 3, torch.float64).requires_grad_()
    own = metric(3, torch.float32).requires_grad_()
    out = sculpt_ops.project(grad, left, left_metric=own)
    torch.testing.assert_close(out, reference.project(grad, left, left_metric=own.double()))
    (out * gaussian(20, 30, seed=4)).sum().backward()
    assert own.grad is not None
    assert own.grad.dtype is torch.float32


def test_importances_protect_in_part() -> None:
    grad, left = gaussian(50, 70, dtype=torch.float32), orthonormal(50, 3, torch.float32)
    shares = torch.tensor([1.0, 0.25, 0.0])
    out = sculpt_ops.project(grad, left, left_metric=shares.diag())
    torch.testing.assert_close(left.mT @ out, (1 - shares)[:, None] * (left.mT @ grad), atol=1e-5, rtol=1e-5)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    bases = orthonormal(7, 2, dtype), orthonormal(9, 3, dtype, seed=2)
    return gaussian(7, 9, dtype=dtype), *bases, metric(2, dtype), metric(3, dtype, 6)


@FLAGS
def test_gradients(flags: dict[str, bool]) -> None:
    tensors = tuple(t.requires_grad_() for t in inputs())

    def call(grad: Tensor, left: Tensor, right: Tensor, one: Tensor, other: Tensor) -> Tensor:
        return sculpt_ops.project(grad, left, right, **flags, left_metric=one, right_metric=other)

    assert gradcheck(call, tensors)
    assert gradgradcheck(call, tensors)
    if not (flags.get("block") or flags.get("keep_right")):
        grad, left, _, one, _ = tensors
        assert gradcheck(lambda g, a, m: sculpt_ops.project(g, a, **flags, left_metric=m), (grad, left, one))


def test_gradients_of_broadcast_metrics_and_of_half_precision() -> None:
    grad = gaussian(2, 3, 7, 9).requires_grad_()
    left = orthonormal(7, 2, torch.float64)
    stack = torch.stack([metric(2, torch.float64, seed) for seed in range(3)]).requires_grad_()
    assert gradcheck(lambda g, m: sculpt_ops.project(g, left, left_metric=m), (grad, stack))
    half = gaussian(7, 9, dtype=torch.bfloat16).requires_grad_()
    basis, own = left.bfloat16().requires_grad_(), metric(2, torch.bfloat16).requires_grad_()
    (sculpt_ops.project(half, basis, left_metric=own).float() * gaussian(7, 9, dtype=torch.float32)).sum().backward()
    assert half.grad is not None
    assert half.grad.dtype is torch.bfloat16
    assert basis.grad is not None
    assert basis.grad.dtype is torch.bfloat16
    assert own.grad is not None
    assert own.grad.dtype is torch.float32


def test_opcheck_compile_and_export() -> None:
    grad, left, right, one, other = inputs(torch.float32)
    opcheck(OPS.project.default, tuple(t.requires_grad_() for t in inputs(torch.float32)), {"keep_left": True})
    opcheck(OPS.project.default, (grad, left, None, one))
    opcheck(OPS.project_.default, (grad.clone(), left, right, one, other), {"block": True})
    opcheck(OPS.foreach_project_.default, ([grad.clone()], [left], [right], [one], [None]))

    def step(grad: Tensor) -> Tensor:
        out = sculpt_ops.project(grad, left, right, left_metric=one, right_metric=other)
        sculpt_ops.project_(out, left, left_metric=one)
        sculpt_ops.foreach_project_([out], [left], [None], left_metrics=[one])
        return out

    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(grad), step(grad))

    class Step(torch.nn.Module):
        def forward(self, grad: Tensor) -> Tensor:
            return step(grad)

    torch.testing.assert_close(torch.export.export(Step(), (grad,)).module()(grad), step(grad))


def test_vmap() -> None:
    _, left, _, _, _ = inputs()
    grads, metrics = gaussian(4, 7, 9), torch.stack([metric(2, torch.float64, seed) for seed in range(4)])
    wanted = torch.stack([plain(g, left, None, m, None) for g, m in zip(grads, metrics, strict=True)])
    found = torch.vmap(lambda g, m: sculpt_ops.project(g, left, left_metric=m))(grads, metrics)
    torch.testing.assert_close(found, wanted)
    one = torch.vmap(lambda m: sculpt_ops.project(grads[0], left, left_metric=m), in_dims=2)(metrics.movedim(0, 2))
    torch.testing.assert_close(one, torch.stack([plain(grads[0], left, None, m, None) for m in metrics]))
    written = grads.clone()
    torch.vmap(lambda g, m: sculpt_ops.project_(g, left, left_metric=m))(written, metrics)
    torch.testing.assert_close(written, wanted)
    listed = grads.clone(), grads.mT.clone()

    def both(a: Tensor, b: Tensor, m: Tensor) -> Tensor:
        sculpt_ops.foreach_project_([a, b.mT], [left, left], [None, None], left_metrics=[m, None])
        return a

    torch.vmap(both)(*listed, metrics)
    torch.testing.assert_close(listed[0], wanted)
    torch.testing.assert_close(listed[1].mT, reference.project(grads, left))
    with pytest.raises(ValueError, match=r"foreach_project_: grads\[0\]: given a tensor that vmap does not map"):
        torch.vmap(lambda a: sculpt_ops.foreach_project_([grads[0]], [a], [None]))(left.expand(4, 7, 2))


def test_what_is_refused_is_named_and_nothing_is_written() -> None:
    grad, left, right, one, _ = inputs(torch.float32)
    before = grad.clone()
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"left_metric": one, "left": None}, ValueError, "left_metric: given left=None, wanted a left basis"),
        ({"right_metric": one}, ValueError, r"right_metric: given shape \(2, 2\), wanted \(..., 3, 3\)"),
        ({"left_metric": one[:1]}, ValueError, r"left_metric: given shape \(1, 2\)"),
        ({"left_metric": one.expand(5, 2, 2)}, ValueError, r"left_metric: given shape \(5, 2, 2\)"),
        ({"left_metric": one.double()}, TypeError, "left_metric: given dtype float64, wanted float32"),
        ({"left_metric": one.bfloat16()}, TypeError, "left_metric: given dtype bfloat16, wanted float32"),
        ({"left_metric": one.to("meta")}, ValueError, "left_metric: given device meta"),
        ({"left_metric": one.clone().requires_grad_()}, RuntimeError, "left_metric: given a tensor that requires grad"),
    ]
    for changed, kind, message in cases:
        given = {"left": left, "right": right, **changed}
        if kind is not RuntimeError:
            with pytest.raises(kind, match=message):
                sculpt_ops.project(grad, **given)
        with pytest.raises(kind, match=message):
            sculpt_ops.project_(grad, **given)
        lists = {f"{name}s": [value] for name, value in given.items()}
        with pytest.raises(kind, match=message.replace("left_metric: given a", r"left_metrics\[0\]: given a")):
            sculpt_ops.foreach_project_([grad], **lists)
    with pytest.raises(ValueError, match="left_metrics: given 2 entries, wanted 1"):
        sculpt_ops.foreach_project_([grad], [left], [None], left_metrics=[one, one])
    shared = torch.eye(9)
    with pytest.raises(ValueError, match="left_metric: given memory shared with grad"):
        sculpt_ops.project_(shared, shared[:, :0].new_zeros(9, 2), left_metric=shared[:2, :2])
    assert torch.equal(grad, before)


@pytest.mark.parametrize("dtypes", [(dtype, dtype) for dtype in DTYPES] + [(torch.bfloat16, torch.float32)], ids=str)
@FLAGS
def test_library_products(dtypes: tuple[torch.dtype, torch.dtype], flags: dict[str, bool]) -> None:
    """What a GPU runs, on the CPU: the formulas are the same."""
    m, n, r, s = 120, 200, 24, 40
    dtype, of_left = dtypes
    left, right = orthonormal(m, r, of_left), orthonormal(n, s, dtype, seed=2)
    # Beside a random matrix one of which next to nothing is left: errors are not lost in the rounding of what is.
    spanned = (left.double() @ gaussian(r, s) @ right.double().mT).to(dtype)
    chosen = (flags.get("keep_left", False), flags.get("keep_right", False), flags.get("block", False))
    for grad in (gaussian(m, n, dtype=dtype), spanned):
        for a, b in sides(left, right, flags):
            one, other = None if a is None else metric(r, dtype), None if b is None else metric(s, dtype, 6)
            if a is not None and grad is spanned:
                one = span_metric(left.to(dtype)).to(torch.promote_types(dtype, torch.float32))
            for metrics in ((one, other), (one, None), (None, other)):
                if metrics == (None, None):
                    continue
                project_cublas(grad, a, b, out := torch.empty_like(grad), *chosen, *metrics)
                in_place = grad.clone()
                project_cublas(in_place, a, b, in_place, *chosen, *metrics)
                assert torch.equal(in_place, out)
                if dtype is not torch.bfloat16:
                    assert_accurate(out, plain, grad, a, b, *metrics, **flags)
                    continue
                exact = plain(*(x if x is None else x.double() for x in (grad, a, b, *metrics)), **flags)
                rounding = (exact.bfloat16().double() - exact).norm()
                # Twice where one side's result is rounded before the other side's turn.
                assert (out.double() - exact).norm() <= 2 * rounding + 2e-5 * grad.double().norm()


def test_lists_on_a_gpu_take_what_has_no_metric_together(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = [gaussian(40, 60, dtype=torch.bfloat16, seed=i) for i in range(4)]
    left, own = orthonormal(40, 8, torch.bfloat16), metric(8, torch.bfloat16)
    owns = [own, None, own, None]
    wanted = [plain(grad, left, None, own, None) for grad, own in zip(grads, owns, strict=True)]
    together: list[int] = []
    inner = foreach_cuda.project_products
    monkeypatch.setattr(
        foreach_cuda, "project_products", lambda *given: (together.append(len(given[0])), inner(*given))
    )

    def run(left_metrics: list[Tensor | None]) -> None:
        foreach_cuda.foreach_into(grads, [left] * 4, [None] * 4, (), (), False, left_metrics, [None] * 4)

    before = [grad.clone() for grad in grads]
    for name, words in (("triton", "but it takes no left_metric"), ("cuda", "but it cannot run grad")):
        monkeypatch.setenv("SCULPT_BACKEND", name)
        with pytest.raises(RuntimeError, match=f"SCULPT_BACKEND: given '{name}', {words}"):
            run(owns)
        assert all(torch.equal(grad, start) for grad, start in zip(grads, before, strict=True))
    monkeypatch.delenv("SCULPT_BACKEND")
    asked = []
    checks = foreach_cuda.check_foreach
    monkeypatch.setattr(
        foreach_cuda, "check_foreach", lambda *given, **flags: (asked.append(1), checks(*given, **flags))
    )
    for _ in range(2):  # a list that is known is not checked again
        for grad, start in zip(grads, before, strict=True):
            grad.copy_(start)
        run(owns)
        for grad, exact in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad, exact, rtol=2**-7, atol=2**-7)
    assert together == [2, 2]
    assert len(asked) == 1
    with pytest.raises(ValueError, match=r"foreach_project_ \(entry 1\): left_metric: given shape \(7, 7\)"):
        run([own, metric(7, torch.bfloat16), None, None])
    overlapping = grads[0].view(torch.float32).flatten()[:64].view(8, 8)
    with pytest.raises(ValueError, match=r"left_metrics\[3\]: given memory shared with grads\[0\]"):
        run([own, None, own, overlapping])

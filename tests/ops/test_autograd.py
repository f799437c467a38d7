"""Gradients, tracing, export and vmap of the projection ops. Gradients are tested with a random weighting: a plain sum
of squares hides a missing backward, because P P x = P x."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import sculpt_ops
from sculpt_ops import reference

from .accuracy import REMOVE_AND_KEEP, gaussian, orthonormal

OPS = torch.ops.sculpt
FLAGS = pytest.mark.parametrize("flags", REMOVE_AND_KEEP, ids=lambda f: "+".join(f) or "remove")


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return gaussian(7, 9, dtype=dtype), orthonormal(7, 2, dtype), orthonormal(9, 3, dtype, seed=2)


@FLAGS
def test_gradcheck(flags: dict[str, bool]) -> None:
    tensors = tuple(t.requires_grad_() for t in inputs())
    assert gradcheck(lambda g, a, b: sculpt_ops.project(g, a, b, **flags), tensors)
    assert gradgradcheck(lambda g, a, b: sculpt_ops.project(g, a, b, **flags), tensors)


@FLAGS
def test_gradients_equal_those_of_the_plain_expression(flags: dict[str, bool]) -> None:
    for left_given, right_given in ((True, True), (True, False), (False, True)):
        if (flags.get("block") or flags.get("keep_left")) and not left_given:
            continue
        if (flags.get("block") or flags.get("keep_right")) and not right_given:
            continue
        ours, plain = [tuple(t.clone().requires_grad_() for t in inputs()) for _ in range(2)]
        weights = gaussian(7, 9, seed=5)
        for op, (g, a, b) in ((sculpt_ops.project, ours), (reference.project, plain)):
            (op(g, a if left_given else None, b if right_given else None, **flags) * weights).sum().backward()
        for mine, theirs in zip(ours, plain, strict=True):
            assert (mine.grad is None) == (theirs.grad is None)
            if mine.grad is not None:
                torch.testing.assert_close(mine.grad, theirs.grad)


def test_gradients_of_broadcast_bases_and_half_precision() -> None:
    grad = gaussian(2, 5, 7, 9).requires_grad_()
    left = torch.stack([orthonormal(7, 2, torch.float64, seed=i) for i in range(5)]).requires_grad_()
    right = orthonormal(9, 3, torch.float64, seed=9).requires_grad_()
    assert gradcheck(lambda *a: sculpt_ops.project(*a), (grad, left, right))
    half = gaussian(7, 9, dtype=torch.bfloat16).requires_grad_()
    basis = orthonormal(7, 2, torch.float32).requires_grad_()
    (sculpt_ops.project(half, basis).float() * gaussian(7, 9, dtype=torch.float32, seed=3)).sum().backward()
    assert half.grad is not None
    assert half.grad.dtype is torch.bfloat16
    assert basis.grad is not None
    assert basis.grad.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", ["bases", "metrics", "all"])
@FLAGS
def test_gradients_of_wide_bases_and_metrics_of_a_half_matrix(
    flags: dict[str, bool], wide: str, dtype: torch.dtype
) -> None:
    """The matrix that the other side leaves is not rounded on the way."""
    of_basis = dtype if wide == "metrics" else torch.float32
    thin = [orthonormal(40, 12, of_basis), orthonormal(56, 20, of_basis, seed=2)]
    if wide != "bases":
        thin += [gaussian(12, 12, dtype=torch.float32), gaussian(20, 20, dtype=torch.float32)]
    grad, weights = gaussian(40, 56, dtype=dtype), gaussian(40, 56, dtype=dtype, seed=5)

    def gradients(op: Any, cast: Any) -> list[Tensor]:
        leaves = [cast(t).clone().requires_grad_() for t in thin]
        named = dict(zip(("left_metric", "right_metric"), leaves[2:], strict=False))
        (op(cast(grad), *leaves[:2], **named, **flags) * cast(weights)).sum().backward()
        return [leaf.grad.double() for leaf in leaves if leaf.grad is not None]

    exact = gradients(reference.project, Tensor.double)
    found = zip(gradients(sculpt_ops.project, lambda t: t), gradients(reference.project, lambda t: t), strict=True)
    for (ours, plain), wanted in zip(found, exact, strict=True):
        # Rounding of what is returned, and of the output that the weights multiply, is the same in both.
        assert (ours - wanted).norm() <= 2 * (plain - wanted).norm() + 1e-6 * wanted.norm()


def test_in_place_on_a_non_leaf_is_differentiable() -> None:
    _, left, right = inputs()
    leaf = gaussian(7, 9).requires_grad_()
    assert gradcheck(lambda g: sculpt_ops.project_(g * 2, left, right), (leaf,))
    assert gradcheck(lambda g: sculpt_ops.project_((g * 2).t().contiguous().t()[1:], left[1:]), (leaf,))


def test_the_version_counter_moves_so_that_stale_saves_are_caught() -> None:
    grad, left, _ = inputs()
    weight = torch.randn(7, 9, dtype=torch.float64, requires_grad=True)
    for call in (
        lambda: sculpt_ops.project_(grad, left),
        lambda: sculpt_ops.foreach_project_([grad], [left], [None]),
        lambda: sculpt_ops.restore_(grad, left, left.mT @ grad, None, None),
    ):
        version = grad._version
        loss = (weight * grad).sum()  # saves grad
        call()
        assert grad._version == version + 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_project(requires_grad: bool) -> None:
    for left_given, right_given in ((True, True), (True, False), (False, True), (False, False)):
        grad, left, right = (t.requires_grad_(requires_grad) for t in inputs(torch.float32))
        opcheck(OPS.project.default, (grad, left if left_given else None, right if right_given else None))
    opcheck(OPS.project.default, inputs(torch.float32), {"block": True})
    opcheck(OPS.project.default, inputs(torch.float32), {"keep_left": True, "keep_right": True})


def test_opcheck_mutating_ops() -> None:
    grad, left, right = inputs(torch.float32)
    opcheck(OPS.project_.default, (grad.clone(), left, right), {"keep_right": True})
    opcheck(OPS.project_.default, (grad.clone().requires_grad_() * 1, left, right))
    opcheck(OPS.foreach_project_.default, ([grad.clone(), grad.clone()], [left, None], [None, right]))
    opcheck(
        OPS.foreach_project_.default, ([grad.clone()], [left], [right]), {"keep_lefts": [True], "keep_rights": [False]}
    )
    opcheck(OPS.restore_.default, (grad.clone(), left, left.mT @ grad, right, grad @ right))
    opcheck(
        OPS.restore_.default,
        (grad.clone(), left, None, right, None),
        {"reference": grad.clone(), "keep_left": True, "keep_right": True},
    )
    opcheck(
        OPS.restore_.default,
        (grad.clone(), left, None, right, None),
        {"core": left.mT @ grad @ right, "block": True},
    )


def test_compile_fullgraph_with_every_op_and_its_backward() -> None:
    grad, left, right = inputs(torch.float32)

    def step(g: Tensor) -> Tensor:
        scaled = g * 2
        sculpt_ops.project_(scaled, left, right)
        parts = [g.detach().clone(), g.detach() + 1]
        sculpt_ops.foreach_project_(parts, [left, None], [None, right], keep_lefts=[True, False])
        weight = g.detach() * 3
        sculpt_ops.restore_(weight, left, left.mT @ parts[1], None, None)
        return scaled + sculpt_ops.project(g, left) + parts[0] - parts[1] + weight

    compiled = torch.compile(step, fullgraph=True)
    weights = gaussian(7, 9, dtype=torch.float32, seed=4)
    results = []
    for function in (step, compiled):
        leaf = grad.clone().requires_grad_()
        out = function(leaf)
        (out * weights).sum().backward()
        assert leaf.grad is not None
        results.append((out.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1])


def test_compile_with_dynamic_shapes() -> None:
    compiled = torch.compile(lambda g, a, b: sculpt_ops.project(g, a, b) * 1, fullgraph=True, dynamic=True)
    for m, n in ((7, 9), (12, 5), (30, 31)):
        args = gaussian(m, n, dtype=torch.float32), orthonormal(m, 2, torch.float32), orthonormal(n, 3, torch.float32)
        torch.testing.assert_close(compiled(*args), sculpt_ops.project(*args))


class Functional(torch.nn.Module):
    def forward(self, g: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return sculpt_ops.project(g, a, b, keep_left=True)


class InPlace(torch.nn.Module):
    def forward(self, g: Tensor, a: Tensor, b: Tensor) -> Tensor:
        work = [g.clone(), g.clone()]
        sculpt_ops.project_(work[0], a, b)
        sculpt_ops.foreach_project_(work[1:], [a], [None])
        sculpt_ops.restore_(work[1], a, a.mT @ g, None, None)
        return work[0] + work[1]


@pytest.mark.parametrize("module", [Functional(), InPlace()], ids=["functional", "in place"])
def test_export(module: torch.nn.Module) -> None:
    args = inputs(torch.float32)
    program: Any = torch.export.export(module, args)
    torch.testing.assert_close(program.module()(*args), module(*args))
    torch.testing.assert_close(program.run_decompositions().module()(*args), module(*args))


def test_vmap() -> None:
    grads = gaussian(5, 7, 9, dtype=torch.float32)
    lefts = torch.stack([orthonormal(7, 2, torch.float32, seed=i) for i in range(5)])
    _, left, right = inputs(torch.float32)
    expected = torch.stack([sculpt_ops.project(g, a, right) for g, a in zip(grads, lefts, strict=True)])
    mapped = torch.vmap(sculpt_ops.project, in_dims=(1, 0, None))(grads.movedim(0, 1), lefts, right)
    torch.testing.assert_close(mapped, expected)
    mapped = torch.vmap(sculpt_ops.project, in_dims=(None, 2, None), out_dims=1)(grads[0], lefts.movedim(0, 2), right)
    torch.testing.assert_close(mapped[:, 3], sculpt_ops.project(grads[0], lefts[3], right))
    batched = gaussian(5, 4, 7, 9, dtype=torch.float32)
    mapped = torch.vmap(sculpt_ops.project)(batched, lefts)
    torch.testing.assert_close(mapped[2], sculpt_ops.project(batched[2], lefts[2]))
    work = grads.clone()
    torch.vmap(lambda g, a: sculpt_ops.project_(g, a, right))(work, lefts)
    torch.testing.assert_close(work, expected)
    nested = torch.vmap(torch.vmap(sculpt_ops.project, in_dims=(0, None)), in_dims=(0, None))(batched, left)
    torch.testing.assert_close(nested, sculpt_ops.project(batched, left))


def in_place(grad: Tensor, *thin: Tensor, **flags: bool) -> Tensor:
    work = grad * 1
    OPS.project_(work, *thin, **flags)
    return work


@FLAGS
@pytest.mark.parametrize("op", [OPS.project, in_place], ids=["project", "project_"])
def test_transforms_of_torch_func(op: Any, flags: dict[str, bool]) -> None:
    grad, left, right = inputs()
    weights, metrics = gaussian(7, 9, seed=5), (gaussian(2, 2), gaussian(3, 3))

    def ours(g: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (op(g, a, b, *metrics, **flags).pow(3) * weights).sum()

    def plain(g: Tensor, a: Tensor, b: Tensor) -> Tensor:
        named = {"left_metric": metrics[0], "right_metric": metrics[1]}
        return (reference.project(g, a, b, **named, **flags).pow(3) * weights).sum()

    of = 0 if op is in_place else (0, 1, 2)  # the in-place form has no backward for its bases
    batch = torch.stack([grad, 2 * grad])
    tangents = gaussian(7, 9, seed=6), gaussian(7, 2, seed=7), gaussian(9, 3, seed=8)
    for transform in (
        lambda loss: torch.func.grad(loss, of)(grad, left, right),
        lambda loss: torch.vmap(torch.func.grad(loss, of), (0, None, None))(batch, left, right),
        lambda loss: torch.func.hessian(loss)(grad, left, right),
        lambda loss: torch.func.jvp(loss, (grad, left, right), tangents),
        lambda loss: torch.func.jvp(torch.func.grad(loss), (grad, left, right), tangents),
    ):
        torch.testing.assert_close(transform(ours), transform(plain))
    with pytest.raises(ValueError, match=r"left: given shape \(6, 2\)"):
        torch.func.grad(lambda g: op(g, left[:6]).sum())(grad)


@pytest.mark.parametrize("op", [sculpt_ops.orthonormalize, OPS.orthonormalize])
def test_transforms_of_torch_func_orthonormalize(op: Any) -> None:
    tall, weights, tangent = gaussian(9, 4), gaussian(9, 4, seed=5), gaussian(9, 4, seed=6)
    ours, plain = (lambda x, f=f: (f(x) * weights).sum() for f in (op, reference.orthonormalize))
    torch.testing.assert_close(torch.func.grad(ours)(tall), torch.func.grad(plain)(tall))
    torch.testing.assert_close(torch.func.jvp(ours, (tall,), (tangent,)), torch.func.jvp(plain, (tall,), (tangent,)))
    leaf = tall.clone().requires_grad_()
    ours(leaf).backward()
    torch.testing.assert_close(torch.func.grad(ours)(tall), leaf.grad)


@pytest.mark.parametrize("op", [OPS.project, in_place], ids=["project", "project_"])
@pytest.mark.parametrize("wide", [0, 1, 2], ids=["grad", "left", "right"])
def test_forward_mode(op: Any, wide: int) -> None:
    given, tangent = list(inputs()), gaussian(*inputs()[wide].shape, seed=9)
    found = []
    for function in (op, reference.project):
        with torch.autograd.forward_ad.dual_level():
            dual = list(given)
            dual[wide] = torch.autograd.forward_ad.make_dual(given[wide], tangent)
            found.append(torch.autograd.forward_ad.unpack_dual(function(*dual)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("op", ["rsvd", "foreach_project_", "restore_", "_product", "_gram"])
def test_forward_mode_is_refused_where_it_would_be_dropped(op: str) -> None:
    grad, left, _ = inputs()
    calls = {
        "rsvd": lambda x: OPS.rsvd(x, 2)[1],
        "foreach_project_": lambda x: OPS.foreach_project_([x.clone()], [left], [None]),
        "restore_": lambda x: OPS.restore_(x.clone(), left, left.mT @ grad, None, None),
        "_product": lambda x: OPS._product(x, grad.mT.contiguous()),
        "_gram": lambda x: OPS._gram(x),
    }
    with pytest.raises(NotImplementedError, match=f"{op}: given a tensor with a forward-mode tangent"):
        torch.func.jvp(calls[op], (grad,), (torch.ones_like(grad),))
    with torch.autograd.forward_ad.dual_level():
        calls[op](grad)  # a plain tensor is welcome inside


def test_rsvd_under_torch_func_is_refused_clearly() -> None:
    for op in (sculpt_ops.rsvd, OPS.rsvd):
        with pytest.raises(NotImplementedError, match=r"rsvd: given a tensor under torch.func"):
            torch.func.grad(lambda x, op=op: op(x, 2)[1].sum())(inputs()[0])
        mapped = torch.vmap(lambda x, op=op: op(x, 2)[1])(gaussian(3, 7, 9).requires_grad_())
        assert mapped.requires_grad


@pytest.mark.parametrize("op", ["project", "project_", "orthonormalize", "sketch"])
def test_forward_mode_of_a_compiled_function(op: str) -> None:
    """What is traced enters its dual level in C++: the tangents were dropped there without a word."""
    grad, left, _ = inputs(torch.float32)
    calls = {
        "project": lambda x: sculpt_ops.project(x, left) + x,
        "project_": lambda x: sculpt_ops.project_(x * 1, left) + x,
        "orthonormalize": lambda x: sculpt_ops.orthonormalize(x.mT) + x.mT,
        "sketch": lambda x: sculpt_ops.sketch(x, 9, seed=0) + x,
    }

    def tangent(x: Tensor, v: Tensor) -> Tensor:
        out: Tensor = torch.func.jvp(calls[op], (x,), (v,))[1]
        return out

    compiled = torch.compile(tangent, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(grad, grad.clone()), tangent(grad, grad.clone()))


def test_several_threads_in_the_backward_pass_of_one_graph() -> None:
    grad, left, right = (t.requires_grad_() for t in inputs())
    out = sculpt_ops.project(grad, left, right).sum()
    wanted = torch.autograd.grad(out, (grad, left, right), retain_graph=True)
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            futures = [
                pool.submit(torch.autograd.grad, out, (grad, left, right), retain_graph=True) for _ in range(200)
            ]
            found = [future.result() for future in futures]
    finally:
        sys.setswitchinterval(switching)
    assert all(torch.equal(a, b) for gradients in found for a, b in zip(gradients, wanted, strict=True))


def test_a_basis_in_the_memory_of_a_recorded_matrix_is_refused() -> None:
    """The copy would overwrite what the backward formula has kept."""
    matrix = gaussian(6, 6).requires_grad_() * 1
    before = matrix.detach().clone()
    with pytest.raises(ValueError, match="left: given memory shared with grad"):
        sculpt_ops.project_(matrix, matrix.data[:, :2])
    assert torch.equal(matrix, before)


def test_rsvd_is_exported_for_tall_and_wide_matrices() -> None:
    class Values(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return sculpt_ops.rsvd(x, 2)[1]

    m, n = torch.export.Dim("m", min=4, max=50), torch.export.Dim("n", min=4, max=50)
    given = gaussian(6, 5, dtype=torch.float32)
    exported = torch.export.export(Values(), (given,), dynamic_shapes=({0: m, 1: n},), strict=True).module()
    for matrix in (given, gaussian(9, 20, dtype=torch.float32)):
        torch.testing.assert_close(exported(matrix), sculpt_ops.rsvd(matrix, 2)[1])


def test_autocast_changes_no_gradient() -> None:
    """backward() under autocast, too: torch's products would be bfloat16 there; and inside transforms of torch.func."""
    found = []
    for enabled in (False, True):
        grad, left, right = (t.requires_grad_() for t in inputs(torch.float32))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = sculpt_ops.project(grad, left, right)
            sketch = sculpt_ops.sketch(grad, 3, seed=1)
            values = sculpt_ops.rsvd(grad, 2)[1]
            (out * gaussian(7, 9, dtype=torch.float32, seed=4)).sum().backward(retain_graph=True)
            (sketch.sum() + values.sum()).backward()
            plain = grad.detach()
            inner = [
                torch.func.vjp(lambda x: sculpt_ops.project(x, left.detach()), plain)[0],  # noqa: B023
                *torch.func.jvp(lambda x: sculpt_ops.sketch(x, 3, seed=1), (plain,), (plain,)),
                torch.func.grad(lambda x: sculpt_ops.orthonormalize(x.mT)[0, 0])(plain),
                torch.ops.sculpt._product(plain, right.detach()),
            ]
        found.append((out, sketch, values, grad.grad, left.grad, right.grad, *inner))
    for plain, under in zip(*found, strict=True):
        assert torch.equal(plain, under)

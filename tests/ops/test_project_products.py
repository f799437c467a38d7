"""Library products for a list of matrices in one call: bits of torch's own calls, accuracy, memory and launches."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sculpt_ops import reference
from sculpt_ops.ops import foreach_cuda
from sculpt_ops.ops.checks import check_foreach_apart
from sculpt_ops.ops.heuristics import left_first, stacked
from sculpt_ops.ops.library_products import form_of, project_products

from .accuracy import DTYPES, REMOVE_AND_KEEP, assert_accurate, gaussian, orthonormal

Case = tuple[Tensor, Tensor | None, Tensor | None, dict[str, bool]]
NAMES = ("keep_left", "keep_right", "block")


def by_torch(grad: Tensor, left: Tensor | None, right: Tensor | None, out: Tensor, **flags: bool) -> None:
    """The formulas in torch's calls, each factor in memory of its own."""
    keep_left, keep_right, block = (flags.get(name, False) for name in NAMES)
    if block or keep_left or keep_right:
        both = block or (keep_left and keep_right)
        if left is not None and (
            left_first(*grad.shape, left.shape[1], right.shape[1]) if both and right is not None else keep_left
        ):
            tall, wide = left, left.mT @ grad
            if right is not None:
                core = wide @ right
                torch.mm(core, right.mT, out=wide) if both else wide.addmm_(core, right.mT, alpha=-1)
        else:
            assert right is not None
            tall, wide = grad @ right, right.mT
            if left is not None:
                core = left.mT @ tall
                torch.mm(left, core, out=tall) if both else tall.addmm_(left, core, alpha=-1)
        torch.addmm(grad, tall, wide, alpha=-1, out=out) if block else torch.mm(tall, wide, out=out)
    elif left is not None and right is not None and stacked(*grad.shape, left.shape[1], right.shape[1], grad.dtype):
        (m, n), r, s = grad.shape, left.shape[1], right.shape[1]
        tall, wide = grad.new_empty(m, r + s), grad.new_empty(r + s, n)
        torch.mm(left.mT, grad, out=wide[:r])
        torch.mm(grad, right, out=tall[:, r:])
        if m <= n:
            tall[:, r:].addmm_(left, left.mT @ tall[:, r:], alpha=-1)
        else:
            wide[:r].addmm_(wide[:r] @ right, right.mT, alpha=-1)
        tall[:, :r], wide[r:] = left, right.mT
        torch.addmm(grad, tall, wide, alpha=-1, out=out)
    else:
        source = grad
        if left is not None:
            torch.addmm(source, left, left.mT @ source, alpha=-1, out=out)
            source = out
        if right is not None:
            torch.addmm(source, source @ right, right.mT, alpha=-1, out=out)


def cases(dtype: torch.dtype) -> list[Case]:
    """Every side and flag, sizes up and down, at once and apart, layouts, and ranks from 0 to all of a side."""
    found: list[Case] = []
    sizes = [(31, 45, 6, 9), (90, 64, 24, 10), (64, 90, 24, 10), (1, 7, 1, 2), (20, 150, 20, 90), (120, 100, 95, 90)]
    for i, (m, n, r, s) in enumerate(sizes):
        grad, left, right = gaussian(m, n, dtype=dtype, seed=i), orthonormal(m, r, dtype), orthonormal(n, s, dtype, 2)
        found += [(grad, left, right, flags) for flags in REMOVE_AND_KEEP]
        found += [(grad, left, None, {}), (grad, None, right, {})]
        found += [(grad, left, None, {"keep_left": True}), (grad, None, right, {"keep_right": True})]
    grad, left, right = gaussian(45, 31, dtype=dtype).mT, orthonormal(31, 6, dtype), orthonormal(45, 9, dtype, 2)
    inside = gaussian(50, 70, dtype=dtype)[7:38, 20:65]
    for flags in REMOVE_AND_KEEP:
        found += [(grad, left, right, flags), (inside, left.mT.contiguous().mT, right, flags)]
        found += [(inside, left[:, :0], right, flags), (grad, left, right[:, :0], flags)]
    found += [(grad, left[:, :0], None, {}), (inside, left[:, :0], None, {"keep_left": True})]
    random.Random(5).shuffle(found)
    return found


def in_one_call(found: list[Case], outs: list[Tensor]) -> None:
    grads, lefts, rights, flags = zip(*found, strict=True)
    forms = [form_of(*(f.get(name, False) for name in NAMES)) for f in flags]
    project_products(grads, lefts, rights, outs, forms)


def copy_of(grad: Tensor) -> Tensor:
    """With its strides."""
    return torch.empty_strided(grad.shape, grad.stride(), dtype=grad.dtype).copy_(grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_list_has_the_bits_of_torchs_calls_and_their_accuracy(dtype: torch.dtype) -> None:
    found = cases(dtype)
    before = [grad.clone() for grad, *_ in found]
    outs = [torch.full_like(grad, float("nan")) for grad, *_ in found]
    in_one_call(found, outs)
    ranks = [(*grad.shape, a.shape[1], b.shape[1]) for grad, a, b, _ in found if a is not None and b is not None]
    assert {stacked(*four, dtype) for four in ranks} == {True, False}
    in_place = [copy_of(grad) for grad, *_ in found]
    in_one_call([(work, *rest) for work, (_, *rest) in zip(in_place, found, strict=True)], in_place)
    for (grad, left, right, flags), start, out, work in zip(found, before, outs, in_place, strict=True):
        assert torch.equal(grad, start)
        by_torch(grad, left, right, wanted := torch.full_like(grad, float("nan")), **flags)
        assert torch.equal(out, wanted)
        by_torch(own := copy_of(grad), left, right, own, **flags)
        assert torch.equal(work, own)
        assert_accurate(out, reference.project, grad, left, right, **flags)
        assert_accurate(work, reference.project, grad, left, right, **flags)


def test_dtypes_take_turns_and_a_matrix_of_nan_leaves_none_in_the_shared_memory() -> None:
    found = [case for pair in zip(cases(torch.float32), cases(torch.bfloat16), strict=True) for case in pair]
    spoiled = [
        case
        for grad, left, right, flags in found
        for case in ((torch.full_like(grad, float("nan")), left, right, flags), (grad, left, right, flags))
    ]
    outs = [torch.empty_like(grad) for grad, *_ in spoiled]
    in_one_call(spoiled, outs)
    for (grad, left, right, flags), out in zip(found, outs[1::2], strict=True):
        by_torch(grad, left, right, wanted := torch.empty_like(grad), **flags)
        assert torch.equal(out, wanted)


class Calls(TorchDispatchMode):
    """The operators that reach a device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:
            result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_nothing_but_products_and_memory_once_a_list() -> None:
    def calls(r: int, s: int, *kinds: str) -> list[str]:
        left, right = orthonormal(96, r, torch.float32), orthonormal(160, s, torch.float32)
        bases = left if "left" in kinds else None, right if "right" in kinds else None
        flags = {kind: True for kind in kinds if kind in NAMES}
        found: list[Case] = [(gaussian(96, 160, dtype=torch.float32), *bases, flags)] * 5
        with Calls() as seen:
            in_one_call(found, [case[0].clone() for case in found])
        return [name for name in seen.names if name != "clone.default"]

    product, copy, memory = "addmm.out", "copy_.default", "new_empty.default"
    assert calls(12, 40, "left") == [memory, product, product] + [product, product] * 4
    assert calls(12, 40, "right", "keep_right") == [memory, product, product] + [product, product] * 4
    assert stacked(96, 160, 12, 40, torch.float32)
    assert not stacked(96, 160, 90, 90, torch.float32)
    once = [product] * 4 + [copy, copy, product]
    first = calls(12, 40, "left", "right")
    assert first.count(memory) == 3
    assert [name for name in first if name != memory] == once * 5
    apart = calls(90, 90, "left", "right")
    assert apart.count(memory) == 2
    assert [name for name in apart if name != memory] == [product] * 4 * 5
    block = calls(12, 40, "left", "right", "block")
    assert block.count(memory) == 2
    assert [name for name in block if name != memory] == [product] * 4 * 5


def test_a_mixed_list_through_foreach(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of the op for what it takes; batches, bases of other dtypes, and what there is nothing to do for."""
    monkeypatch.setenv("SCULPT_BACKEND", "cublas")
    asked: list[int] = []
    run = foreach_cuda.project_products
    monkeypatch.setattr(foreach_cuda, "project_products", lambda *lists: asked.append(len(lists[0])) or run(*lists))
    around = torch.full((40, 60), 7.0)
    inner = around[4:35, 8:53]
    inner.copy_(gaussian(31, 45))
    left, right = orthonormal(31, 6, torch.float32), orthonormal(45, 9, torch.float32, 2)
    grads = [
        gaussian(31, 45, dtype=torch.float32, seed=1),
        gaussian(3, 31, 45, dtype=torch.float32, seed=2),
        inner,
        gaussian(31, 45, dtype=torch.bfloat16, seed=3),
        gaussian(31, 45, dtype=torch.float32, seed=4),
        torch.empty(31, 0),
        gaussian(31, 45, dtype=torch.float32, seed=5),
        gaussian(31, 45, dtype=torch.float16, seed=6),
    ]
    lefts = [left, left, left, left, None, left, left, left]
    rights = [right, right, None, right, None, None, right, right]
    keep_lefts, keep_rights = [True, *[False] * 7], [False] * 6 + [True, False]
    before = [grad.clone() for grad in grads]
    for flags in ((keep_lefts, keep_rights), ((), ())):
        for grad, start in zip(grads, before, strict=True):
            grad.copy_(start)
        foreach_cuda.foreach_into(grads, lefts, rights, *flags, False)
        for i, (grad, start) in enumerate(zip(grads, before, strict=True)):
            kept = {name: True for name, given in zip(NAMES, flags, strict=False) if given and given[i]}
            assert_accurate(grad, reference.project, start, lefts[i], rights[i], **kept)
    assert asked == [3, 3]
    assert torch.equal(grads[4], before[4])
    inner.fill_(7.0)
    assert (around == 7).all()


def test_spans_that_meet() -> None:
    """Random views of one buffer, some of them empty, beside every pair and the exact check."""
    rng = random.Random(1)
    refused = 0
    for _ in range(400):
        buffer = torch.zeros(300)
        views = []
        for _ in range(rng.randrange(2, 7)):
            begin = rng.randrange(250)
            views.append(buffer[begin : begin + rng.randrange(0, 50)].view(1, -1))
        written = rng.randrange(1, len(views))
        grads, bases = views[:written], views[written:]
        lengths = np.array([4 * view.numel() for view in views])
        met = foreach_cuda.meet(written, [view.data_ptr() for view in views], lengths)
        spans = [(v.data_ptr(), v.data_ptr() + 4 * v.numel()) for v in views if v.numel()]
        firsts = [i for i, v in enumerate(views) if v.numel()]
        assert met == any(
            a[0] < b[1] and b[0] < a[1]
            for p, a in zip(firsts, spans, strict=True)
            for q, b in zip(firsts, spans, strict=True)
            if p < q and p < written
        )
        refused += met
        if not met:  # the exact check has nothing to refuse
            for basis in bases or [None]:
                check_foreach_apart("foreach_project_", grads, [basis] * written, [None] * written)
    assert 50 < refused < 350

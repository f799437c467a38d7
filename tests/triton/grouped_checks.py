"""Numerical checks of the grouped Triton kernels, run like `kernel_checks.py` and not collected by name."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from sculpt_ops import reference
from sculpt_ops.ops import foreach_cuda
from sculpt_ops.triton_kernels import grouped, grouped_launch, launch, panels, tables
from sculpt_ops.triton_kernels.grouped_launch import Located, Member, prepare, why_not_group

from .kernel_checks import BF16, DEVICE, F16, F32, _bfloat16_interpreter, gradient, orthonormal  # noqa: F401

FLAGS: tuple[dict[str, bool], ...] = (
    {},
    {"keep_left": True},
    {"keep_right": True},
    {"keep_left": True, "keep_right": True},
    {"block": True},
)


def member(m: int, n: int, r: int | None, s: int | None, seed: int, dtype: torch.dtype = F32, **flags: bool) -> Member:
    left = None if r is None else orthonormal(m, r, dtype=dtype, seed=seed + 1).contiguous()
    right = None if s is None else orthonormal(n, s, dtype=dtype, seed=seed + 2).contiguous()
    full = {"keep_left": False, "keep_right": False, "block": False, **flags}
    return Member(gradient(m, n, dtype=dtype, seed=seed), left, right, **full)


def expected(entry: Member, dtype: torch.dtype = torch.float64) -> Tensor:
    bases = [None if basis is None else basis.to(dtype) for basis in (entry.left, entry.right)]
    return reference.project(
        entry.grad.to(dtype), *bases, **{k: getattr(entry, k) for k in ("keep_left", "keep_right", "block")}
    )


def located(members: list[Member]) -> list[Located]:
    lists = ([entry.grad for entry in members], [entry.left for entry in members], [entry.right for entry in members])
    return [group.locate(*lists) for group in prepare(members, range(len(members)))]


def assert_projected(members: list[Member]) -> None:
    """At most twice the plain expression's error, plus the rounding of the result, plus a floor, as `kernel_checks`."""
    exact, plain = [expected(entry) for entry in members], [expected(entry, entry.grad.dtype) for entry in members]
    biggest = [entry.grad.double().abs().max() for entry in members]
    assert all(why_not_group(entry) is None for entry in members)
    for group in located(members):
        group.launch()
    for entry, wanted, theirs, scale in zip(members, exact, plain, biggest, strict=True):
        error = (entry.grad.double() - wanted).abs().max()
        rounding = (wanted.to(entry.grad.dtype).double() - wanted).abs().max()
        floor = (2**-20 if entry.grad.dtype == F32 else 2**-15) * scale
        assert error <= 2 * (theirs.double() - wanted).abs().max() + 2 * rounding + floor, entry


@contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the kernels launched inside."""
    names: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in grouped.__all__:
            kernel = getattr(grouped, name)

            def run(*args: Any, name: str = name, run: Any = kernel.run, **options: Any) -> Any:
                names.append(name)
                return run(*args, **options)

            patch.setattr(kernel, "run", run)
        yield names


def mixture() -> list[Member]:
    """Every combination of sides and flags, sizes and ranks that are no multiples of anything, one of rank 0."""
    rng = random.Random(3)
    members = []
    for i, flags in enumerate(FLAGS * 2):
        r, s = rng.randrange(1, 20), rng.randrange(1, 20)
        members.append(member(rng.randrange(20, 90), rng.randrange(20, 90), r, s, 10 * i, **flags))
    members += [member(33, 50, 7, None, 201), member(50, 33, None, 7, 211)]
    members += [member(33, 50, 7, None, 221, keep_left=True), member(50, 33, None, 5, 231, keep_right=True)]
    return [*members, member(20, 30, 0, 3, 241), member(20, 30, 4, 0, 251), member(20, 30, 0, 2, 261, keep_left=True)]


def test_every_side_rank_and_flag_in_four_launches() -> None:
    with counted() as launches:
        assert_projected(mixture())
    assert launches == [f"grouped_{name}_kernel" for name in ("thin", "core", "correct", "update")]


def test_one_side_each_in_one_launch_and_kept_ones_in_another() -> None:
    members = [member(40 + i, 70 - i, 5 + i, None, i) for i in range(3)] + [member(45, 66, None, 17, 9)]
    with counted() as launches:
        assert_projected(members)
    assert launches == ["grouped_one_side_kernel"]
    with counted() as launches:
        assert_projected([*members, member(30, 40, 6, None, 20, keep_left=True)])
    assert launches == ["grouped_one_side_kernel"] * 2


def test_ranks_beyond_the_registers_of_one_program() -> None:
    with counted() as launches:
        assert_projected([member(300, 150, 140, None, 1), member(160, 40, 30, None, 2)])
    assert "grouped_one_side_kernel" not in launches
    assert_projected([member(150, 170, 135, 20, 3), member(170, 150, 10, 140, 4, keep_left=True)])


@pytest.mark.parametrize(("dtype", "basis_dtype"), [(BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)], ids=str)
def test_half_precision(dtype: torch.dtype, basis_dtype: torch.dtype) -> None:
    def cast(entry: Member) -> Member:
        bases = {k: b if b is None else b.to(basis_dtype) for k, b in (("left", entry.left), ("right", entry.right))}
        return entry._replace(grad=entry.grad.to(dtype), **bases)

    assert_projected([cast(entry) for entry in mixture()[:5]])
    assert_projected([cast(member(64, 48, 16, None, 1)), cast(member(64, 48, None, 16, 2))])


def test_chunks_that_l2_holds_and_rows_of_a_wider_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "device_of", lambda index: panels.Device(l2_bytes=2**14, multiprocessors=2))
    monkeypatch.setattr(grouped_launch, "device_for", launch.device_for)
    members = [member(40, 330, 3, 2, 1), member(330, 40, 3, 2, 2), member(40, 410, 3, 2, 3, keep_right=True)]
    members += [member(40, 330, None, 2, 4), member(40, 330, 3, 2, 5, block=True)]
    wide = torch.full((50, 400), 7.0, device=DEVICE)
    inner = wide[3:43, 16:346]
    inner.copy_(gradient(40, 330, seed=6))
    members.append(member(40, 330, 4, 3, 6)._replace(grad=inner))
    slots = [count for part in located(members[:1]) for count in part.group.plan.table[:, 9]]
    assert slots[0] > 1
    assert_projected(members)
    inner.fill_(7.0)
    assert (wide == 7).all()


def test_non_finite_values_stay_where_torch_puts_them() -> None:
    entry = member(50, 70, 3, None, 1)
    entry.grad[17, 40] = float("inf")
    wanted = expected(entry, F32)
    members = [entry, member(30, 40, 2, None, 2)]
    for group in located(members):
        group.launch()
    assert torch.equal(entry.grad.isfinite(), wanted.isfinite())


def test_what_a_group_does_not_take() -> None:
    entry = member(30, 40, 3, 4, 1)
    assert "wanted a single matrix" in str(why_not_group(entry._replace(grad=torch.ones(2, 30, 40))))
    assert "wanted contiguous rows" in str(why_not_group(entry._replace(grad=torch.ones(40, 30).mT)))
    assert "wanted contiguous rows" in str(why_not_group(entry._replace(grad=torch.ones(0, 40))))
    assert "given a left" in str(why_not_group(entry._replace(left=torch.ones(3, 30).mT)))
    assert "wanted one dtype" in str(why_not_group(entry._replace(right=entry.right.double())))
    assert "float64" in str(why_not_group(member(30, 40, 3, 4, 1, dtype=torch.float64)))


def test_a_call_is_planned_once_and_again_when_its_memory_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCULPT_BACKEND", "triton")
    tables._tables.clear()
    uploads: list[int] = []
    monkeypatch.setattr(grouped_launch, "upload", lambda a, d: uploads.append(a.shape[0]) or tables.upload(a, d))
    checks: list[int] = []
    check = foreach_cuda.check_foreach
    monkeypatch.setattr(
        foreach_cuda, "check_foreach", lambda *given, **flags: checks.append(1) or check(*given, **flags)
    )
    members = [member(30, 40, 3, 4, i) for i in range(3)]
    lists = [[entry.grad for entry in members], [entry.left for entry in members], [entry.right for entry in members]]
    foreach_cuda.foreach_into(*lists, (), (), False)
    first = len(uploads)
    assert first == 6  # the table, four lists of tiles, the pointers
    foreach_cuda.foreach_into(*lists, (), (), False)
    assert (len(uploads), len(checks)) == (first, 1)
    moved = [grad.clone() for grad in lists[0]]
    foreach_cuda.foreach_into(moved, *lists[1:], (), (), False)
    assert (len(uploads), len(checks)) == (first + 1, 1)  # the pointers alone
    before = moved[0].clone()
    with pytest.raises(ValueError, match="given entries 0 and 1 that share memory"):
        foreach_cuda.foreach_into([moved[0], moved[0], moved[2]], *lists[1:], (), (), False)
    assert torch.equal(moved[0], before)
    foreach_cuda.foreach_into(moved, *lists[1:], (True,) * 3, (), False)
    assert len(checks) == 2


def test_what_a_graph_captured_is_kept_and_what_is_made_while_capturing_is_not_shared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables._tables.clear()
    tables._captured.clear()
    device, made = torch.device("cpu"), []

    def make() -> object:
        made.append(object())
        return made[-1]

    before = tables.held("before", make, device)
    monkeypatch.setattr(tables, "is_capturing", lambda device: True)
    assert tables.held("before", make, device) is before
    inside = tables.held("inside", make, device)
    assert inside is not tables.held("inside", make, device)
    monkeypatch.setattr(tables, "is_capturing", lambda device: False)
    assert tables.held("inside", make, device) is not inside
    for i in range(2 * tables.TABLES):
        tables.held(i, make, device)
    assert len(tables._tables) == tables.TABLES
    assert {id(before), id(inside)} <= set(tables._captured)


@pytest.mark.skipif(launch.INTERPRET, reason="needs a GPU")
@pytest.mark.parametrize("warm", [False, True])
def test_in_a_cuda_graph(warm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCULPT_BACKEND", "triton")
    tables._tables.clear()
    members = [member(64, 96, 16, 16, i) for i in range(4)]
    lists = [[entry.grad for entry in members], [entry.left for entry in members], [entry.right for entry in members]]
    others = [[entry.grad.clone() for entry in members], *lists[1:]]
    foreach_cuda.foreach_into(*(lists if warm else others), (), (), False)  # compiles the kernels
    start = [member(64, 96, 16, 16, i + 50).grad for i in range(4)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        foreach_cuda.foreach_into(*lists, (), (), False)
    for entry, grad in zip(members, start, strict=True):
        entry.grad.copy_(grad)
    wanted = [expected(entry) for entry in members]
    tables._tables.clear()
    graph.replay()
    for entry, exact in zip(members, wanted, strict=True):
        torch.testing.assert_close(entry.grad.double(), exact, rtol=0, atol=1e-4)

"""Checks of the kernels that make bfloat16 parts, run like `kernel_checks.py` and not collected by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sculpt_ops import reference
from sculpt_ops.ops import split_products
from sculpt_ops.triton_kernels import split_parts

from .kernel_checks import (
    BF16,
    DEVICE,
    F16,
    F32,
    _bfloat16_interpreter,  # noqa: F401
    any_floats,
    assert_same_bits,
    copies,
    gradient,
    orthonormal,
)


def orders(*shape: int, dtype: torch.dtype = BF16) -> list[Tensor]:
    """Two of that shape on the device, in row-major and in column-major order, the second within something larger."""
    rows, columns = shape
    within = torch.full((columns + 3, rows + 2), 7.0, dtype=dtype, device=DEVICE)
    return [torch.full(shape, 7.0, dtype=dtype, device=DEVICE), within[2:-1, 1:-1].mT]


def assert_same_parts(out: Tensor, twin: Tensor) -> None:
    """To the bit, but for the bits of a NaN."""
    out = out.cpu()
    assert torch.equal(out.isnan(), twin.isnan())
    assert_same_bits(out.nan_to_num(1.0), twin.nan_to_num(1.0))


@pytest.mark.parametrize("low", [1, 2])
@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize(("length", "rank"), [(1, 1), (70, 33), (130, 16), (200, 64), (5, 0), (0, 5)])
def test_split_parts_are_the_twins_to_the_bit(length: int, rank: int, halves: int, low: int) -> None:
    source = any_floats(length, halves * rank) if length * rank > 5 else gradient(length, halves * rank).cpu()
    for x in (source, gradient(length, halves * rank, dtype=BF16).cpu()):
        reference.split_parts(twin := torch.empty(length, 3 * rank, dtype=BF16), x, low)
        for given in copies(x):
            for out in orders(length, 3 * rank):
                split_parts.split_parts(out, given, low)
                assert_same_parts(out, twin)
                if out._base is not None:
                    out.fill_(7.0)
                    assert (out._base == 7.0).all()


@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16), (BF16, F32)], ids=str)
@pytest.mark.parametrize(("r", "s"), [(16, 40), (33, 7), (0, 5), (5, 0)])
def test_split_parts_of_two_factors_in_one_launch(r: int, s: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, y = gradient(150, r, dtype=dtypes[0]).cpu(), gradient(70, s, dtype=dtypes[1], seed=1).cpu()
    twins = torch.empty(150, 3 * r, dtype=BF16), torch.empty(70, 3 * s, dtype=BF16)
    reference.split_parts(twins[0], x, 1, (twins[1], y))
    for first in orders(*twins[0].shape):
        for second in orders(*twins[1].shape):
            split_parts.split_parts(first, x.to(DEVICE), 1, (second, y.to(DEVICE)))
            assert_same_parts(first, twins[0])
            assert_same_parts(second, twins[1])


def joined(parts: Tensor) -> Tensor:
    """The numbers of [h, h, l]."""
    high, again, low = parts.double().tensor_split(3, 1)
    assert torch.equal(high, again)
    return high + low


@pytest.mark.parametrize("basis_dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("has_source", [True, False])
@pytest.mark.parametrize(("length", "rank", "depth"), [(1, 1, 1), (70, 33, 7), (130, 16, 64), (40, 7, 100), (9, 5, 0)])
def test_corrected_parts(length: int, rank: int, depth: int, has_source: bool, basis_dtype: torch.dtype) -> None:
    source, basis = gradient(length, 2 * rank), gradient(length, depth, dtype=basis_dtype, seed=1)
    # The last quarter is what is left out.
    core = gradient(2 * depth, 2 * rank, seed=2) / 8
    core[depth:, rank:] = 1e6
    inside = core[:depth, :rank].double() + core[depth:, :rank].double() + core[:depth, rank:].double()
    exact = (source[:, :rank].double() + source[:, rank:].double() if has_source else 0) - (
        (1 if has_source else -1) * (basis.double() @ inside)
    )
    for given in zip(copies(source), copies(basis), reversed(copies(core)), strict=True):
        for out in orders(length, 3 * rank):
            split_parts.corrected_parts(out, given[0] if has_source else None, *given[1:])
            assert (joined(out) - exact).abs().max() <= 2**-15 * (1 + exact.abs().max())
            twin = torch.empty_like(out)
            reference.corrected_parts(twin, source if has_source else None, basis, core)
            assert (joined(out) - joined(twin)).abs().max() <= 2**-15 * (1 + exact.abs().max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.zeros(9, 12)}, "out: given"),
        ({"out": torch.zeros(9, 13, dtype=BF16)}, "out: given"),
        ({"source": torch.zeros(9, 5)}, "source: given"),
        ({"source": torch.zeros(8, 8)}, "source: given"),
        ({"source": torch.zeros(9, 8, dtype=F16)}, "source: given"),
        ({"basis": torch.zeros(8, 3)}, "basis: given"),
        ({"basis": torch.zeros(9, 3, dtype=F16)}, "basis: given"),
        ({"core": torch.zeros(6, 7)}, "core: given"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_parts_that_do_not_fit_are_refused_before_writing(change: dict[str, Tensor], message: str) -> None:
    given = {"out": torch.zeros(9, 12, dtype=BF16), "source": torch.ones(9, 8), "basis": torch.ones(9, 3)}
    given |= {"core": torch.ones(6, 8)} | change
    out, source, basis, core = (x.to(DEVICE) for x in given.values())
    with pytest.raises(ValueError, match=f"corrected_parts: .*{message}"):
        split_parts.corrected_parts(out, source, basis, core)
    if not {"basis", "core"} & set(change):
        with pytest.raises(ValueError, match=f"split_parts: .*{message}"):
            split_parts.split_parts(out, source, 2)
    assert (out == 0).all()


def test_other_layouts_of_parts_are_refused() -> None:
    out, source = torch.zeros(9, 12, dtype=BF16, device=DEVICE), torch.ones(9, 8, device=DEVICE)
    with pytest.raises(ValueError, match="every element at its own address"):
        split_parts.split_parts(out[:1].expand(9, 12), source, 2)
    with pytest.raises(ValueError, match="low: given 0, wanted 1 or 2"):
        split_parts.split_parts(out, source, 0)
    with pytest.raises(ValueError, match="second: given sources of 8 and 4 columns, wanted 4 and 4"):
        split_parts.split_parts(out, source, 1, (out, source[:, :4]))
    assert (out == 0).all()


@pytest.mark.parametrize("flags", [{}, {"keep_left": True}, {"keep_right": True}, {"block": True}], ids=str)
@pytest.mark.parametrize(("m", "n", "r", "s"), [(96, 150, 8, 16), (150, 96, 20, 7), (200, 300, 140, 16)])
def test_split_products_by_these_kernels(
    m: int, n: int, r: int, s: int, flags: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by their twins; on the CPU those are what runs otherwise."""
    monkeypatch.setattr(split_products, "_kernels", lambda tensor: split_parts)
    full = {"keep_left": False, "keep_right": False, "block": False, **flags}
    left, right = orthonormal(m, r), orthonormal(n, s, seed=2)
    grad = gradient(m, n, dtype=BF16)
    sides: list[tuple[Tensor | None, Tensor | None]] = [(left, right)]
    sides += [(left, None)] * ("keep_right" not in flags and not full["block"])
    sides += [(None, right)] * ("keep_left" not in flags and not full["block"])
    for a, b in sides:
        split_products.project_split(grad, a, b, out := torch.empty_like(grad), **full)
        exact = reference.project(grad.double(), *(x if x is None else x.double() for x in (a, b)), **flags)
        rounding_error = (exact.to(BF16).double() - exact).norm()
        assert (out.double() - exact).norm() <= 2 * rounding_error + 2e-5 * grad.double().norm()
        split_products.project_split(in_place := grad.clone(), a, b, in_place, **full)
        assert torch.equal(in_place, out)

"""Values of the projection ops against float64, relative to the plain twins."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import sculpt_ops
from sculpt_ops import reference

from .accuracy import DTYPES, REMOVE_AND_KEEP, assert_accurate, gaussian, orthonormal, sides

SHAPES = [
    # m, n, r, s
    (199, 1128, 17, 33),
    (1128, 199, 150, 64),
    (64, 64, 16, 16),
    (1, 50, 1, 3),
    (50, 1, 7, 1),
    (1, 1, 1, 1),
    (96, 160, 96, 160),
    (40, 30, 0, 0),
    (300, 200, 290, 190),
    (385, 577, 130, 31),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half", ["left", "right", "neither"])
def test_two_sides_with_a_float32_basis_are_rounded_once(dtype: torch.dtype, half: str) -> None:
    """Most is removed, so that what is rounded in between is large beside the result."""
    grad = gaussian(64, 72, dtype=dtype)
    left, right = orthonormal(64, 60, torch.float32), orthonormal(72, 70, torch.float32)
    left, right = left.to(dtype) if half == "left" else left, right.to(dtype) if half == "right" else right
    expected = reference.project(grad.double(), left.double(), right.double())
    found = sculpt_ops.project(grad, left, right)
    assert float((found.double() - expected).abs().max()) <= 2 * torch.finfo(dtype).eps * float(expected.abs().max())


def layouts(matrix: Tensor) -> dict[str, Tensor]:
    """The same values: contiguous, transposed storage, every second row, every second column, and offset storage."""
    m, n = matrix.shape
    rows = torch.full((2 * m, n), torch.nan, dtype=matrix.dtype)
    cols = torch.full((m, 2 * n), torch.nan, dtype=matrix.dtype)
    offset = torch.full((m + 3, n + 5), torch.nan, dtype=matrix.dtype)
    views = {
        "contiguous": matrix.clone(),
        "transposed": matrix.t().contiguous().t(),
        "rows": rows[::2],
        "cols": cols[:, ::2],
        "offset": offset[2:-1, 3:-2],
    }
    for view in views.values():
        view.copy_(matrix)
    return views


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("flags", REMOVE_AND_KEEP, ids=lambda f: "+".join(f) or "remove")
def test_project_and_in_place(dtype: torch.dtype, shape: tuple[int, int, int, int], flags: dict[str, bool]) -> None:
    m, n, r, s = shape
    grad, left, right = gaussian(m, n, dtype=dtype), orthonormal(m, r, dtype), orthonormal(n, s, dtype, seed=2)
    for a, b in sides(left, right, flags):
        before = grad.clone()
        out = sculpt_ops.project(grad, a, b, **flags)
        assert_accurate(out, reference.project, grad, a, b, **flags)
        assert torch.equal(grad, before)
        in_place = grad.clone()
        assert sculpt_ops.project_(in_place, a, b, **flags) is in_place
        assert torch.equal(in_place, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flags", REMOVE_AND_KEEP, ids=lambda f: "+".join(f) or "remove")
def test_strided_views_and_storage_offsets(dtype: torch.dtype, flags: dict[str, bool]) -> None:
    m, n = 61, 83
    grad, left, right = gaussian(m, n, dtype=dtype), orthonormal(m, 20, dtype), orthonormal(n, 9, dtype, seed=2)
    for a, b in sides(left, right, flags):
        for name, view in layouts(grad).items():
            for basis_view in ("contiguous", "transposed", "cols"):
                a_view = None if a is None else layouts(a)[basis_view]
                b_view = None if b is None else layouts(b)[basis_view]
                whole = view._base if view._base is not None else view
                outside = torch.isnan(whole).sum()
                assert_accurate(
                    sculpt_ops.project(view, a_view, b_view, **flags), reference.project, grad, a, b, **flags
                )
                in_place = layouts(grad)[name]
                sculpt_ops.project_(in_place, a_view, b_view, **flags)
                assert_accurate(in_place, reference.project, grad, a, b, **flags)
                # What lies between the elements of the view has not been touched.
                whole = in_place._base if in_place._base is not None else in_place
                assert torch.isnan(whole).sum() == outside


def test_expanded_input_of_the_functional_form() -> None:
    row = gaussian(1, 40, dtype=torch.float32)
    left = orthonormal(30, 5, torch.float32)
    assert_accurate(sculpt_ops.project(row.expand(30, 40), left), reference.project, row.expand(30, 40), left)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("flags", REMOVE_AND_KEEP, ids=lambda f: "+".join(f) or "remove")
def test_float32_basis_of_a_half_matrix_loses_only_the_final_rounding(
    dtype: torch.dtype, flags: dict[str, bool]
) -> None:
    grad = gaussian(150, 210, dtype=dtype)
    left, right = orthonormal(150, 40, torch.float32), orthonormal(210, 70, torch.float32, seed=2)
    for a, b in sides(left, right, flags):
        assert_accurate(sculpt_ops.project(grad, a, b, **flags), reference.project, grad, a, b, **flags)
    # One side in one pass: fp32 inside, so the error is that of rounding the exact result once.
    exact = reference.project(grad.double(), left.double())
    error = (sculpt_ops.project(grad, left).double() - exact).abs()
    assert error.max() <= 1.01 * (exact.to(dtype).double() - exact).abs().max() + 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_dimensions_and_broadcast_bases(dtype: torch.dtype) -> None:
    grad = gaussian(2, 3, 31, 45, dtype=dtype)
    full = torch.stack([torch.stack([orthonormal(31, 6, dtype, seed=i + 3 * j) for i in range(3)]) for j in range(2)])
    right = torch.stack([orthonormal(45, 8, dtype, seed=i) for i in range(3)])
    for left in (full, full[0], full[0, 0], full[:, :1]):
        for flags in REMOVE_AND_KEEP:
            assert_accurate(
                sculpt_ops.project(grad, left, right, **flags), reference.project, grad, left, right, **flags
            )
    permuted = grad.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2)
    sculpt_ops.project_(permuted, full, right)
    assert_accurate(permuted, reference.project, grad, full, right)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0, 4, 5), (3, 0, 5)], ids=str)
@pytest.mark.parametrize("flags", REMOVE_AND_KEEP, ids=lambda f: "+".join(f) or "remove")
def test_empty(shape: tuple[int, ...], flags: dict[str, bool]) -> None:
    grad = torch.zeros(shape)
    m, n = shape[-2:]
    left, right = torch.eye(m)[:, : min(m, 2)], torch.eye(n)[:, : min(n, 2)]
    assert sculpt_ops.project(grad, left, right, **flags).shape == shape
    sculpt_ops.project_(grad, left, right, **flags)


def test_rank_zero_is_the_identity_and_keeping_rank_zero_is_zero() -> None:
    grad = gaussian(20, 30, dtype=torch.bfloat16)
    nothing = torch.empty(20, 0, dtype=torch.bfloat16)
    assert torch.equal(sculpt_ops.project(grad, nothing), grad)
    assert torch.equal(sculpt_ops.project_(grad.clone(), nothing), grad)
    assert torch.equal(sculpt_ops.project(grad, nothing, keep_left=True), torch.zeros_like(grad))
    assert torch.equal(sculpt_ops.project(grad), grad)
    assert sculpt_ops.project(grad).data_ptr() != grad.data_ptr()


def test_nan_and_inf_pass_through_as_in_torch() -> None:
    for bad in (torch.nan, torch.inf):
        for dtype in (torch.float32, torch.bfloat16):
            grad = gaussian(50, 70, dtype=dtype)
            grad[3, 11] = bad
            left, right = orthonormal(50, 5, dtype), orthonormal(70, 9, dtype, seed=2)
            for a, b in ((left, None), (None, right), (left, right)):
                ours, plain = sculpt_ops.project(grad, a, b), reference.project(grad, a, b)
                assert torch.equal(ours.isfinite(), plain.isfinite())


@pytest.mark.parametrize("block", [False, True])
def test_foreach_is_project_entry_by_entry(block: bool) -> None:
    shapes = [(64, 64), (199, 1128), (30, 7), (5, 90)]
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float32]
    grads = [gaussian(*shape, dtype=dtype, seed=i) for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))]
    lefts = [orthonormal(m, max(1, m // 3), d) for (m, _), d in zip(shapes, dtypes, strict=True)]
    rights = [orthonormal(n, max(1, n // 4), d) for (_, n), d in zip(shapes, dtypes, strict=True)]
    keep = [] if block else [True, False, True, False]
    if not block:
        lefts[1] = rights[3] = None
    expected = [
        sculpt_ops.project(g, a, b, keep_left=bool(keep) and keep[i], block=block)
        for i, (g, a, b) in enumerate(zip(grads, lefts, rights, strict=True))
    ]
    sculpt_ops.foreach_project_(grads, lefts, rights, keep_lefts=keep, block=block)
    for ours, wanted in zip(grads, expected, strict=True):
        assert torch.equal(ours, wanted)
    sculpt_ops.foreach_project_([], [], [])


def test_foreach_takes_column_slices_of_one_matrix() -> None:
    """A fused qkv gradient projected part by part: the slices interleave in memory and share no element."""
    fused = gaussian(40, 90, dtype=torch.float32)
    left = orthonormal(40, 8, torch.float32)
    expected = sculpt_ops.project(fused, left)
    sculpt_ops.foreach_project_(list(fused.split(30, dim=1)), [left] * 3, [None] * 3)
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-5)


def test_foreach_takes_views_that_lie_between_each_other() -> None:
    """Halves of stacked matrices by rows and by columns, transposed slices, every other column."""
    stacked, matrix = gaussian(2, 24, 32, dtype=torch.float32), gaussian(24, 32, dtype=torch.float32)
    lists = {
        12: stacked.split(12, -2),
        24: stacked.split(16, -1),
        8: [part.mT for part in matrix.split(8, 1)],
        16: [matrix[:16, ::2], matrix[:16, 1::2]],
    }
    for rows, views in lists.items():
        left = orthonormal(rows, 2, torch.float32)
        expected = [sculpt_ops.project(view, left) for view in views]
        sculpt_ops.foreach_project_(list(views), [left] * len(views), [None] * len(views))
        for view, wanted in zip(views, expected, strict=True):
            torch.testing.assert_close(view, wanted, rtol=0, atol=1e-5)
    beside = gaussian(24, 32, dtype=torch.float32)
    beside[:, 8:10] = orthonormal(24, 2, torch.float32)
    sculpt_ops.project_(beside[:, :8].mT, None, beside[:, 8:10])
    assert (beside[:, 8:10].mT @ beside[:, :8]).abs().max() < 1e-5


def restore_arguments(weight: Tensor, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    return {"left_image": left.mT @ weight, "right_image": weight @ right, "core": left.mT @ weight @ right}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flags", REMOVE_AND_KEEP, ids=lambda f: "+".join(f) or "remove")
@pytest.mark.parametrize("shape", [(199, 112, 17, 33), (64, 64, 40, 40), (1, 9, 1, 4), (30, 20, 0, 5)], ids=str)
def test_restore(dtype: torch.dtype, flags: dict[str, bool], shape: tuple[int, int, int, int]) -> None:
    m, n, r, s = shape
    start, moved = gaussian(m, n, dtype=dtype), gaussian(m, n, dtype=dtype, seed=7)
    left, right = orthonormal(m, r, dtype), orthonormal(n, s, dtype, seed=2)
    thin = restore_arguments(start, left, right)

    def plain(w: Tensor, a: Tensor, ai: Tensor, b: Tensor, bi: Tensor, core: Tensor, w0: Tensor) -> Tensor:
        return reference.restore_(w.clone(), a, ai, b, bi, core=core, reference=w0, **flags)

    args = (moved, left, thin["left_image"], right, thin["right_image"], thin["core"], start)
    for transposed in (False, True):
        ours = moved.t().contiguous().t() if transposed else moved.clone()
        sculpt_ops.restore_(
            ours, left, thin["left_image"], right, thin["right_image"], core=thin["core"], reference=start, **flags
        )
        assert_accurate(ours, plain, *args, scale=float(moved.double().abs().max() + start.double().abs().max()))


def test_restore_puts_the_protected_part_back_and_leaves_the_rest() -> None:
    start, moved = gaussian(50, 80), gaussian(50, 80, seed=3)
    left, right = orthonormal(50, 12, torch.float64), orthonormal(80, 30, torch.float64, seed=2)
    thin = restore_arguments(start, left, right)
    weight = sculpt_ops.restore_(moved.clone(), left, thin["left_image"], right, thin["right_image"])
    torch.testing.assert_close(left.mT @ weight, left.mT @ start)
    torch.testing.assert_close(weight @ right, start @ right)
    # In the free space nothing was touched.
    torch.testing.assert_close(sculpt_ops.project(weight, left, right), sculpt_ops.project(moved, left, right))
    # An untouched weight stays where it is.
    torch.testing.assert_close(
        sculpt_ops.restore_(start.clone(), left, thin["left_image"], right, thin["right_image"]), start
    )


_ISA_SCRIPT = """
import torch, sculpt_ops
from sculpt_ops import reference
torch.manual_seed(0)
worst = 0.0
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for m, n, r, s in ((199, 113, 17, 33), (64, 96, 48, 16), (7, 5, 3, 2)):
        grad = torch.randn(m, n, dtype=torch.float64)
        left = torch.linalg.qr(torch.randn(m, r, dtype=torch.float64))[0]
        right = torch.linalg.qr(torch.randn(n, s, dtype=torch.float64))[0]
        for flags in ({}, {"keep_left": True}, {"block": True}):
            args = [t.to(dtype) for t in (grad, left, right)]
            exact = reference.project(*[t.double() for t in args], **flags)
            error = (sculpt_ops.project(*args, **flags).double() - exact).abs().max()
            plain = (reference.project(*args, **flags).double() - exact).abs().max()
            floor = 8 * torch.finfo(torch.float32).eps * grad.abs().max()
            assert error <= 2 * plain + floor, (dtype, m, n, flags, error, plain)
            worst = max(worst, float(error))
print("worst", worst)
"""


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512bf16"])
def test_every_instruction_set_that_this_processor_has(isa: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _ISA_SCRIPT],
        env={**os.environ, "SCULPT_CPU": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    if "that this processor runs" in run.stderr or "SCULPT_CPU" in run.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("worst")


def test_unknown_instruction_set_is_refused() -> None:
    script = "import torch, sculpt_ops; sculpt_ops.project_(torch.ones(2, 2), torch.eye(2))"
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "SCULPT_CPU": "mmx"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "SCULPT_CPU: given 'mmx', wanted one of" in run.stderr


def test_results_do_not_depend_on_the_number_of_threads_or_the_run() -> None:
    grad, left = gaussian(300, 700, dtype=torch.float32), orthonormal(300, 64, torch.float32)
    two = sculpt_ops.project(grad, left)
    assert torch.equal(two, sculpt_ops.project(grad, left))
    torch.set_num_threads(1)
    try:
        assert torch.equal(two, sculpt_ops.project(grad, left))
    finally:
        torch.set_num_threads(2)

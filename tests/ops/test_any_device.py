"""The C++ kernels of devices without their own, which programs without Python have on a GPU: here on CPU tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sculpt_ops import reference

from .accuracy import DTYPES, REMOVE_AND_KEEP, assert_accurate, gaussian, orthonormal, sides

OPS = torch.ops.sculpt


def any_device(op: Any, *args: Any, **kwargs: Any) -> Any:
    """The op by its kernel of every device, not by that of the CPU."""
    return op.default._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)


@pytest.mark.parametrize("wide_bases", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flags", REMOVE_AND_KEEP, ids=lambda f: "+".join(f) or "remove")
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_projections(dtype: torch.dtype, flags: dict[str, bool], batch: tuple[int, ...], wide_bases: bool) -> None:
    of_basis = torch.float32 if wide_bases and dtype.itemsize == 2 else dtype
    grad = gaussian(*batch, 31, 45, dtype=dtype)
    for left, right in sides(orthonormal(31, 6, of_basis), orthonormal(45, 9, of_basis, seed=2), flags):
        given = {**flags}
        out = any_device(OPS.project, grad, left, right, **given)
        assert_accurate(out, reference.project, grad, left, right, **given)
        in_place = grad.clone()
        any_device(OPS.project_, in_place, left, right, **given)
        assert torch.equal(in_place, out)
        lists = {f"{name}s": [value] for name, value in given.items() if name != "block"}
        in_place = grad.clone()
        any_device(OPS.foreach_project_, [in_place], [left], [right], **lists, block=given.get("block", False))
        assert torch.equal(in_place, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flags", REMOVE_AND_KEEP, ids=lambda f: "+".join(f) or "remove")
def test_metrics(dtype: torch.dtype, flags: dict[str, bool]) -> None:
    grad, left, right = gaussian(2, 31, 45, dtype=dtype), orthonormal(31, 6, dtype), orthonormal(45, 9, dtype, seed=2)
    metrics = {
        "left_metric": torch.diag(torch.linspace(0, 1, 6)),
        "right_metric": gaussian(9, 9, dtype=torch.float32),
    }
    out = any_device(OPS.project, grad, left, right, *metrics.values(), **flags)
    expected = reference.project(grad.double(), left.double(), right.double(), **flags, **metrics)
    plain = reference.project(grad, left, right, **flags, **metrics)
    eps = torch.finfo(torch.float32 if dtype.itemsize == 2 else dtype).eps
    error = (out.double() - expected).abs().max()
    assert error <= 2 * (plain.double() - expected).abs().max() + 8 * eps * expected.abs().max()


@pytest.mark.parametrize("wide_bases", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flags", REMOVE_AND_KEEP, ids=lambda f: "+".join(f) or "remove")
def test_restore(dtype: torch.dtype, flags: dict[str, bool], wide_bases: bool) -> None:
    of_basis = torch.float32 if wide_bases and dtype.itemsize == 2 else dtype
    start, weight = gaussian(2, 31, 45, dtype=dtype), gaussian(2, 31, 45, dtype=dtype, seed=3)
    for left, right in sides(orthonormal(31, 6, of_basis), orthonormal(45, 9, of_basis, seed=2), flags):
        images = (
            None if left is None else left.mT @ start.to(of_basis),
            None if right is None else start.to(of_basis) @ right,
        )
        core = None
        if left is not None and right is not None:
            core = left.mT @ start.to(of_basis) @ right
        given = (left, images[0], right, images[1])
        keywords: dict[str, Any] = {"core": core, "reference": start, **flags}
        found = weight.clone()
        any_device(OPS.restore_, found, *given, **keywords)
        by_cpu = weight.clone()
        OPS.restore_(by_cpu, *given, **keywords)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found, by_cpu, rtol=2 * eps, atol=16 * eps)


@pytest.mark.parametrize("transposed", [False, True])
def test_layouts_are_read_as_they_are(transposed: bool) -> None:
    matrix = torch.full((90, 62) if transposed else (62, 90), torch.nan)[::2, ::2]
    matrix = matrix.mT if transposed else matrix
    matrix.copy_(gaussian(31, 45))
    left, right = orthonormal(31, 6, torch.float32), orthonormal(45, 4, torch.float32).mT.contiguous().mT
    expected = reference.project(matrix, left, right)
    any_device(OPS.project_, matrix, left, right)
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-6)


def test_what_is_wrong_is_refused_before_anything_is_written() -> None:
    grad, left = gaussian(31, 45, dtype=torch.float32), orthonormal(31, 6, torch.float32)
    before = grad.clone()
    for message, call in (
        (r"project_: right: wanted shape", lambda: any_device(OPS.project_, grad, None, left)),
        (r"project_: keep_right: wanted", lambda: any_device(OPS.project_, grad, left, keep_right=True)),
        (r"project_: left: wanted memory of its own", lambda: any_device(OPS.project_, grad, grad[:, :6])),
        (r"project_: left: wanted the matrix's device", lambda: any_device(OPS.project_, grad, left.to("meta"))),
        (r"foreach_project_: lefts: wanted 1", lambda: any_device(OPS.foreach_project_, [grad], [], [None])),
        (
            r"foreach_project_: grads: .*entries 0 and 1",
            lambda: any_device(OPS.foreach_project_, [grad, grad], [left, left], [None, None]),
        ),
        (r"restore_: left_image: wanted", lambda: any_device(OPS.restore_, grad, left, None, None, None)),
        (
            r"restore_: core: wanted",
            lambda: any_device(OPS.restore_, grad, left, None, orthonormal(45, 6, torch.float32), None, block=True),
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
        assert torch.equal(grad, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_what_decompositions_are_made_of(dtype: torch.dtype, transpose: bool, batch: tuple[int, ...]) -> None:
    matrix = gaussian(*batch, 31, 45, dtype=dtype)
    drawn = {"seed": 3, "transpose": transpose, "row": 2, "column": 5}
    omega = any_device(OPS.test_matrix, matrix, 7, **drawn)
    assert torch.equal(omega, OPS.test_matrix(matrix, 7, **drawn))
    product = any_device(OPS._product, matrix, omega, transpose=transpose)
    torch.testing.assert_close(product, OPS._product(matrix, omega, transpose=transpose), rtol=1e-5, atol=1e-4)
    for double in (False, True):
        gram = any_device(OPS._gram, matrix, transpose=transpose, double=double)
        torch.testing.assert_close(gram, OPS._gram(matrix, transpose=transpose, double=double), rtol=1e-5, atol=1e-4)
        assert gram.dtype == (torch.float64 if double or dtype is torch.float64 else torch.float32)


def test_factorizations() -> None:
    square = gaussian(2, 3, 20, 20, dtype=torch.float32)
    u, s, v = any_device(OPS._jacobi_svd, square)
    torch.testing.assert_close(u @ torch.diag_embed(s) @ v.mT, square, rtol=0, atol=1e-5)
    with pytest.raises(RuntimeError, match="_jacobi_svd: input: wanted square matrices"):
        any_device(OPS._jacobi_svd, square[..., :5])
    symmetric = square @ square.mT
    values, vectors = any_device(OPS._eigh, symmetric)
    torch.testing.assert_close(vectors @ torch.diag_embed(values) @ vectors.mT, symmetric, rtol=0, atol=1e-4)


def test_nothing_reads_a_tensor_on_the_host() -> None:
    """On tensors without memory, as it would be on a device whose memory the host cannot read."""

    def meta(tensor: Tensor) -> Tensor:
        return tensor.to("meta")

    grad, left, right = gaussian(31, 45, dtype=torch.bfloat16), orthonormal(31, 6, torch.float32), None
    out = any_device(OPS.project, meta(grad), meta(left), right)
    assert (out.device.type, out.shape, out.dtype) == ("meta", grad.shape, grad.dtype)
    own = meta(left.bfloat16())
    assert any_device(OPS.project, meta(grad), own, right, keep_left=True).shape == grad.shape
    any_device(OPS.foreach_project_, [meta(grad)], [own], [None])
    any_device(OPS.restore_, meta(grad), meta(left), meta(left.mT @ grad.float()), None, None)
    assert any_device(OPS.test_matrix, meta(grad), 5, seed=0).shape == (45, 5)
    assert any_device(OPS._gram, meta(grad)).shape == (45, 45)

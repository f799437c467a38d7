"""The CUDA kernels of the projection ops: Triton where it is expected to win, library products elsewhere.

Written against tensors of any device, so that the library path is tested on the CPU and the Triton path in the
interpreter. Neither has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import reference as plain
from .checks import check_apart, check_foreach, check_foreach_apart, check_project, check_restore, check_written
from .heuristics import choose, forced_backend
from .library import LIBRARY

__all__ = ["project_cublas", "project_into", "project_triton", "triton_missing"]


@cache
def triton_missing() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


def _one_side_cublas(source: Tensor, basis: Tensor, out: Tensor, *, keep: bool, right: bool) -> None:
    """mm + addmm_: one read, then one read and write of the matrix."""
    thin, wide = (source @ basis, basis.mT) if right else (basis, basis.mT @ source)
    if keep:
        out.copy_(thin @ wide)
    elif out.dim() == 2:
        torch.addmm(source, thin, wide, alpha=-1, out=out)
    else:
        torch.sub(source, thin @ wide, out=out)


def project_cublas(
    grad: Tensor, left: Tensor | None, right: Tensor | None, out: Tensor, keep_left: bool, keep_right: bool, block: bool
) -> None:
    """Library products; a half-precision matrix with a float32 basis goes through a float32 copy."""
    if any(basis is not None and basis.dtype is not grad.dtype for basis in (left, right)):
        work = grad.float()
        bases = [None if basis is None else basis.float() for basis in (left, right)]
        project_cublas(work, bases[0], bases[1], work, keep_left, keep_right, block)
        out.copy_(work)
        return
    if block:
        assert left is not None
        assert right is not None
        core = (left.mT @ grad) @ right
        if grad.dim() == 2:
            torch.addmm(grad, left @ core, right.mT, alpha=-1, out=out)
        else:
            torch.sub(grad, left @ core @ right.mT, out=out)
        return
    source = grad
    if left is not None:
        _one_side_cublas(source, left, out, keep=keep_left, right=False)
        source = out
    if right is not None:
        _one_side_cublas(source, right, out, keep=keep_right, right=True)


def _flat(tensor: Tensor) -> Tensor | None:
    """As the Triton launchers take it: at most one batch dimension, sharing memory; None if the strides forbid it."""
    if tensor.dim() <= 3:
        return tensor
    try:
        return tensor.view(-1, *tensor.shape[-2:])
    except RuntimeError:
        return None


def project_triton(
    grad: Tensor, left: Tensor | None, right: Tensor | None, out: Tensor, keep_left: bool, keep_right: bool, block: bool
) -> str | None:
    """Run the Triton kernels; a string says why they cannot, and then nothing has been written."""
    missing = triton_missing()
    if missing:
        return missing
    from ..triton_kernels.project_block import project_block, why_not_block
    from ..triton_kernels.project_both import project_both, why_not_both
    from ..triton_kernels.project_left import project_left, why_not_left
    from ..triton_kernels.project_right import project_right, why_not_right

    flat, flat_out = _flat(grad), _flat(out)
    if flat is None or flat_out is None:
        return "given batch dimensions that no view can merge"
    batch = grad.shape[:-2]
    bases = []
    for basis in (left, right):
        if basis is not None and basis.dim() > 2:
            basis = basis.expand(*batch, *basis.shape[-2:]).reshape(-1, *basis.shape[-2:])
        bases.append(basis)
    left, right = bases
    m, n = grad.shape[-2:]
    dtype = grad.dtype
    if left is not None and right is not None and not (keep_left or keep_right):
        why_not = why_not_block if block else why_not_both
        why: str | None = why_not(m, n, left.shape[-1], right.shape[-1], dtype, left.dtype, right.dtype)
        if why is None:
            (project_block if block else project_both)(flat, left, right, flat_out)
            return None
        if block:
            return why
    reasons: tuple[str | None, str | None] = (
        None if left is None else why_not_left(m, n, left.shape[-1], dtype, left.dtype),
        None if right is None else why_not_right(m, n, right.shape[-1], dtype, right.dtype),
    )
    why = reasons[0] or reasons[1]
    if why is not None:
        return why
    source = flat
    if left is not None:
        project_left(source, left, flat_out, keep=keep_left)
        source = flat_out
    if right is not None:
        project_right(source, right, flat_out, keep=keep_right)
    return None


@cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def project_into(
    grad: Tensor, left: Tensor | None, right: Tensor | None, out: Tensor, keep_left: bool, keep_right: bool, block: bool
) -> None:
    """``out`` (which may be ``grad``) becomes the projection of ``grad``, by the variant that the heuristics choose."""
    if left is None and right is None:
        if out is not grad:
            out.copy_(grad)
        return
    if grad.numel() == 0:
        return
    forced = forced_backend()
    basis = left if left is not None else right
    assert basis is not None
    backend = forced or choose(
        grad.shape[-2],
        grad.shape[-1],
        None if left is None else left.shape[-1],
        None if right is None else right.shape[-1],
        grad.dtype,
        basis.dtype,
        batch=grad.shape[:-2].numel(),
        multiprocessors=_multiprocessors(grad.device.index) if grad.is_cuda else 132,
    )
    if backend == "triton":
        why = project_triton(grad, left, right, out, keep_left, keep_right, block)
        if why is None:
            return
        if forced == "triton":
            raise RuntimeError(f"SCULPT_BACKEND: given 'triton', but it cannot run here: {why}")
    project_cublas(grad, left, right, out, keep_left, keep_right, block)


def _project(
    grad: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
    *,
    keep_left: bool = False,
    keep_right: bool = False,
    block: bool = False,
) -> Tensor:
    check_project("project", grad, left, right, keep_left, keep_right, block)
    out = torch.empty_like(grad)
    project_into(grad, left, right, out, keep_left, keep_right, block)
    return out


def _project_(
    grad: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
    *,
    keep_left: bool = False,
    keep_right: bool = False,
    block: bool = False,
) -> None:
    check_project("project_", grad, left, right, keep_left, keep_right, block)
    check_written("project_", "grad", grad)
    check_apart("project_", "grad", grad, left=left, right=right)
    project_into(grad, left, right, grad, keep_left, keep_right, block)


def _foreach_project_(
    grads: list[Tensor],
    lefts: list[Tensor | None],
    rights: list[Tensor | None],
    *,
    keep_lefts: Sequence[bool] = (),
    keep_rights: Sequence[bool] = (),
    block: bool = False,
) -> None:
    check_foreach("foreach_project_", grads, lefts, rights, keep_lefts, keep_rights, block)
    check_foreach_apart("foreach_project_", grads, lefts, rights)
    for i, (grad, left, right) in enumerate(zip(grads, lefts, rights, strict=True)):
        keep_left = bool(keep_lefts) and keep_lefts[i]
        keep_right = bool(keep_rights) and keep_rights[i]
        project_into(grad, left, right, grad, keep_left, keep_right, block)


def _restore_(
    weight: Tensor,
    left: Tensor | None,
    left_image: Tensor | None,
    right: Tensor | None,
    right_image: Tensor | None,
    *,
    core: Tensor | None = None,
    reference: Tensor | None = None,
    keep_left: bool = False,
    keep_right: bool = False,
    block: bool = False,
) -> None:
    thin = (left, left_image, right, right_image, core, reference)
    flags: dict[str, Any] = {"keep_left": keep_left, "keep_right": keep_right, "block": block}
    check_restore("restore_", weight, *thin, keep_left, keep_right, block)
    check_written("restore_", "weight", weight)
    names = ("left", "left_image", "right", "right_image", "core", "reference")
    check_apart("restore_", "weight", weight, **dict(zip(names, thin, strict=True)))
    plain.restore_(weight, left, left_image, right, right_image, core=core, reference=reference, **flags)


LIBRARY.impl("project", _project, "CUDA")
LIBRARY.impl("project_", _project_, "CUDA")
LIBRARY.impl("foreach_project_", _foreach_project_, "CUDA")
LIBRARY.impl("restore_", _restore_, "CUDA")

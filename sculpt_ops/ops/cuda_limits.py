"""What the CUDA C++ projection kernels cannot do, found before they are called."""

from __future__ import annotations

from enum import IntEnum
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _host

__all__ = ["MANY", "BasisForm", "CudaFacts", "basis_form", "cuda_facts", "why_not_cuda", "why_not_sides"]

# Of csrc/common/side_panels.h and both_panels.h.
_MAX_RANK = 128
_MAX_SIDE_RANK_FLOAT32 = 64
_ALIGNMENT = 16
# Of 16 bits in 16 bytes.
_NUMBERS = 8
# Columns, or rows, of all matrices of a list: there are panels for all multiprocessors.
MANY = 2**30


class BasisForm(IntEnum):
    """Of csrc/common/side_panels.h, what a side is projected on: U Uᵀ of a bfloat16 or a float32 U, or U M Uᵀ; of a
    float16 matrix U Uᵀ of a float16 U."""

    BFLOAT16 = 0
    FLOAT32 = 1
    METRIC = 2
    FLOAT16 = 3


def basis_form(basis: Tensor, metric: Tensor | None) -> BasisForm:
    if metric is not None:
        return BasisForm.METRIC
    if basis.dtype is torch.float16:
        return BasisForm.FLOAT16
    return BasisForm.FLOAT32 if basis.dtype is torch.float32 else BasisForm.BFLOAT16


class CudaFacts(NamedTuple):
    """What the kernels ask of a GPU. capability: 10 major + minor. shared_bytes: most that a block may have."""

    capability: int
    multiprocessors: int
    shared_bytes: int


_H100 = CudaFacts(90, 132, 227 * 1024)


@cache
def cuda_facts(index: int | None) -> CudaFacts:
    """CUDA device `index`; an H100 for None (a tensor that is on no GPU)."""
    if index is None:
        return _H100
    properties = torch.cuda.get_device_properties(index)
    capability = 10 * properties.major + properties.minor
    # Older releases of torch do not tell: 99 kB is what every GPU from 8.0 has.
    shared = getattr(properties, "shared_memory_per_block_optin", _H100.shared_bytes if capability == 90 else 99 * 1024)
    return CudaFacts(capability, properties.multi_processor_count, int(shared))


def _index(tensor: Tensor) -> int | None:
    return tensor.device.index if tensor.is_cuda else None


def _not_plain(name: str, tensor: Tensor) -> str | None:
    if tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0:
        return None
    return f"{name}: wanted contiguous memory that starts at a multiple of {_ALIGNMENT} bytes"


def _not_a_basis(name: str, basis: Tensor, grad: Tensor, rows: int) -> str | None:
    if basis.dim() != 2 or basis.shape[0] != rows:
        return f"{name}: wanted one matrix of {rows} rows, given shape {tuple(basis.shape)}"
    half = grad.dtype is torch.float16
    if basis.dtype not in ((torch.float16,) if half else (torch.bfloat16, torch.float32)):
        return f"{name}: wanted dtype {'float16' if half else 'bfloat16 or float32'}, given {basis.dtype}"
    if basis.device != grad.device:
        return f"{name}: wanted a tensor on {grad.device}, given one on {basis.device}"
    return _not_plain(name, basis)


def _not_a_metric(name: str, metric: Tensor, basis: Tensor | None) -> str | None:
    if basis is None or basis.dtype is not torch.bfloat16:
        return f"{name}: wanted a bfloat16 basis with it, given {None if basis is None else basis.dtype}"
    if metric.dim() != 2 or not metric.is_contiguous():
        return f"{name}: wanted one contiguous matrix, given shape {tuple(metric.shape)}"
    return None


@cache
def _both_fit(m: int, n: int, r: int, s: int, split: bool, block: bool, gpu: CudaFacts) -> bool:
    plan = _host.both_panels(m, n, r, s, split, block, gpu.multiprocessors, gpu.shared_bytes, gpu.capability)
    return plan is not None


@cache
def _side_fits(length: int, extent: int, r: int, form: BasisForm, gpu: CudaFacts) -> bool:
    return _host.side_panels(length, extent, r, form, gpu.multiprocessors) is not None


# An H100, for None, runs both.
@cache
def _both_runs(index: int | None) -> bool:
    return index is None or bool(torch.ops.sculpt._cuda_both_runs(index))


@cache
def _side_runs(index: int | None, right: bool, length: int, extent: int, r: int, form: BasisForm) -> bool:
    return index is None or bool(torch.ops.sculpt._cuda_side_runs(index, right, form, length, extent, r))


def _why_not_sides(
    m: int,
    n: int,
    left: Tensor | None,
    right: Tensor | None,
    left_metric: Tensor | None,
    right_metric: Tensor | None,
    index: int | None,
    listed: bool = False,
) -> str | None:
    """Why the sides that there are cannot go through the kernel of one side, one after the other, on GPU `index`.
    listed: with others in one launch."""
    gpu = cuda_facts(index)
    if gpu.capability != 90:
        return "wanted a GPU of capability 9.0 for one side"
    if n % _NUMBERS:
        return f"grad: wanted rows of a multiple of {_NUMBERS} numbers for one side, given shape {(m, n)}"
    for name, basis, metric, length, extent in (
        ("left", left, left_metric, m, n),
        ("right", right, right_metric, n, m),
    ):
        if basis is None:
            continue
        form = basis_form(basis, metric)
        if not _side_fits(length, extent, basis.shape[1], form, gpu):
            most = _MAX_SIDE_RANK_FLOAT32 if form == BasisForm.FLOAT32 else _MAX_RANK
            return (
                f"{name}: wanted a rank of 1 to {most} whose rows fit the shared memory of a cluster, given "
                f"{length} rows and rank {basis.shape[1]}"
            )
        # What a launch of many takes is what its matrix of the largest rank would take there.
        if not _side_runs(index, name == "right", length, MANY if listed else extent, basis.shape[1], form):
            return (
                f"{name}: wanted code for this GPU (TORCH_CUDA_ARCH_LIST=9.0a) and room for the cluster of blocks that "
                f"{length} rows take"
            )
    return None


def _not_given(
    grad: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    left_metric: Tensor | None,
    right_metric: Tensor | None,
) -> str | None:
    """Why a matrix and its bases are nothing for any of the kernels."""
    if grad.dim() != 2:
        return f"grad: wanted one matrix, given shape {tuple(grad.shape)}"
    if grad.dtype not in (torch.bfloat16, torch.float16):
        return f"grad: wanted dtype bfloat16 or float16, given {grad.dtype}"
    if left is None and right is None:
        return "left, right: wanted at least one basis, given none"
    m, n = grad.shape
    for name, basis, rows in (("left", left, m), ("right", right, n)):
        why = None if basis is None else _not_a_basis(name, basis, grad, rows)
        if why is not None:
            return why
    for name, metric, basis in (("left_metric", left_metric, left), ("right_metric", right_metric, right)):
        why = None if metric is None else _not_a_metric(name, metric, basis)
        if why is not None:
            return why
    return _not_plain("grad", grad)


def why_not_sides(
    grad: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    left_metric: Tensor | None = None,
    right_metric: Tensor | None = None,
) -> str | None:
    """Why the sides that there are cannot go through the kernel of one side, in launches of many matrices; None if they
    can. Only where the kernels are there."""
    thin = left, right, left_metric, right_metric
    return _not_given(grad, *thin) or _why_not_sides(grad.shape[0], grad.shape[1], *thin, _index(grad), listed=True)


def why_not_cuda(
    grad: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    keep_left: bool,
    keep_right: bool,
    block: bool,
    left_metric: Tensor | None = None,
    right_metric: Tensor | None = None,
) -> str | None:
    """Why the CUDA C++ kernels, where they are there, cannot project ``grad`` in place; None if they can.

    All that csrc/cuda/ops.cpp refuses, asked before the call: a C++ exception out of a library built against the
    headers of torch 2.11 ended the process in place of raising.
    """
    why = _not_given(grad, left, right, left_metric, right_metric)
    if why is not None:
        return why
    for name, basis, keep in (("left", left, keep_left), ("right", right, keep_right)):
        if basis is None and keep:
            return f"keep_{name}: wanted only with a {name} basis, given without"
    if block and (left is None or right is None):
        return "block: wanted only with both bases, given with one"
    m, n = grad.shape
    facts = cuda_facts(_index(grad))
    why = _why_not_sides(m, n, left, right, left_metric, right_metric, _index(grad))
    if not block and why is None:
        return None
    if left is None or right is None:
        return why
    if grad.dtype is torch.float16:
        return f"grad: float16 wanted only where each side by itself can run: {why or 'given block'}"
    if left_metric is not None or right_metric is not None:
        return f"left_metric, right_metric: wanted only where each side by itself can run: {why or 'given block'}"
    if keep_left or keep_right:
        return f"keep_left, keep_right: with both bases wanted only where each side by itself can run: {why}"
    if facts.capability < 80:
        return "wanted a GPU of capability 8.0 or later"
    if not _both_runs(_index(grad)):
        return f"wanted code for a GPU of capability {facts.capability / 10} (TORCH_CUDA_ARCH_LIST), there is none"
    ranks = left.shape[1], right.shape[1]
    split = torch.float32 in (left.dtype, right.dtype)
    if not _both_fit(m, n, *ranks, split, block, facts):
        return (
            f"left, right: wanted ranks of 1 to {_MAX_RANK} and at most {facts.shared_bytes} bytes of shared "
            f"memory a block, given ranks {ranks[0]} and {ranks[1]}"
        )
    return None

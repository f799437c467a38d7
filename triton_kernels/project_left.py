# mypy: allow-untyped-defs, allow-incomplete-defs
"""Projection of one side in one launch: G - L (Lᵀ G), or L (Lᵀ G) with `keep`.

A program owns a panel of columns. It walks the rows once for the coefficients C = Lᵀ G, which stay in registers (fp32,
rank x width), and once more, backwards, to write G - L C. `panels.panel_width` keeps the panels in flight within L2, so
that G is read from HBM once and written once: 2 m n elements, against 3 m n of mm + addmm_. Walking backwards, a panel
too long for L2 loses only what did not fit. Operations: 4 m n r, or 6 m n r in bfloat16, where the coefficients are
split in two (see `products`), and 10 m n r with a float32 basis.

Safe in place: nobody else reads or writes a program's panel, and each of its tiles is read for the last time before it
is written.

When not to use it: above r of about 175 (bfloat16) or 105 (float32 basis or gradient) the tensor cores are the limit,
and library products do as well or better; with few columns (n x batch below 32 x multiprocessors) a part of the GPU is
idle. Both bounds are calculated from an H100's published figures, not measured.

Tests passed on an H200 (torch 2.11, Triton 3.6); compiled, not run, for sm_80, sm_100 and gfx942.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import batch_of, batch_stride, check_operands, device_for, on_device, precision_for
from .panels import max_rank, panel_config, why_not
from .products import coefficient_dtype, product

__all__ = [
    "can_use_left",
    "panel_coefficients",
    "project_left",
    "project_one_side",
    "project_panel",
    "why_not_left",
]


@triton.jit
def panel_coefficients(
    grad_ptr,
    basis_ptr,
    columns,
    start,
    stop,
    extent,
    rank,
    grad_stride_row,
    grad_stride_column,
    basis_stride_row,
    basis_stride_rank,
    RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Basis[start:stop]ᵀ G[start:stop, columns]: (RANK, BLOCK_N) in fp32, rows beyond `rank` zero."""
    rows = tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, RANK)
    # Offsets in 64 bits, and the part that stays the same over the loop on its own: the registers are needed elsewhere.
    grad_offsets = rows.to(tl.int64)[:, None] * grad_stride_row + columns.to(tl.int64)[None, :] * grad_stride_column
    basis_offsets = rows.to(tl.int64)[None, :] * basis_stride_row + ranks.to(tl.int64)[:, None] * basis_stride_rank
    coefficients = tl.zeros((RANK, BLOCK_N), dtype=tl.float32)
    for first in range(start, stop, BLOCK_K):
        left = stop - first
        grad = tl.load(
            grad_ptr + tl.cast(first, tl.int64) * grad_stride_row + grad_offsets,
            mask=(rows[:, None] < left) & (columns[None, :] < extent),
            other=0.0,
        )
        basis = tl.load(
            basis_ptr + tl.cast(first, tl.int64) * basis_stride_row + basis_offsets,
            mask=(rows[None, :] < left) & (ranks[:, None] < rank),
            other=0.0,
        )
        coefficients = product(basis, grad, coefficients, grad.dtype, PRECISION)
    # An Inf in G makes 0 * Inf = NaN in the padding, which would spread to the whole column in the second product.
    return tl.where(ranks[:, None] < rank, coefficients, 0.0)


@triton.jit
def project_panel(
    grad_ptr,
    basis_ptr,
    out_ptr,
    columns,
    length,
    extent,
    rank,
    grad_stride_row,
    grad_stride_column,
    basis_stride_row,
    basis_stride_rank,
    out_stride_row,
    out_stride_column,
    KEEP: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Both passes over the panel of `columns`."""
    rows = tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, RANK)
    tiles = tl.cdiv(length, BLOCK_K)
    dtype: tl.constexpr = coefficient_dtype(grad_ptr.dtype.element_ty)
    coefficients = panel_coefficients(
        grad_ptr,
        basis_ptr,
        columns,
        0,
        length,
        extent,
        rank,
        grad_stride_row,
        grad_stride_column,
        basis_stride_row,
        basis_stride_rank,
        RANK,
        BLOCK_K,
        BLOCK_N,
        PRECISION,
    )
    basis_offsets = rows.to(tl.int64)[:, None] * basis_stride_row + ranks.to(tl.int64)[None, :] * basis_stride_rank
    grad_offsets = rows.to(tl.int64)[:, None] * grad_stride_row + columns.to(tl.int64)[None, :] * grad_stride_column
    out_offsets = rows.to(tl.int64)[:, None] * out_stride_row + columns.to(tl.int64)[None, :] * out_stride_column
    # num_stages is spelt out: without it only the basis, which feeds a product, would be loaded ahead, not G.
    for tile in tl.range(tiles, num_stages=STAGES):
        first = ((tiles - 1 - tile) * BLOCK_K).to(tl.int64)
        left = length - first
        inside = (rows[:, None] < left) & (columns[None, :] < extent)
        basis = tl.load(
            basis_ptr + first * basis_stride_row + basis_offsets,
            mask=(rows[:, None] < left) & (ranks[None, :] < rank),
            other=0.0,
        )
        result = product(basis, coefficients, tl.zeros((BLOCK_K, BLOCK_N), tl.float32), dtype, PRECISION)
        if not KEEP:
            grad = tl.load(grad_ptr + first * grad_stride_row + grad_offsets, mask=inside, other=0.0)
            result = grad.to(tl.float32) - result
        tl.store(out_ptr + first * out_stride_row + out_offsets, result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def project_one_side_kernel(
    grad_ptr,
    basis_ptr,
    out_ptr,
    length,
    extent,
    rank,
    batch,
    grad_stride_batch,
    grad_stride_row,
    grad_stride_column,
    basis_stride_batch,
    basis_stride_row,
    basis_stride_rank,
    out_stride_batch,
    out_stride_row,
    out_stride_column,
    KEEP: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    panels = tl.cdiv(extent, BLOCK_N)
    # One program a multiprocessor, several panels each: more panels at a time than that would not fit L2.
    for panel in range(tl.program_id(0), batch * panels, tl.num_programs(0)):
        item = (panel // panels).to(tl.int64)
        project_panel(
            grad_ptr + item * grad_stride_batch,
            basis_ptr + item * basis_stride_batch,
            out_ptr + item * out_stride_batch,
            (panel % panels) * BLOCK_N + tl.arange(0, BLOCK_N),
            length,
            extent,
            rank,
            grad_stride_row,
            grad_stride_column,
            basis_stride_row,
            basis_stride_rank,
            out_stride_row,
            out_stride_column,
            KEEP,
            RANK,
            BLOCK_K,
            BLOCK_N,
            STAGES,
            PRECISION,
        )


def why_not_left(m: int, n: int, r: int, dtype: torch.dtype, basis_dtype: torch.dtype) -> str | None:
    """Why `project_left` cannot take an m x n gradient with a basis of rank r, or None if it can."""
    return why_not(r, dtype, basis_dtype, max_rank(dtype, basis_dtype, torch.version.hip is not None))


def can_use_left(m: int, n: int, r: int, dtype: torch.dtype, basis_dtype: torch.dtype) -> bool:
    """Whether `project_left` can run, which says nothing of its speed (the module docstring does).

    m and n may be anything, r up to 256 in bfloat16, 128 with a float32 basis, 64 in float16 (32 with a float32 basis),
    half of that on HIP.
    """
    return why_not_left(m, n, r, dtype, basis_dtype) is None


def project_one_side(grad: Tensor, basis: Tensor, out: Tensor, *, keep: bool) -> None:
    """Launch the kernel on operands that were checked. `project_right` passes transposed views."""
    length, extent = grad.shape[-2:]
    batch, rank = batch_of(grad), basis.shape[-1]
    if grad.numel() == 0:
        return
    if rank == 0:
        if keep:
            out.zero_()
        elif out is not grad:
            out.copy_(grad)
        return
    device = device_for(grad)
    config = panel_config(length, extent * batch, rank, grad.dtype, basis.dtype, device)
    panels = batch * triton.cdiv(extent, config.width)
    with on_device(grad):
        project_one_side_kernel[(min(panels, device.multiprocessors),)](
            grad,
            basis,
            out,
            length,
            extent,
            rank,
            batch,
            batch_stride(grad),
            grad.stride(-2),
            grad.stride(-1),
            batch_stride(basis),
            basis.stride(-2),
            basis.stride(-1),
            batch_stride(out),
            out.stride(-2),
            out.stride(-1),
            KEEP=keep,
            RANK=config.rank,
            BLOCK_K=config.depth,
            BLOCK_N=config.width,
            STAGES=config.stages,
            PRECISION=precision_for(grad),
            num_warps=config.warps,
            num_stages=config.stages,
        )


def project_left(grad: Tensor, basis: Tensor, out: Tensor, *, keep: bool) -> None:
    """out = grad - L (Lᵀ grad), or L (Lᵀ grad) with `keep`, in one launch and without scratch memory.

    Args:
        grad: (m, n) or (batch, m, n), bfloat16, float16 or float32, any strides.
        basis: L, (m, r) or (batch, m, r), orthonormal columns, grad's dtype or float32. Rank 0 is taken: nothing is
            removed, or nothing kept.
        out: Like grad; may be grad itself.
        keep: Keep the span of L instead of removing it.

    Raises:
        ValueError: Operands that do not fit each other or `can_use_left`; nothing has been written then.
    """
    check_operands("project_left", grad, out, left=basis)
    m, n = grad.shape[-2:]
    reason = why_not_left(m, n, basis.shape[-1], grad.dtype, basis.dtype)
    if reason is not None:
        raise ValueError(f"project_left: {reason}")
    project_one_side(grad, basis, out, keep=keep)

# mypy: allow-untyped-defs, allow-incomplete-defs
"""Rank update of a matrix in one read and one write: G - X Y, G - X1 Y1 - X2 Y2, or X Y alone.

A library product with the epilogue of addmm_, except that the thin factors may be fp32 beside a bfloat16 G, in which
case they are split in two (see `products`), and that two factors need no concatenation. 2 m n r operations a term and a
split; 2 m n elements. Tiles of G are independent of each other, so out may be G.

When not to use it: the thin factors in G's own dtype, where addmm_ does the same.

Tests passed on an H200 (torch 2.11, Triton 3.6); compiled, not run, for sm_80, sm_100 and gfx942.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import batch_of, batch_stride, device_for, on_device, precision_for
from .panels import HIP_STAGES, STAGES, WARPS, Device
from .products import coefficient_dtype, product

__all__ = ["UpdateConfig", "rank_update", "update_config"]


class UpdateConfig(NamedTuple):
    """Tile of G (`rows` x `columns`), `depth` of the steps along the rank, and the launch options."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@triton.jit
def add_product(
    acc,
    x_ptr,
    y_ptr,
    rows,
    columns,
    m,
    n,
    rank,
    x_stride_row,
    x_stride_rank,
    y_stride_rank,
    y_stride_column,
    dtype: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + (X Y)[rows, columns]."""
    ranks = tl.arange(0, BLOCK_R)
    x_offsets = rows.to(tl.int64)[:, None] * x_stride_row + ranks.to(tl.int64)[None, :] * x_stride_rank
    y_offsets = ranks.to(tl.int64)[:, None] * y_stride_rank + columns.to(tl.int64)[None, :] * y_stride_column
    for first in range(0, rank, BLOCK_R):
        left = rank - first
        x = tl.load(
            x_ptr + tl.cast(first, tl.int64) * x_stride_rank + x_offsets,
            mask=(rows[:, None] < m) & (ranks[None, :] < left),
            other=0.0,
        )
        y = tl.load(
            y_ptr + tl.cast(first, tl.int64) * y_stride_rank + y_offsets,
            mask=(ranks[:, None] < left) & (columns[None, :] < n),
            other=0.0,
        )
        acc = product(x, y, acc, dtype, PRECISION)
    return acc


@triton.jit
def rank_update_kernel(
    grad_ptr,
    out_ptr,
    x_ptr,
    y_ptr,
    x2_ptr,
    y2_ptr,
    m,
    n,
    rank,
    rank2,
    grad_stride_batch,
    grad_stride_row,
    grad_stride_column,
    out_stride_batch,
    out_stride_row,
    out_stride_column,
    x_stride_batch,
    x_stride_row,
    x_stride_rank,
    y_stride_batch,
    y_stride_rank,
    y_stride_column,
    x2_stride_batch,
    x2_stride_row,
    x2_stride_rank,
    y2_stride_batch,
    y2_stride_rank,
    y2_stride_column,
    HAS_GRAD: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = coefficient_dtype(out_ptr.dtype.element_ty)
    tiles_across = tl.cdiv(n, BLOCK_N)
    tiles = tl.cdiv(m, BLOCK_M) * tiles_across
    item = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    rows = (tile // tiles_across) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tile % tiles_across) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    if HAS_GRAD:
        # Loaded first: the products hide the latency.
        grad = tl.load(
            grad_ptr
            + item * grad_stride_batch
            + rows.to(tl.int64)[:, None] * grad_stride_row
            + columns.to(tl.int64)[None, :] * grad_stride_column,
            mask=inside,
            other=0.0,
        )
    update = add_product(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
        x_ptr + item * x_stride_batch,
        y_ptr + item * y_stride_batch,
        rows,
        columns,
        m,
        n,
        rank,
        x_stride_row,
        x_stride_rank,
        y_stride_rank,
        y_stride_column,
        dtype,
        BLOCK_R,
        PRECISION,
    )
    if HAS_SECOND:
        update = add_product(
            update,
            x2_ptr + item * x2_stride_batch,
            y2_ptr + item * y2_stride_batch,
            rows,
            columns,
            m,
            n,
            rank2,
            x2_stride_row,
            x2_stride_rank,
            y2_stride_rank,
            y2_stride_column,
            dtype,
            BLOCK_R,
            PRECISION,
        )
    if HAS_GRAD:
        update = grad.to(tl.float32) - update
    tl.store(
        out_ptr
        + item * out_stride_batch
        + rows.to(tl.int64)[:, None] * out_stride_row
        + columns.to(tl.int64)[None, :] * out_stride_column,
        update.to(out_ptr.dtype.element_ty),
        mask=inside,
    )


def update_config(m: int, n: int, dtype: torch.dtype, device: Device) -> UpdateConfig:
    """Tiles of 128 x 64 in bfloat16, of which two fit a multiprocessor: one loads while the other multiplies.

    128 x 128 leaves registers for one and spills on sm_80. 64 x 64 for fp32 arithmetic, on HIP, and for a small G.
    """
    if dtype == torch.bfloat16 and not device.is_hip and m * n >= device.multiprocessors * 128 * 64:
        return UpdateConfig(128, 64, 32, WARPS, STAGES)
    return UpdateConfig(64, 64, 32, WARPS, HIP_STAGES if device.is_hip else STAGES)


def rank_update(grad: Tensor | None, terms: tuple[tuple[Tensor, Tensor], ...], out: Tensor) -> None:
    """out = grad - sum of X Y over one or two `terms`, or + X Y with no grad. Operands were checked, ranks at least 1.

    X is (m, r) or (batch, m, r), Y (r, n) or (batch, r, n), each fp32 or of out's dtype; out may be grad.
    """
    m, n = out.shape[-2:]
    batch = batch_of(out)
    (x, y), (x2, y2) = terms[0], terms[-1]
    config = update_config(m, n * batch, out.dtype, device_for(out))
    source = out if grad is None else grad
    strides = [(batch_stride(t), t.stride(-2), t.stride(-1)) for t in (source, out, x, y, x2, y2)]
    with on_device(out):
        rank_update_kernel[(batch * triton.cdiv(m, config.rows) * triton.cdiv(n, config.columns),)](
            source,
            out,
            x,
            y,
            x2,
            y2,
            m,
            n,
            x.shape[-1],
            x2.shape[-1],
            *(stride for triple in strides for stride in triple),
            HAS_GRAD=grad is not None,
            HAS_SECOND=len(terms) == 2,
            BLOCK_M=config.rows,
            BLOCK_N=config.columns,
            BLOCK_R=config.depth,
            PRECISION=precision_for(out),
            num_warps=config.warps,
            num_stages=config.stages,
        )

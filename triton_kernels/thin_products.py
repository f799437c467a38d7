# mypy: allow-untyped-defs, allow-incomplete-defs
"""All that the two-sided ops need to know of G in one launch: A = Lᵀ G, B = G R and the core Lᵀ G R.

A program owns a panel of columns (then it computes its part of A in fp32 registers, and from that its share of the
core) or a panel of rows (its part of B). G is cut into chunks of columns that fit 60 % of L2; the programs of a chunk
follow each other, so the rows are read from L2 where the columns were read from HBM: m n elements of HBM traffic
instead of the 2 m n of two library products.

Deterministic: every number is written by one program. B has one partial sum a chunk and the core one a column panel,
summed afterwards in a fixed order; no atomics. Scratch, in bytes an item: 4 r n for A, 4 chunks m s for B,
4 r s for each of the n / 32 (or 64) panels.

When not to use it: with one basis only. Ranks above 128 have no room in registers beside the core.

Tests passed on an H200 (torch 2.11, Triton 3.6); compiled, not run, for sm_80, sm_100 and gfx942.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import batch_of, batch_stride, device_for, on_device, precision_for
from .panels import Device, PanelConfig, chunk_columns, max_rank, panel_config, why_not
from .products import coefficient_dtype, product
from .project_left import panel_coefficients

__all__ = ["core_product", "thin_products", "why_not_two_sided"]

# The core, up to 128 x 128 in fp32, shares the registers with the coefficients. With the tile sizes of a float32 basis
# both fit, whatever the basis; with those of a bfloat16 one ptxas spills 230 bytes on sm_90.
SIZING_DTYPE = torch.float32


@triton.jit
def thin_products_kernel(
    grad_ptr,
    left_ptr,
    right_ptr,
    left_product_ptr,
    right_product_ptr,
    core_ptr,
    m,
    n,
    left_rank,
    right_rank,
    chunk,
    grad_stride_batch,
    grad_stride_row,
    grad_stride_column,
    left_stride_batch,
    left_stride_row,
    left_stride_rank,
    right_stride_batch,
    right_stride_row,
    right_stride_rank,
    CORE_ONLY: tl.constexpr,
    LEFT_RANK: tl.constexpr,
    LEFT_DEPTH: tl.constexpr,
    LEFT_WIDTH: tl.constexpr,
    RIGHT_RANK: tl.constexpr,
    RIGHT_DEPTH: tl.constexpr,
    RIGHT_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = coefficient_dtype(grad_ptr.dtype.element_ty)
    column_panels = tl.cdiv(n, LEFT_WIDTH)
    panels_in_chunk = tl.cdiv(chunk, LEFT_WIDTH)
    programs_in_chunk = panels_in_chunk
    if not CORE_ONLY:
        programs_in_chunk += tl.cdiv(m, RIGHT_WIDTH)
    chunks = tl.cdiv(n, chunk)
    item = (tl.program_id(0) // (chunks * programs_in_chunk)).to(tl.int64)
    chunk_index = (tl.program_id(0) // programs_in_chunk) % chunks
    index = tl.program_id(0) % programs_in_chunk
    left_ranks = tl.arange(0, LEFT_RANK)
    right_ranks = tl.arange(0, RIGHT_RANK)
    grad_item = grad_ptr + item * grad_stride_batch
    right_item = right_ptr + item * right_stride_batch

    if index < panels_in_chunk:
        panel = chunk_index * panels_in_chunk + index
        # The last chunk may have room for more panels than there are.
        if panel < column_panels:
            columns = panel * LEFT_WIDTH + tl.arange(0, LEFT_WIDTH)
            coefficients = panel_coefficients(
                grad_item,
                left_ptr + item * left_stride_batch,
                columns,
                0,
                m,
                n,
                left_rank,
                grad_stride_row,
                grad_stride_column,
                left_stride_row,
                left_stride_rank,
                LEFT_RANK,
                LEFT_DEPTH,
                LEFT_WIDTH,
                PRECISION,
            )
            if not CORE_ONLY:
                tl.store(
                    left_product_ptr + ((item * left_rank + left_ranks[:, None]) * n + columns[None, :]),
                    coefficients,
                    mask=(left_ranks[:, None] < left_rank) & (columns[None, :] < n),
                )
            right = tl.load(
                right_item
                + columns.to(tl.int64)[:, None] * right_stride_row
                + right_ranks.to(tl.int64)[None, :] * right_stride_rank,
                mask=(columns[:, None] < n) & (right_ranks[None, :] < right_rank),
                other=0.0,
            )
            core = product(coefficients, right, tl.zeros((LEFT_RANK, RIGHT_RANK), tl.float32), dtype, PRECISION)
            tl.store(
                core_ptr
                + (
                    ((item * column_panels + panel) * left_rank + left_ranks[:, None]) * right_rank
                    + right_ranks[None, :]
                ),
                core,
                mask=(left_ranks[:, None] < left_rank) & (right_ranks[None, :] < right_rank),
            )
    elif not CORE_ONLY:
        rows = (index - panels_in_chunk) * RIGHT_WIDTH + tl.arange(0, RIGHT_WIDTH)
        start = chunk_index * chunk
        coefficients = panel_coefficients(
            grad_item,
            right_item,
            rows,
            start,
            tl.minimum(start + chunk, n),
            m,
            right_rank,
            grad_stride_column,
            grad_stride_row,
            right_stride_row,
            right_stride_rank,
            RIGHT_RANK,
            RIGHT_DEPTH,
            RIGHT_WIDTH,
            PRECISION,
        )
        tl.store(
            right_product_ptr
            + (((item * chunks + chunk_index) * m + rows[None, :]) * right_rank + right_ranks[:, None]),
            coefficients,
            mask=(right_ranks[:, None] < right_rank) & (rows[None, :] < m),
        )


def why_not_two_sided(
    r: int, s: int, dtype: torch.dtype, left_dtype: torch.dtype, right_dtype: torch.dtype
) -> str | None:
    """Why the two-sided kernels cannot take bases of ranks r and s, or None if they can."""
    limit = max_rank(dtype, SIZING_DTYPE, torch.version.hip is not None)
    return why_not(r, dtype, left_dtype, limit) or why_not(s, dtype, right_dtype, limit)


def thin_products(grad: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A = Lᵀ G (batch, r, n), B = G R (batch, m, s) and the core Lᵀ G R (batch, r, s), fp32, batch 1 for a 2-d grad.

    Operands were checked, ranks are at least 1; m <= n needs the least scratch.
    """
    m, n = grad.shape[-2:]
    batch, r, s = batch_of(grad), left.shape[-1], right.shape[-1]
    device = device_for(grad)
    columns = single_read_config(n * batch, r, grad.dtype, device)
    chunk = chunk_columns(m, n, s, grad.element_size(), columns.width, device)
    left_product = grad.new_empty(batch, r, n, dtype=torch.float32)
    right_products = grad.new_empty(batch, triton.cdiv(n, chunk), m, s, dtype=torch.float32)
    cores = launch_thin_products(grad, left, right, left_product, right_products, chunk, columns)
    right_product = right_products[:, 0] if right_products.shape[1] == 1 else right_products.sum(1)
    return left_product, right_product, cores.sum(1)


def core_product(grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Lᵀ G R alone, (batch, r, s), without writing A or B. Operands as for `thin_products`."""
    n = grad.shape[-1]
    columns = single_read_config(n * batch_of(grad), left.shape[-1], grad.dtype, device_for(grad))
    whole = triton.cdiv(n, columns.width) * columns.width
    return launch_thin_products(grad, left, right, None, None, whole, columns).sum(1)


def single_read_config(extent: int, rank: int, dtype: torch.dtype, device: Device) -> PanelConfig:
    """Length 0: these panels are read once, so L2 sets no bound on their width."""
    return panel_config(0, extent, rank, dtype, SIZING_DTYPE, device)


def launch_thin_products(
    grad: Tensor,
    left: Tensor,
    right: Tensor,
    left_product: Tensor | None,
    right_products: Tensor | None,
    chunk: int,
    columns: PanelConfig,
) -> Tensor:
    """Fill the products that are given and return the cores of the column panels, (batch, panels, r, s)."""
    m, n = grad.shape[-2:]
    batch, r, s = batch_of(grad), left.shape[-1], right.shape[-1]
    rows = single_read_config(m * batch, s, grad.dtype, device_for(grad))
    row_panels = 0 if right_products is None else triton.cdiv(m, rows.width)
    cores = grad.new_empty(batch, triton.cdiv(n, columns.width), r, s, dtype=torch.float32)
    with on_device(grad):
        thin_products_kernel[(batch * triton.cdiv(n, chunk) * (chunk // columns.width + row_panels),)](
            grad,
            left,
            right,
            left_product,
            right_products,
            cores,
            m,
            n,
            r,
            s,
            chunk,
            batch_stride(grad),
            grad.stride(-2),
            grad.stride(-1),
            batch_stride(left),
            left.stride(-2),
            left.stride(-1),
            batch_stride(right),
            right.stride(-2),
            right.stride(-1),
            CORE_ONLY=right_products is None,
            LEFT_RANK=columns.rank,
            LEFT_DEPTH=columns.depth,
            LEFT_WIDTH=columns.width,
            RIGHT_RANK=rows.rank,
            RIGHT_DEPTH=rows.depth,
            RIGHT_WIDTH=rows.width,
            PRECISION=precision_for(grad),
            num_warps=columns.warps,
            num_stages=columns.stages,
        )
    return cores

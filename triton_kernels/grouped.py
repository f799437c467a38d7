# mypy: allow-untyped-defs, allow-incomplete-defs
"""Projections of many matrices in one to four launches, whatever their shapes, ranks and kept sides.

One side each: one launch (two if some are kept), each program a panel as in `project_left`. Otherwise four: thin
products A = Lᵀ G and B = G R from about one read of G; the core A R; B' = B - L core; and G - L A - B' Rᵀ in one read
and write. The signs come from a table, so that keep_left, keep_right and block are the same four launches.

A program finds its matrix in a list of tiles and its addresses in a table of pointers: two loads that depend on each
other before the first useful one. Deterministic: every number is written by one program, sums run in a fixed order, no
atomics.

When not to use it: above the ranks of `heuristics`, where library products are expected to be faster; its four launches
take any rank. A group runs at the tile sizes of its largest rank.

Tests passed on an H200 (torch 2.11, Triton 3.6); compiled, not run, for sm_80, sm_100 and gfx942.
"""

import triton
import triton.language as tl

from .products import coefficient_dtype
from .project_left import panel_coefficients, project_panel
from .rank_update import add_product

__all__ = [
    "grouped_core_kernel",
    "grouped_correct_kernel",
    "grouped_one_side_kernel",
    "grouped_thin_kernel",
    "grouped_update_kernel",
]

# Columns of the table: `grouped_plan.FIELDS`.
M, N, R, S, PITCH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
LEFT_PRODUCT, RIGHT_PRODUCT, CORE = tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
CHUNK, SLOTS = tl.constexpr(8), tl.constexpr(9)
SIGN_G, SIGN_A, SIGN_C = tl.constexpr(10), tl.constexpr(11), tl.constexpr(12)
SIGN_P, SIGN_Q = tl.constexpr(13), tl.constexpr(14)
WIDTH = tl.constexpr(15)
# Columns of the table of pointers.
GRAD, LEFT, RIGHT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def field(table, row, column: tl.constexpr):
    return tl.load(table + row * WIDTH + column)


@triton.jit
def size(table, row, column: tl.constexpr, ALIGNED: tl.constexpr):
    """A length or a stride; ALIGNED: known to be a multiple of 16, which wide loads need."""
    value = field(table, row, column).to(tl.int32)
    if ALIGNED:
        value = tl.multiple_of(value, 16)
    return value


@triton.jit
def address(pointers, row, which, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(pointers + row * 3 + which).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def scratch_at(scratch, table, row, column: tl.constexpr):
    return scratch + tl.multiple_of(field(table, row, column), 16)


@triton.jit
def grouped_one_side_kernel(
    pointers,
    table,
    tiles,
    count,
    KEEP: tl.constexpr,
    DTYPE: tl.constexpr,
    BASIS: tl.constexpr,
    ALIGNED: tl.constexpr,
    RANK_ALIGNED: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    for tile in range(tl.program_id(0), count, tl.num_programs(0)):
        place = tl.load(tiles + 2 * tile)
        row = place // 2
        columns = tl.load(tiles + 2 * tile + 1) * BLOCK_N + tl.arange(0, BLOCK_N)
        m = size(table, row, M, ALIGNED)
        n = size(table, row, N, ALIGNED)
        pitch = size(table, row, PITCH, ALIGNED)
        grad = address(pointers, row, GRAD, DTYPE, ALIGNED)
        if place % 2 == 0:
            r = size(table, row, R, RANK_ALIGNED)
            left = address(pointers, row, LEFT, BASIS, RANK_ALIGNED)
            project_panel(
                grad, left, grad, columns, m, n, r, pitch, 1, r, 1, pitch, 1,
                KEEP, RANK, BLOCK_K, BLOCK_N, STAGES, PRECISION,
            )  # fmt: skip
        else:
            s = size(table, row, S, RANK_ALIGNED)
            right = address(pointers, row, RIGHT, BASIS, RANK_ALIGNED)
            project_panel(
                grad, right, grad, columns, n, m, s, 1, pitch, s, 1, 1, pitch,
                KEEP, RANK, BLOCK_K, BLOCK_N, STAGES, PRECISION,
            )  # fmt: skip


@triton.jit
def grouped_thin_kernel(
    pointers,
    table,
    tiles,
    scratch,
    DTYPE: tl.constexpr,
    BASIS: tl.constexpr,
    ALIGNED: tl.constexpr,
    RANK_ALIGNED: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Lᵀ G as (r, n), (G R)ᵀ as (s, m), a sum a slot; both in fp32."""
    tile = tiles + 4 * tl.program_id(0)
    place = tl.load(tile)
    first_rank = tl.multiple_of(tl.load(tile + 2), 16)
    slot = tl.load(tile + 3)
    row = place // 2
    columns = tl.load(tile + 1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = size(table, row, M, ALIGNED)
    n = size(table, row, N, ALIGNED)
    pitch = size(table, row, PITCH, ALIGNED)
    grad = address(pointers, row, GRAD, DTYPE, ALIGNED)
    ranks = first_rank + tl.arange(0, RANK)
    if place % 2 == 0:
        r = size(table, row, R, RANK_ALIGNED)
        left = address(pointers, row, LEFT, BASIS, RANK_ALIGNED) + first_rank
        product = panel_coefficients(
            grad, left, columns, 0, m, n, r - first_rank, pitch, 1, r, 1, RANK, BLOCK_K, BLOCK_N, PRECISION
        )
        out = scratch_at(scratch, table, row, LEFT_PRODUCT)
        inside = (ranks[:, None] < r) & (columns[None, :] < n)
        tl.store(out + (ranks.to(tl.int64)[:, None] * n + columns[None, :]), product, mask=inside)
    else:
        s = size(table, row, S, RANK_ALIGNED)
        right = address(pointers, row, RIGHT, BASIS, RANK_ALIGNED) + first_rank
        chunk = field(table, row, CHUNK).to(tl.int32)
        start = slot * chunk
        product = panel_coefficients(
            grad, right, columns, start, tl.minimum(start + chunk, n), m, s - first_rank, 1, pitch, s, 1,
            RANK, BLOCK_K, BLOCK_N, PRECISION,
        )  # fmt: skip
        out = scratch_at(scratch, table, row, RIGHT_PRODUCT) + slot.to(tl.int64) * s * m
        inside = (ranks[:, None] < s) & (columns[None, :] < m)
        tl.store(out + (ranks.to(tl.int64)[:, None] * m + columns[None, :]), product, mask=inside)


@triton.jit
def grouped_core_kernel(
    pointers,
    table,
    tiles,
    scratch,
    DTYPE: tl.constexpr,
    BASIS: tl.constexpr,
    ALIGNED: tl.constexpr,
    RANK_ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(Lᵀ G R)ᵀ as (s, r): (G R)ᵀ, all slots of it, times L."""
    dtype: tl.constexpr = coefficient_dtype(DTYPE)
    row = tl.load(tiles + 2 * tl.program_id(0))
    tile = tl.load(tiles + 2 * tl.program_id(0) + 1)
    m = size(table, row, M, ALIGNED)
    r = size(table, row, R, RANK_ALIGNED)
    s = field(table, row, S).to(tl.int32)
    across = tl.cdiv(r, TILE)
    lines = tile // across * TILE + tl.arange(0, TILE)
    columns = tile % across * TILE + tl.arange(0, TILE)
    left = address(pointers, row, LEFT, BASIS, RANK_ALIGNED)
    product = scratch_at(scratch, table, row, RIGHT_PRODUCT)
    core = tl.zeros((TILE, TILE), tl.float32)
    for slot in range(field(table, row, SLOTS).to(tl.int32)):
        core = add_product(
            core, product + tl.cast(slot, tl.int64) * s * m, left, lines, columns, s, r, m, m, 1, r, 1,
            dtype, BLOCK_K, PRECISION,
        )  # fmt: skip
    tl.store(
        scratch_at(scratch, table, row, CORE) + (lines.to(tl.int64)[:, None] * r + columns[None, :]),
        core,
        mask=(lines[:, None] < s) & (columns[None, :] < r),
    )


@triton.jit
def grouped_correct_kernel(
    pointers,
    table,
    tiles,
    scratch,
    DTYPE: tl.constexpr,
    BASIS: tl.constexpr,
    ALIGNED: tl.constexpr,
    RANK_ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """B' of `grouped_plan.coefficients`, transposed, over the first slot: a tile reads and writes its own elements."""
    dtype: tl.constexpr = coefficient_dtype(DTYPE)
    row = tl.load(tiles + 2 * tl.program_id(0))
    tile = tl.load(tiles + 2 * tl.program_id(0) + 1)
    m = size(table, row, M, ALIGNED)
    r = size(table, row, R, RANK_ALIGNED)
    s = field(table, row, S).to(tl.int32)
    q = field(table, row, SIGN_Q).to(tl.int32)
    across = tl.cdiv(m, TILE)
    lines = tile // across * TILE + tl.arange(0, TILE)
    columns = tile % across * TILE + tl.arange(0, TILE)
    left = address(pointers, row, LEFT, BASIS, RANK_ALIGNED)
    core = scratch_at(scratch, table, row, CORE)
    result = add_product(
        tl.zeros((TILE, TILE), tl.float32), core, left, lines, columns, s, m, tl.where(q == 0, 0, r), r, 1, 1, r,
        dtype, BLOCK_K, PRECISION,
    )  # fmt: skip
    result = result * q.to(tl.float32)
    inside = (lines[:, None] < s) & (columns[None, :] < m)
    out = scratch_at(scratch, table, row, RIGHT_PRODUCT) + (lines.to(tl.int64)[:, None] * m + columns[None, :])
    kept = inside & (field(table, row, SIGN_P) != 0)
    for slot in range(field(table, row, SLOTS).to(tl.int32)):
        result += tl.load(out + tl.cast(slot, tl.int64) * s * m, mask=kept, other=0.0)
    tl.store(out, result, mask=inside)


@triton.jit
def grouped_update_kernel(
    pointers,
    table,
    tiles,
    scratch,
    DTYPE: tl.constexpr,
    BASIS: tl.constexpr,
    ALIGNED: tl.constexpr,
    RANK_ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """g G + a L A + c B' Rᵀ over G."""
    dtype: tl.constexpr = coefficient_dtype(DTYPE)
    row = tl.load(tiles + 2 * tl.program_id(0))
    tile = tl.load(tiles + 2 * tl.program_id(0) + 1)
    m = size(table, row, M, ALIGNED)
    n = size(table, row, N, ALIGNED)
    pitch = size(table, row, PITCH, ALIGNED)
    r = size(table, row, R, RANK_ALIGNED)
    s = size(table, row, S, RANK_ALIGNED)
    g = field(table, row, SIGN_G)
    a = field(table, row, SIGN_A).to(tl.float32)
    c = field(table, row, SIGN_C).to(tl.float32)
    across = tl.cdiv(n, BLOCK_N)
    rows = tile // across * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    out = (
        address(pointers, row, GRAD, DTYPE, ALIGNED)
        + rows.to(tl.int64)[:, None] * pitch
        + columns.to(tl.int64)[None, :]
    )
    grad = tl.load(out, mask=inside & (g != 0), other=0.0)
    left = address(pointers, row, LEFT, BASIS, RANK_ALIGNED)
    right = address(pointers, row, RIGHT, BASIS, RANK_ALIGNED)
    update = add_product(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), left, scratch_at(scratch, table, row, LEFT_PRODUCT), rows, columns,
        m, n, tl.where(a == 0, 0, r), r, 1, n, 1, dtype, BLOCK_R, PRECISION,
    )  # fmt: skip
    # One accumulator: a L A + c B' Rᵀ = c (a c L A + B' Rᵀ), or a L A where c is 0.
    update = update * tl.where(c == 0, a, a * c)
    update = add_product(
        update, scratch_at(scratch, table, row, RIGHT_PRODUCT), right, rows, columns, m, n,
        tl.where(c == 0, 0, s), 1, m, 1, s, dtype, BLOCK_R, PRECISION,
    )  # fmt: skip
    update = grad.to(tl.float32) + update * tl.where(c == 0, 1.0, c)
    tl.store(out, update.to(DTYPE), mask=inside)

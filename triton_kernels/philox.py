# mypy: allow-untyped-defs, allow-incomplete-defs
"""The test matrix of the range finder from Philox4x32-10, equal to the bit to csrc/common/philox.h.

A program draws 64 rows x 4 counters, 16 neighbouring columns, and writes each number once: 4 q bytes a row, about 60
integer and 50 float operations a number. It is not fused with the product: there every number would be drawn once per
tile of rows of the matrix.

The launch turns fused multiply-adds off: with them the last bit of a normal would depend on the compiler.

Tests passed on an H200 (torch 2.11, Triton 3.6); compiled, not run, for sm_80, sm_100 and gfx942.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device

__all__ = ["fill_test_matrix"]

ROWS, GROUPS = 64, 4
ROUNDINGS = {None: None, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

SQRT_HALF = tl.constexpr(0x3F3504F3)


@triton.jit
def squared_radius(word):
    """-2 ln(((word >> 8) + 1) 2^-24)."""
    bits = ((word >> 8).to(tl.int32) + 1).to(tl.float32).to(tl.int32, bitcast=True) - SQRT_HALF
    exponent = ((bits >> 23) - 24).to(tl.float32)
    f = ((bits & 0x7FFFFF) + SQRT_HALF).to(tl.float32, bitcast=True) - 1.0
    p = 7.0376836292e-2 * f - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    p = p * f - 0.5
    p = p * f + 1.0
    return -2.0 * (exponent * 0.69314718 + f * p)


@triton.jit
def box_muller(a, b):
    """Two normals from two words."""
    turns = (b >> 8).to(tl.int32)
    quarter = (turns + (1 << 21)) >> 22
    x = (turns - (quarter << 22)).to(tl.float32) * 3.7450703e-7
    xx = x * x
    sine = -1.9515295891e-4 * xx + 8.3321608736e-3
    sine = sine * xx - 1.6666654611e-1
    sine = x * (sine * xx + 1.0)
    cosine = 2.443315711809948e-5 * xx - 1.388731625493765e-3
    cosine = cosine * xx + 4.166664568298827e-2
    cosine = cosine * xx - 0.5
    cosine = cosine * xx + 1.0
    swap = (quarter & 1) == 1
    radius = tl.sqrt_rn(squared_radius(a))
    first = radius * (tl.where(swap, sine, cosine) * (1 - ((quarter + 1) & 2)).to(tl.float32))
    second = radius * (tl.where(swap, cosine, sine) * (1 - (quarter & 2)).to(tl.float32))
    return first, second


@triton.jit
def sign(word):
    return 1.0 - 2.0 * (word >> 31).to(tl.float32)


@triton.jit(do_not_specialize=["seed", "row", "column"])
def test_matrix_kernel(
    out_ptr,
    rows,
    columns,
    seed,
    row,
    column,
    RADEMACHER: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    """out (batch, rows, columns), contiguous; grid: batch x tiles of rows x tiles of four columns."""
    column = tl.cast(column, tl.int64)  # column + columns may pass 2^31
    first_group = column // 4
    tiles_across = tl.cdiv((column + columns + 3) // 4 - first_group, BLOCK_GROUPS).to(tl.int32)
    tiles = tl.cdiv(rows, BLOCK_ROWS) * tiles_across
    item = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    lines = (tile // tiles_across).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    across = (tile % tiles_across).to(tl.int64) * BLOCK_GROUPS
    groups = first_group + across + tl.arange(0, BLOCK_GROUPS)
    zeros = tl.zeros((BLOCK_ROWS, BLOCK_GROUPS), tl.uint32)
    a, b, c, d = tl.philox(
        tl.cast(seed, tl.int64),
        zeros + (row + lines).to(tl.uint32)[:, None],
        zeros + groups.to(tl.uint32)[None, :],
        zeros + item.to(tl.uint32),
        zeros,
    )
    if RADEMACHER:
        a, b, c, d = sign(a), sign(b), sign(c), sign(d)
    else:
        a, b = box_muller(a, b)
        c, d = box_muller(c, d)
    # Joined to (a, b, c, d) in each group, so that a thread stores 16 bytes at once.
    entries = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK_ROWS, 4 * BLOCK_GROUPS))
    if ROUNDING is not None:
        entries = entries.to(ROUNDING).to(tl.float32)
    at = 4 * (first_group + across) - column + tl.arange(0, 4 * BLOCK_GROUPS)
    tl.store(
        out_ptr + (item.to(tl.int64) * rows + lines)[:, None] * columns + at[None, :],
        entries.to(out_ptr.dtype.element_ty),
        mask=(lines < rows)[:, None] & ((at >= 0) & (at < columns))[None, :],
    )


def fill_test_matrix(
    out: Tensor, seed: int, row: int, column: int, *, rademacher: bool, rounding: torch.dtype | None
) -> None:
    """Write the entries from (row, column) on of the test matrix of `seed` into out, one matrix a batch entry.

    Args:
        out: (..., rows, columns), contiguous, float32 or float64.
        seed: 64 bits, signed.
        row, column: Below 2^32 and 2^34, as are the last ones.
        rademacher: -1 and 1 instead of normals.
        rounding: bfloat16 or float16: the values are rounded to it.
    """
    if out.numel() == 0:
        return
    rows, columns = out.shape[-2:]
    groups = (column + columns + 3) // 4 - column // 4
    grid = out.shape[:-2].numel() * triton.cdiv(rows, ROWS) * triton.cdiv(groups, GROUPS)
    with on_device(out):
        test_matrix_kernel[(grid,)](
            out,
            rows,
            columns,
            seed,
            row,
            column,
            RADEMACHER=rademacher,
            ROUNDING=ROUNDINGS[rounding],
            BLOCK_ROWS=ROWS,
            BLOCK_GROUPS=GROUPS,
            num_warps=4,
            enable_fp_fusion=False,
        )

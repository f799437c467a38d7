# mypy: allow-untyped-defs, allow-incomplete-defs
"""bfloat16 parts of thin float32 factors, for library products on tensor cores (`ops/split_products.py`).

x = h + l: h is x rounded to bfloat16, l what that took, rounded; 0 where h is not finite. The parts lie beside each
other, [h, l, h] of a basis and [h, h, l] of coefficients: a product of three times the rank is h h + l h + h l. Strides
are free, so a transposed view has them below each other, and a factor can be turned on the way.

split_parts: of one or two factors in one launch, or of the sum of a factor's two halves, which [h, l] of a basis gives
in a product. Reads 4 bytes an element (8 of halves, 2 of bfloat16) and writes 6.

corrected_parts: of coefficients less a basis times a small core, C - X K, or of X K; in place of a sum, a split, a
product and another split. 14 bytes an element of C, 6 q operations (q columns of X); reads X once for every 32 columns
of C and K, which L2 holds, once for every 64 rows. When not to use it: a large q, where a library product reads less.

Checked in the interpreter, compiled for sm_80, sm_90, sm_100 and gfx942; its tests passed on an H200.
"""

import triton
import triton.language as tl
from torch import Tensor, bfloat16, float32

from .launch import INTERPRET, on_device
from .products import high_low, product

__all__ = ["corrected_parts", "split_parts", "why_not_parts"]

ROWS, RANKS = 64, 32
DEPTH = 16  # 32 spills registers on sm_80 where ranks are no multiple of 16
WARPS, STAGES = 4, 3


@triton.jit
def store_parts(out_ptr, x, rows, ranks, inside, rank, stride_row, stride_rank, LOW: tl.constexpr):
    high, low = high_low(x, tl.bfloat16)
    at = out_ptr + rows[:, None] * stride_row + ranks[None, :] * stride_rank
    third = tl.cast(rank, tl.int64) * stride_rank
    tl.store(at, high, mask=inside)
    tl.store(at + LOW * third, low, mask=inside)
    tl.store(at + (3 - LOW) * third, high, mask=inside)


@triton.jit
def load_halves(ptr, rows, ranks, inside, rank, stride_row, stride_rank, HALVES: tl.constexpr):
    at = ptr + rows[:, None] * stride_row + ranks[None, :] * stride_rank
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if HALVES:
        x += tl.load(at + tl.cast(rank, tl.int64) * stride_rank, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def split_tile(
    tile,
    source_ptr,
    out_ptr,
    length,
    rank,
    source_stride_row,
    source_stride_rank,
    out_stride_row,
    out_stride_rank,
    HALVES: tl.constexpr,
    LOW: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
):
    across = tl.cdiv(rank, RANKS)
    rows = (tile // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ranks = (tile % across).to(tl.int64) * RANKS + tl.arange(0, RANKS)
    inside = (rows < length)[:, None] & (ranks < rank)[None, :]
    x = load_halves(source_ptr, rows, ranks, inside, rank, source_stride_row, source_stride_rank, HALVES)
    store_parts(out_ptr, x, rows, ranks, inside, rank, out_stride_row, out_stride_rank, LOW)


@triton.jit
def split_parts_kernel(
    source_ptr,
    out_ptr,
    length,
    rank,
    source_stride_row,
    source_stride_rank,
    out_stride_row,
    out_stride_rank,
    source2_ptr,
    out2_ptr,
    length2,
    rank2,
    source2_stride_row,
    source2_stride_rank,
    out2_stride_row,
    out2_stride_rank,
    HALVES: tl.constexpr,
    LOW: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Grid: tiles of the first factor, then those of the second."""
    tile = tl.program_id(0)
    tiles = tl.cdiv(length, ROWS) * tl.cdiv(rank, RANKS)
    if tile < tiles:
        split_tile(
            tile,
            source_ptr,
            out_ptr,
            length,
            rank,
            source_stride_row,
            source_stride_rank,
            out_stride_row,
            out_stride_rank,
            HALVES,
            LOW,
            ROWS,
            RANKS,
        )
    # Two ifs: the first is decided when the kernel is compiled.
    if HAS_SECOND:  # noqa: SIM102
        if tile >= tiles:
            split_tile(
                tile - tiles,
                source2_ptr,
                out2_ptr,
                length2,
                rank2,
                source2_stride_row,
                source2_stride_rank,
                out2_stride_row,
                out2_stride_rank,
                HALVES,
                LOW,
                ROWS,
                RANKS,
            )


@triton.jit
def corrected_parts_kernel(
    source_ptr,
    basis_ptr,
    core_ptr,
    out_ptr,
    length,
    rank,
    depth,
    source_stride_row,
    source_stride_rank,
    basis_stride_row,
    basis_stride_depth,
    core_stride_depth,
    core_stride_rank,
    out_stride_row,
    out_stride_rank,
    HAS_SOURCE: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    across = tl.cdiv(rank, RANKS)
    rows = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ranks = (tl.program_id(0) % across).to(tl.int64) * RANKS + tl.arange(0, RANKS)
    inside = (rows < length)[:, None] & (ranks < rank)[None, :]
    if HAS_SOURCE:
        # Loaded first: the products hide the latency.
        x = load_halves(source_ptr, rows, ranks, inside, rank, source_stride_row, source_stride_rank, True)
    steps = tl.arange(0, DEPTH)
    basis_at = basis_ptr + rows[:, None] * basis_stride_row + steps.to(tl.int64)[None, :] * basis_stride_depth
    core_at = core_ptr + steps.to(tl.int64)[:, None] * core_stride_depth + ranks[None, :] * core_stride_rank
    down = tl.cast(depth, tl.int64) * core_stride_depth
    beside = tl.cast(rank, tl.int64) * core_stride_rank
    acc = tl.zeros((ROWS, RANKS), tl.float32)
    for first in range(0, depth, DEPTH):
        known = steps < depth - first
        core_inside = known[:, None] & (ranks < rank)[None, :]
        begin = tl.cast(first, tl.int64)
        basis = tl.load(
            basis_at + begin * basis_stride_depth, mask=(rows < length)[:, None] & known[None, :], other=0.0
        )
        at = core_at + begin * core_stride_depth
        core = tl.load(at + down, mask=core_inside, other=0.0) + tl.load(at + beside, mask=core_inside, other=0.0)
        core += tl.load(at, mask=core_inside, other=0.0)
        acc = product(basis, core, acc, tl.bfloat16, "ieee")
    if HAS_SOURCE:
        acc = x - acc
    store_parts(out_ptr, acc, rows, ranks, inside, rank, out_stride_row, out_stride_rank, 2)


def why_not_parts(out: Tensor, source: Tensor | None) -> str | None:
    """Why the parts of `source` cannot be written into `out`, or None if they can; any lengths and ranks can."""
    if not (out.is_cuda or INTERPRET):
        return f"out: given device {out.device}, wanted a CUDA or HIP device"
    if out.dim() != 2 or out.shape[1] % 3 or out.dtype is not bfloat16:
        return f"out: given shape {tuple(out.shape)} {out.dtype}, wanted (length, 3 rank) bfloat16"
    if 0 in out.stride() and any(size > 1 and not stride for size, stride in zip(out.shape, out.stride(), strict=True)):
        return f"out: given strides {out.stride()}, wanted every element at its own address"
    if source is None:
        return None
    length, rank = out.shape[0], out.shape[1] // 3
    if source.dim() != 2 or source.shape[0] != length or source.shape[1] not in (rank, 2 * rank):
        return f"source: given shape {tuple(source.shape)}, wanted {(length, rank)} or {(length, 2 * rank)} as out has"
    return why_not_read("source", source, out)


def why_not_read(name: str, tensor: Tensor, out: Tensor) -> str | None:
    if tensor.dtype is not float32 and tensor.dtype is not bfloat16:
        return f"{name}: given {tensor.dtype}, wanted float32 or bfloat16"
    if tensor.device != out.device:
        return f"{name}: given device {tensor.device}, wanted out's, {out.device}"
    return None


def tiles_of(out: Tensor) -> int:
    return -(-out.shape[0] // ROWS) * -(-out.shape[1] // (3 * RANKS))


def split_parts(out: Tensor, source: Tensor, low: int, second: tuple[Tensor, Tensor] | None = None) -> None:
    """Write h, l and h of source, l into the third `low`, in one launch and without scratch memory.

    Args:
        out: (length, 3 r), bfloat16, any strides, in memory of its own.
        source: (length, r), or (length, 2 r) whose halves are added; float32 or bfloat16, any strides.
        low: 1 for [h, l, h], 2 for [h, h, l].
        second: another out and source, (length, r), in the same launch; the first has no halves then.

    Raises:
        ValueError: Operands that do not fit each other; nothing has been written then.
    """
    out2, source2 = second or (out, source)
    reason = why_not_parts(out, source) or (None if second is None else why_not_parts(out2, source2))
    rank, rank2 = out.shape[-1] // 3, out2.shape[-1] // 3
    halves = source.shape[-1] != rank
    if reason is None and low not in (1, 2):
        reason = f"low: given {low}, wanted 1 or 2"
    if reason is None and second is not None and (halves or source2.shape[1] != rank2):
        reason = f"second: given sources of {source.shape[1]} and {source2.shape[1]} columns, wanted {rank} and {rank2}"
    if reason is not None:
        raise ValueError(f"split_parts: {reason}")
    tiles = tiles_of(out) + (0 if second is None else tiles_of(out2))
    if tiles == 0:
        return
    with on_device(out):
        split_parts_kernel[(tiles,)](
            source,
            out,
            out.shape[0],
            rank,
            *source.stride(),
            *out.stride(),
            source2,
            out2,
            out2.shape[0],
            rank2,
            *source2.stride(),
            *out2.stride(),
            HALVES=halves,
            LOW=low,
            HAS_SECOND=second is not None,
            ROWS=ROWS,
            RANKS=RANKS,
            num_warps=WARPS,
        )


def corrected_parts(out: Tensor, source: Tensor | None, basis: Tensor, core: Tensor) -> None:
    """Write [h, h, l] of C - X K, C the sum of the two halves of source and K of quarters of core, or of X K.

    Args:
        out: (length, 3 r), bfloat16, any strides, in memory of its own.
        source: (length, 2 r), float32 or bfloat16, any strides; None for X K.
        basis: X, (length, q), float32 or bfloat16, any strides.
        core: (2 q, 2 r), float32, any strides: [hh, hl; lh, ll], of which ll, 2^-34 of it, is left out.

    Raises:
        ValueError: Operands that do not fit each other; nothing has been written then.
    """
    reason = why_not_parts(out, source) or why_not_read("basis", basis, out) or why_not_read("core", core, out)
    length, rank, depth = out.shape[0], out.shape[-1] // 3, basis.shape[-1]
    if reason is None and source is not None and source.shape[1] != 2 * rank:
        reason = f"source: given {source.shape[1]} columns, wanted {2 * rank}"
    if reason is None and (basis.dim() != 2 or basis.shape[0] != length):
        reason = f"basis: given shape {tuple(basis.shape)}, wanted ({length}, depth)"
    if reason is None and core.shape != (2 * depth, 2 * rank):
        reason = f"core: given shape {tuple(core.shape)}, wanted {(2 * depth, 2 * rank)}"
    if reason is not None:
        raise ValueError(f"corrected_parts: {reason}")
    tiles = tiles_of(out)
    if tiles == 0:
        return
    read = basis if source is None else source
    with on_device(out):
        corrected_parts_kernel[(tiles,)](
            read,
            basis,
            core,
            out,
            length,
            rank,
            depth,
            *read.stride(),
            *basis.stride(),
            *core.stride(),
            *out.stride(),
            HAS_SOURCE=source is not None,
            ROWS=ROWS,
            RANKS=RANKS,
            DEPTH=DEPTH,
            num_warps=WARPS,
            num_stages=STAGES,
        )

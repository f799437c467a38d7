"""Tile sizes and limits of the kernels: pure functions of shapes, dtypes and the device, without triton.

A panel is a strip of G that one program reads twice: `width` columns of all m rows when a left basis is projected out,
`width` rows of all n columns when it is a right one. The second read misses HBM only while all panels in flight fit L2.
"""

from functools import cache
from typing import NamedTuple

import torch

__all__ = [
    "Device",
    "PanelConfig",
    "chunk_columns",
    "device_of",
    "max_rank",
    "pad_rank",
    "panel_config",
    "panel_width",
    "why_not",
]

# The rest of L2 holds the basis, the tiles being written and whatever the hardware keeps in both halves of the cache.
L2_SHARE = 0.6

# 32 columns of bfloat16 are 64 bytes, the smallest piece HBM delivers; and the basis is read 2 r / width times as often
# as G, so below 32 L2 itself becomes the limit. Above 64 a panel fits L2 only where m is under 1000.
MIN_WIDTH = 32
MAX_WIDTH = 64

# tl.dot needs at least 16 in the contracted dimension; the rank is that dimension in the second product.
MIN_RANK = 16

# Most fp32 coefficients, padded rank x width, that stay in a program's registers through both passes without a spill:
# 8192 when a bfloat16 G has a bfloat16 basis, half where a float32 operand is split, a quarter for float16, whose
# second product is float32 altogether; half of that again on HIP, whose tiles go through registers to shared memory.
# The tiles of all pipeline stages get ten bytes a coefficient. Sizes or ranks that are not multiples of 16 are loaded
# in smaller pieces and may spill up to 200 bytes all the same.
COEFFICIENTS = 8192
TILE_BYTES_PER_COEFFICIENT = 10
STAGES = 3
HIP_STAGES = 2
WARPS = 8


class Device(NamedTuple):
    """What the tile sizes depend on; the defaults are an H100's."""

    l2_bytes: int = 50 * 2**20
    multiprocessors: int = 132
    is_hip: bool = False


class PanelConfig(NamedTuple):
    """`width` of a panel, `depth` of the tiles it is read in, the padded `rank`, and the launch options."""

    width: int
    depth: int
    rank: int
    warps: int
    stages: int


@cache
def device_of(index: int | None) -> Device:
    """CUDA or HIP device `index`; an H100 for None (the interpreter on a CPU)."""
    if index is None:
        return Device()
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.L2_cache_size, properties.multi_processor_count, torch.version.hip is not None)


def pad_rank(rank: int) -> int:
    """The power of two, at least 16, that `rank` is padded to in registers."""
    return max(MIN_RANK, 1 << (rank - 1).bit_length())


def panel_width(length: int, extent: int, itemsize: int, device: Device, limit: int = MAX_WIDTH) -> int:
    """Widest panel, a power of two in [32, limit], that keeps the panels in flight within 60 % of L2.

    Args:
        length: Elements along a panel: m for a left basis, n for a right one; 0 if panels are read only once.
        extent: Elements across all panels: n (or m) times the batch size.
        itemsize: Bytes of an element of G.
        device: One panel is in flight on each multiprocessor.
        limit: Upper bound that the registers set.

    A wider panel reads the basis less often, but leaves multiprocessors idle once there are fewer panels than those.
    32 is returned even where it does not fit: the second pass walks backwards, so what did fit is still found in L2,
    and at worst G is read twice from HBM, which is what two library products do.
    """
    width = limit
    while width > MIN_WIDTH:
        panels = -(-extent // width)
        in_flight = min(panels, device.multiprocessors) * length * width * itemsize
        if panels >= device.multiprocessors and in_flight <= L2_SHARE * device.l2_bytes:
            break
        width //= 2
    return width


def coefficient_limit(dtype: torch.dtype, basis_dtype: torch.dtype, is_hip: bool) -> int:
    """Most coefficients (padded rank x panel width) a program may hold."""
    limit = COEFFICIENTS
    if dtype == torch.float16:
        limit //= 4
    if basis_dtype == torch.float32:
        limit //= 2
    return limit // 2 if is_hip else limit


def max_rank(dtype: torch.dtype, basis_dtype: torch.dtype, is_hip: bool) -> int:
    """Largest rank that leaves registers for a panel of 32."""
    return coefficient_limit(dtype, basis_dtype, is_hip) // MIN_WIDTH


def panel_config(
    length: int, extent: int, rank: int, dtype: torch.dtype, basis_dtype: torch.dtype, device: Device
) -> PanelConfig:
    """Sizes of the kernels that walk one panel a program. See `panel_width` for `length` and `extent`."""
    rank = pad_rank(rank)
    limit = coefficient_limit(dtype, basis_dtype, device.is_hip)
    width = panel_width(length, extent, dtype.itemsize, device, min(MAX_WIDTH, limit // rank))
    line_bytes = width * dtype.itemsize + rank * basis_dtype.itemsize
    depth = 128
    while depth > 16 and STAGES * depth * line_bytes > TILE_BYTES_PER_COEFFICIENT * limit:
        depth //= 2
    return PanelConfig(width, depth, rank, WARPS, HIP_STAGES if device.is_hip else STAGES)


def chunk_columns(m: int, n: int, s: int, itemsize: int, width: int, device: Device) -> int:
    """Columns of a chunk of `thin_products`: multiples of `width`, as even as that allows, that fit 60 % of L2.

    At least 32 s / itemsize before they are evened out, however little fits: from the second chunk on, the partial sums
    of G R, 8 m s bytes written and read, then stay within a quarter of the bytes of G.
    """
    panels = -(-n // width)
    fitting = int(L2_SHARE * device.l2_bytes) // (m * itemsize * width)
    least = -(-32 * s // (itemsize * width))
    chunks = -(-panels // max(fitting, least))
    return -(-panels // chunks) * width


def why_not(rank: int, dtype: torch.dtype, basis_dtype: torch.dtype, limit: int) -> str | None:
    """Why the kernels do not take a G of `dtype` with a basis of `basis_dtype` and this rank; None if they do."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"given a {dtype} grad, wanted bfloat16, float16 or float32"
    if basis_dtype not in (dtype, torch.float32):
        return f"given a {basis_dtype} basis, wanted {dtype} like grad, or float32"
    if rank > limit:
        return f"given rank {rank}, wanted at most {limit} for a {dtype} grad and a {basis_dtype} basis"
    return None

"""Who does what in a grouped launch: the tables that its kernels read, built on the CPU from shapes and ranks alone.

A table of matrices has a row of `FIELDS` int64 for each; a list of tiles has, for each program, the row it works on and
the tile. The pointers are a table of their own, since gradients move from step to step and shapes do not.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .panels import Device, PanelConfig, chunk_columns, max_rank, panel_config

__all__ = [
    "FIELDS",
    "THIN_TILE",
    "Item",
    "OneSidePlan",
    "TwoSidePlan",
    "coefficients",
    "plan_one_side",
    "plan_two_sides",
    "waves",
]

# Columns of the table of matrices.
FIELDS = (
    "m",
    "n",
    "r",
    "s",
    "pitch",
    "left_product",
    "right_product",
    "core",
    "chunk",
    "slots",
    "g",
    "a",
    "c",
    "p",
    "q",
)
# Rows and columns of a tile of the core and of B'.
THIN_TILE = 64

# Scratch of a wave of matrices: at r = s = 64 the 224 matrices of a 7B model need 0.6 GB. More than this is split.
SCRATCH_BYTES = 2**30


class Item(NamedTuple):
    """One matrix of a group: m x n, rows `pitch` elements apart, with bases of ranks r and s (None: no basis)."""

    m: int
    n: int
    pitch: int
    r: int | None
    s: int | None
    keep_left: bool
    keep_right: bool
    block: bool


def coefficients(item: Item) -> tuple[int, int, int, int, int]:
    """(g, a, c, p, q), each -1, 0 or 1: the result is g G + a L A + c B' Rᵀ with A = Lᵀ G, B' = p G R + q L (A R)."""
    if item.s is None:
        return (0, 1, 0, 0, 0) if item.keep_left else (1, -1, 0, 0, 0)
    if item.r is None:
        return (0, 0, 1, 1, 0) if item.keep_right else (1, 0, -1, 1, 0)
    if item.block:
        return (1, 0, -1, 0, 1)
    if item.keep_left:
        return (0, 0, 1, 0, 1) if item.keep_right else (0, 1, -1, 0, 1)
    return (0, 0, 1, 1, -1) if item.keep_right else (1, -1, -1, 1, -1)


class OneSidePlan(NamedTuple):
    """`table` as `FIELDS`; `tiles`: row * 2 + side (0 left, 1 right), panel."""

    table: NDArray[np.int64]
    tiles: NDArray[np.int32]
    config: PanelConfig


class TwoSidePlan(NamedTuple):
    """Four lists of tiles, one a launch, and the number of float32 of scratch.

    thin: row * 2 + side, panel, first rank, slot. core, correct, update: row, tile.
    """

    table: NDArray[np.int64]
    thin: NDArray[np.int32]
    core: NDArray[np.int32]
    correct: NDArray[np.int32]
    update: NDArray[np.int32]
    config: PanelConfig
    scratch: int


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def aligned(size: int) -> int:
    """Rounded up to 64 bytes of float32."""
    return cdiv(size, 16) * 16


def row_of(item: Item, **more: int) -> list[int]:
    known = {"m": item.m, "n": item.n, "r": item.r or 0, "s": item.s or 0, "pitch": item.pitch} | more
    return [known.get(field, 0) for field in FIELDS]


def product_tiles(row: int, count: int) -> NDArray[np.int32]:
    tiles = np.empty((count, 2), np.int32)
    tiles[:, 0], tiles[:, 1] = row, np.arange(count)
    return tiles


def joined(parts: list[NDArray[np.int32]], columns: int) -> NDArray[np.int32]:
    return np.concatenate(parts) if parts else np.empty((0, columns), np.int32)


def plan_one_side(items: Sequence[Item], dtype: torch.dtype, basis_dtype: torch.dtype, device: Device) -> OneSidePlan:
    """One panel a tile, in the order of the list. Items have one basis each, of a rank that `max_rank` allows."""
    sides = [(item.m, item.n, item.r, 0) if item.s is None else (item.n, item.m, item.s, 1) for item in items]
    length, extent = max(side[0] for side in sides), sum(side[1] for side in sides)
    config = panel_config(length, extent, max(side[2] or 0 for side in sides), dtype, basis_dtype, device)
    tiles = [product_tiles(2 * i + side, cdiv(across, config.width)) for i, (_, across, _, side) in enumerate(sides)]
    return OneSidePlan(np.array([row_of(item) for item in items], np.int64), joined(tiles, 2), config)


def thin_tiles(row: int, item: Item, config: PanelConfig, chunk: int, need_left: bool) -> Iterator[NDArray[np.int32]]:
    """Panels of columns for Lᵀ G and of rows for (G R)ᵀ, chunk by chunk, so that the rows find the columns' G in L2."""
    width, rank = config.width, config.rank
    left_panels, right_panels = cdiv(item.n, width), cdiv(item.m, width)
    for slot in range(cdiv(item.n, chunk)):
        columns = range(slot * chunk // width, min((slot + 1) * chunk // width, left_panels))
        sides = ((0, columns, item.r or 0, 0, need_left), (1, range(right_panels), item.s or 0, slot, True))
        for side, panels, ranks, at, needed in sides:
            firsts = range(0, ranks if needed else 0, rank)
            tiles = np.empty((len(panels), len(firsts), 4), np.int32)
            tiles[..., 0], tiles[..., 3] = 2 * row + side, at
            tiles[..., 1] = np.array(panels)[:, None]
            tiles[..., 2] = np.array(firsts)[None, :]
            yield tiles.reshape(-1, 4)


def plan_two_sides(
    items: Sequence[Item],
    dtype: torch.dtype,
    basis_dtype: torch.dtype,
    device: Device,
    update_tile: tuple[int, int],
) -> TwoSidePlan:
    """Any mixture of sides, ranks and kept sides. A tile of G in the last launch is `update_tile`, rows and columns."""
    largest = max(max(item.r or 0, item.s or 0) for item in items)
    rank = min(largest, max_rank(dtype, basis_dtype, device.is_hip))
    # Length 0: panels are read once.
    config = panel_config(0, sum(item.m + item.n for item in items), rank, dtype, basis_dtype, device)
    table: list[list[int]] = []
    thin: list[NDArray[np.int32]] = []
    core, correct, update = list(thin), list(thin), list(thin)
    scratch = 0
    for i, item in enumerate(items):
        m, n, r, s = item.m, item.n, item.r or 0, item.s or 0
        signs = dict(zip("gacpq", coefficients(item), strict=True))
        chunk = chunk_of(item, config, dtype, device)
        slots = cdiv(n, chunk)
        places = {}
        for name, size in (("left_product", r * n), ("right_product", slots * s * m), ("core", s * r)):
            places[name] = scratch
            scratch += aligned(size)
        table.append(row_of(item, **places, chunk=chunk, slots=slots, **signs))
        thin.extend(thin_tiles(i, item, config, chunk, signs["a"] != 0))
        if signs["q"]:
            core.append(product_tiles(i, cdiv(s, THIN_TILE) * cdiv(r, THIN_TILE)))
        if signs["q"] or slots > 1:
            correct.append(product_tiles(i, cdiv(s, THIN_TILE) * cdiv(m, THIN_TILE)))
        update.append(product_tiles(i, cdiv(m, update_tile[0]) * cdiv(n, update_tile[1])))
    lists = (joined(thin, 4), joined(core, 2), joined(correct, 2), joined(update, 2))
    return TwoSidePlan(np.array(table, np.int64), *lists, config, scratch)


def chunk_of(item: Item, config: PanelConfig, dtype: torch.dtype, device: Device) -> int:
    """Columns that G R is summed over at a time."""
    if not item.s:
        return cdiv(item.n, config.width) * config.width
    return chunk_columns(item.m, item.n, item.s, dtype.itemsize, config.width, device)


def waves(items: Sequence[Item], limit: int = SCRATCH_BYTES) -> list[list[int]]:
    """Positions of the items that go together: about `limit` bytes of scratch (with one slot each), or a single one."""
    parts: list[list[int]] = []
    bytes_of_part = 0
    for i, item in enumerate(items):
        r, s = item.r or 0, item.s or 0
        needed = 4 * (r * item.n + s * item.m + s * r)
        if not parts or bytes_of_part + needed > limit:
            parts.append([])
            bytes_of_part = 0
        parts[-1].append(i)
        bytes_of_part += needed
    return parts

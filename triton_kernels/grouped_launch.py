"""Launches the grouped kernels: uploads the tables once for a list of matrices, the pointers once they have moved."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from . import grouped
from .grouped_plan import THIN_TILE, Item, OneSidePlan, TwoSidePlan, plan_one_side, plan_two_sides, waves
from .launch import device_for, on_device, precision_for
from .panels import Device, max_rank, why_not
from .rank_update import UpdateConfig, update_config
from .tables import held, upload

__all__ = ["Group", "Member", "prepare", "why_not_group"]

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
THIN_DEPTH = 32


class Member(NamedTuple):
    """One matrix of a group with its bases and flags."""

    grad: Tensor
    left: Tensor | None
    right: Tensor | None
    keep_left: bool
    keep_right: bool
    block: bool

    def item(self) -> Item:
        r, s = (None if basis is None else basis.shape[-1] for basis in (self.left, self.right))
        m, n = self.grad.shape
        return Item(m, n, self.grad.stride(0), r, s, self.keep_left, self.keep_right, self.block)

    def basis_dtype(self) -> torch.dtype:
        basis = self.left if self.left is not None else self.right
        assert basis is not None
        return basis.dtype


def why_not_group(member: Member) -> str | None:
    """Why a matrix cannot be part of a group, or None if it can; any ranks can."""
    grad = member.grad
    if grad.dim() != 2:
        return f"given a grad of shape {tuple(grad.shape)}, wanted a single matrix"
    m, n = grad.shape
    if not 0 < m < 2**31 or not 0 < n < 2**31 or grad.stride(1) != 1 or grad.stride(0) < n:
        return f"given a grad of shape {(m, n)} and strides {grad.stride()}, wanted contiguous rows"
    dtypes = set()
    for name, basis in (("left", member.left), ("right", member.right)):
        if basis is not None:
            dtypes.add(basis.dtype)
            if basis.dim() != 2 or not basis.is_contiguous():
                return f"given a {name} of shape {tuple(basis.shape)}, strides {basis.stride()}, wanted it contiguous"
    if len(dtypes) != 1:
        return "given bases of different dtypes or none, wanted one dtype"
    return why_not(0, grad.dtype, dtypes.pop(), 0)


class Uploaded(NamedTuple):
    """The plan of a group, and its table and lists of tiles on the device; `hosts` keeps their sources alive."""

    plan: OneSidePlan | TwoSidePlan
    arrays: tuple[Tensor, ...]
    hosts: tuple[Tensor, ...]


class Group(NamedTuple):
    """A list of matrices ready to be projected: call `launch` as often as their addresses stay the same."""

    device: torch.device
    dtype: torch.dtype
    basis_dtype: torch.dtype
    keep: bool
    aligned: bool
    rank_aligned: bool
    precision: str
    multiprocessors: int
    uploaded: Uploaded
    pointers: Tensor
    update: UpdateConfig

    def common(self, kernel: Any) -> dict[str, Any]:
        config = self.uploaded.plan.config
        known = {
            "KEEP": self.keep,
            "DTYPE": TYPES[self.dtype],
            "BASIS": TYPES[self.basis_dtype],
            "ALIGNED": self.aligned,
            "RANK_ALIGNED": self.rank_aligned,
            "RANK": config.rank,
            "BLOCK_K": config.depth,
            "BLOCK_N": config.width,
            "STAGES": config.stages,
            "TILE": THIN_TILE,
            "PRECISION": self.precision,
            "num_warps": config.warps,
            "num_stages": config.stages,
        }
        return {name: value for name, value in known.items() if name.startswith("num_") or name in kernel.arg_names}

    def launch(self) -> None:
        with on_device(self.pointers):
            if isinstance(self.uploaded.plan, OneSidePlan):
                self.launch_one_side()
            else:
                self.launch_two_sides(self.uploaded.plan)

    def launch_one_side(self) -> None:
        table, tiles = self.uploaded.arrays
        kernel = grouped.grouped_one_side_kernel
        count = tiles.shape[0]
        grid = (min(count, self.multiprocessors),)
        kernel[grid](self.pointers, table, tiles, count, **self.common(kernel))

    def launch_two_sides(self, plan: TwoSidePlan) -> None:
        table, *lists = self.uploaded.arrays
        scratch = torch.empty(max(plan.scratch, 1), dtype=torch.float32, device=self.device)
        # Operands that are split or float32 fill the registers of sm_80 at half the depth.
        plain = self.dtype == self.basis_dtype == torch.bfloat16
        square = {"BLOCK_K": THIN_DEPTH if plain else THIN_DEPTH // 2}
        update = {"BLOCK_M": self.update.rows, "BLOCK_N": self.update.columns, "BLOCK_R": self.update.depth}
        options: dict[str, int] = {"num_warps": self.update.warps, "num_stages": self.update.stages}
        kernels: Sequence[tuple[Any, dict[str, int]]] = (
            (grouped.grouped_thin_kernel, {}),
            (grouped.grouped_core_kernel, square),
            (grouped.grouped_correct_kernel, square),
            (grouped.grouped_update_kernel, update | options),
        )
        for (kernel, own), tiles in zip(kernels, lists, strict=True):
            if tiles.shape[0]:
                kernel[(tiles.shape[0],)](self.pointers, table, tiles, scratch, **(self.common(kernel) | own))


def one_sided(members: Sequence[Member], device: Device) -> bool:
    """Whether the panel kernel can take all of them: a basis each, of a rank whose coefficients fit the registers."""
    limit = max_rank(members[0].grad.dtype, members[0].basis_dtype(), device.is_hip)
    bases = [member.left if member.right is None else member.right for member in members]
    return all(m.left is None or m.right is None for m in members) and all(
        basis is not None and basis.shape[-1] <= limit for basis in bases
    )


def prepare(members: Sequence[Member]) -> list[Group]:
    """Groups that project all of the members in place: one launch each if they have one basis each, else four.

    Members have passed `why_not_group`, are on one device and have one dtype and one dtype of bases.
    """
    device = device_for(members[0].grad)
    if not one_sided(members, device):
        return [prepare_wave([members[i] for i in wave], device, None) for wave in waves([m.item() for m in members])]
    kept = [member for member in members if member.keep_left or member.keep_right]
    removed = [member for member in members if not (member.keep_left or member.keep_right)]
    return [prepare_wave(part, device, keep) for part, keep in ((removed, False), (kept, True)) if part]


def prepare_wave(members: Sequence[Member], device: Device, keep: bool | None) -> Group:
    """keep: whether the members, of one side each, are kept; None for the four launches of any mixture."""
    first = members[0].grad
    dtype, basis_dtype = first.dtype, members[0].basis_dtype()
    items = tuple(member.item() for member in members)
    # Tiles of float32 arithmetic for a float32 basis: both operands of a product are split, and sm_80 spills at more.
    arithmetic = torch.float32 if basis_dtype == torch.float32 else dtype
    update = update_config(max(item.m for item in items), sum(item.n for item in items), arithmetic, device)

    def tables() -> Uploaded:
        plan: OneSidePlan | TwoSidePlan
        if keep is None:
            plan = plan_two_sides(items, dtype, basis_dtype, device, (update.rows, update.columns))
        else:
            plan = plan_one_side(items, dtype, basis_dtype, device)
        pairs = [upload(array, first.device) for array in plan if isinstance(array, np.ndarray)]
        return Uploaded(plan, tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs))

    uploaded = held((items, dtype, basis_dtype, device, keep is None), tables, first.device)
    addresses = tuple(
        0 if tensor is None else tensor.data_ptr()
        for member in members
        for tensor in (member.grad, member.left, member.right)
    )
    pointers, _ = held(
        addresses,
        lambda: upload(np.array(addresses, np.int64).reshape(-1, 3), first.device),
        first.device,
    )
    sizes = [size for item in items for size in (item.m, item.n, item.pitch)]
    ranks = [rank for item in items for rank in (item.r or 0, item.s or 0)]
    return Group(
        device=first.device,
        dtype=dtype,
        basis_dtype=basis_dtype,
        keep=bool(keep),
        aligned=all(size % 16 == 0 for size in sizes) and all(at % 16 == 0 for at in addresses[::3]),
        rank_aligned=all(rank % 16 == 0 for rank in ranks) and all(at % 16 == 0 for at in addresses),
        precision=precision_for(first),
        multiprocessors=device.multiprocessors,
        uploaded=uploaded,
        pointers=pointers,
        update=update,
    )

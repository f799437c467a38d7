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
from .tables import upload

__all__ = ["Group", "Located", "Member", "prepare", "why_not_group"]

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


class Group(NamedTuple):
    """Matrices that are projected together: everything but their addresses. `places`: their positions in the call.

    `arrays`: the table and the lists of tiles on the device. `sources`: what they are copied from, kept alive.
    """

    places: tuple[int, ...]
    plan: OneSidePlan | TwoSidePlan
    arrays: tuple[Tensor, ...]
    sources: tuple[Tensor, ...]
    device: torch.device
    dtype: torch.dtype
    basis_dtype: torch.dtype
    keep: bool
    aligned: bool
    rank_aligned: bool
    precision: str
    multiprocessors: int
    update: UpdateConfig

    def locate(
        self, grads: Sequence[Tensor], lefts: Sequence[Tensor | None], rights: Sequence[Tensor | None]
    ) -> "Located":
        """The group at the addresses of these tensors, of which it takes its `places`."""
        triples = [(grads[i], lefts[i], rights[i]) for i in self.places]
        addresses = np.array([[0 if t is None else t.data_ptr() for t in triple] for triple in triples], np.int64)
        even = addresses % 16 == 0
        pointers, source = upload(addresses, self.device)
        aligned, rank_aligned = self.aligned and bool(even[:, 0].all()), self.rank_aligned and bool(even.all())
        return Located(self._replace(aligned=aligned, rank_aligned=rank_aligned), pointers, source)


class Located(NamedTuple):
    """A group and where it lies: call `launch` as often as its addresses stay the same."""

    group: Group
    pointers: Tensor
    source: Tensor

    def common(self, kernel: Any) -> dict[str, Any]:
        group, config = self.group, self.group.plan.config
        known = {
            "KEEP": group.keep,
            "DTYPE": TYPES[group.dtype],
            "BASIS": TYPES[group.basis_dtype],
            "ALIGNED": group.aligned,
            "RANK_ALIGNED": group.rank_aligned,
            "RANK": config.rank,
            "BLOCK_K": config.depth,
            "BLOCK_N": config.width,
            "STAGES": config.stages,
            "TILE": THIN_TILE,
            "PRECISION": group.precision,
            "num_warps": config.warps,
            "num_stages": config.stages,
        }
        return {name: value for name, value in known.items() if name.startswith("num_") or name in kernel.arg_names}

    def launch(self) -> None:
        with on_device(self.pointers):
            if isinstance(self.group.plan, OneSidePlan):
                self.launch_one_side()
            else:
                self.launch_two_sides(self.group.plan)

    def launch_one_side(self) -> None:
        table, tiles = self.group.arrays
        kernel = grouped.grouped_one_side_kernel
        count = tiles.shape[0]
        grid = (min(count, self.group.multiprocessors),)
        kernel[grid](self.pointers, table, tiles, count, **self.common(kernel))

    def launch_two_sides(self, plan: TwoSidePlan) -> None:
        group = self.group
        table, *lists = group.arrays
        scratch = torch.empty(max(plan.scratch, 1), dtype=torch.float32, device=group.device)
        # Operands that are split or float32 fill the registers of sm_80 at half the depth.
        plain = group.dtype == group.basis_dtype == torch.bfloat16
        square = {"BLOCK_K": THIN_DEPTH if plain else THIN_DEPTH // 2}
        update = {"BLOCK_M": group.update.rows, "BLOCK_N": group.update.columns, "BLOCK_R": group.update.depth}
        options: dict[str, int] = {"num_warps": group.update.warps, "num_stages": group.update.stages}
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


def prepare(members: Sequence[Member], places: Sequence[int]) -> list[Group]:
    """Groups that project all of the members in place: one launch each if they have one basis each, else four.

    Members, at their places in the call, have passed `why_not_group`, are on one device, of one dtype, and so are their
    bases.
    """
    device = device_for(members[0].grad)
    everyone = range(len(members))
    parts: list[tuple[Sequence[int], bool | None]]
    if one_sided(members, device):
        kept = [i for i in everyone if members[i].keep_left or members[i].keep_right]
        parts = [([i for i in everyone if i not in set(kept)], False), (kept, True)]
    else:
        parts = [(wave, None) for wave in waves([member.item() for member in members])]
    return [
        prepare_part([members[i] for i in part], tuple(places[i] for i in part), device, keep)
        for part, keep in parts
        if part
    ]


def prepare_part(members: Sequence[Member], places: tuple[int, ...], device: Device, keep: bool | None) -> Group:
    """keep: whether the members, of one side each, are kept; None for the four launches of any mixture."""
    first = members[0].grad
    dtype, basis_dtype = first.dtype, members[0].basis_dtype()
    items = [member.item() for member in members]
    # Tiles of float32 arithmetic for a float32 basis: both operands of a product are split, and sm_80 spills at more.
    arithmetic = torch.float32 if basis_dtype == torch.float32 else dtype
    update = update_config(max(item.m for item in items), sum(item.n for item in items), arithmetic, device)
    plan: OneSidePlan | TwoSidePlan
    if keep is None:
        plan = plan_two_sides(items, dtype, basis_dtype, device, (update.rows, update.columns))
    else:
        plan = plan_one_side(items, dtype, basis_dtype, device)
    pairs = [upload(array, first.device) for array in plan if isinstance(array, np.ndarray)]
    sizes = [size for item in items for size in (item.m, item.n, item.pitch)]
    ranks = [rank for item in items for rank in (item.r or 0, item.s or 0)]
    return Group(
        places=places,
        plan=plan,
        arrays=tuple(pair[0] for pair in pairs),
        sources=tuple(pair[1] for pair in pairs),
        device=first.device,
        dtype=dtype,
        basis_dtype=basis_dtype,
        keep=bool(keep),
        aligned=all(size % 16 == 0 for size in sizes),
        rank_aligned=all(rank % 16 == 0 for rank in ranks),
        precision=precision_for(first),
        multiprocessors=device.multiprocessors,
        update=update,
    )

"""Matrices on the ranks in every way that a mesh allows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

Placements = list[Placement]
ROWS, COLUMNS, WHOLE = Shard(0), Shard(1), Replicate()


@cache
def line() -> DeviceMesh:
    """All ranks in one mesh dimension. One object a process: every mesh makes process groups of its own."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


@cache
def square() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2))


def placements() -> Iterator[tuple[DeviceMesh, Placements]]:
    """Every way to place a matrix on a 1-d mesh, and with four ranks on a 2 x 2 mesh."""
    kinds = (WHOLE, ROWS, COLUMNS)
    for kind in kinds:
        yield line(), [kind]
    if dist.get_world_size() == 4:
        for first in kinds:
            for second in kinds:
                yield square(), [first, second]


def place(tensor: Tensor, mesh: DeviceMesh, *how: Placement) -> DTensor:
    """A copy of `tensor`, the same on all ranks; one placement counts for all mesh dimensions. Nothing is sent."""
    each = list(how) if len(how) == mesh.ndim else list(how) * mesh.ndim
    return distribute_tensor(tensor.clone(), mesh, each, src_data_rank=None)


def place_basis(basis: Tensor, mesh: DeviceMesh, how: Placements, side: str, cut: bool) -> DTensor:
    """Whole on every rank, or `cut` along its long dimension as the matrix placed by `how`."""
    along = Shard(0 if side == "left" else 1)
    return place(basis, mesh, *(ROWS if cut and kind == along else WHOLE for kind in how))


def whole(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()

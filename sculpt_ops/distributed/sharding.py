"""How a parameter lies on the ranks: along which dimension it is split, over which group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ..names import list_names
from .agreement import Ranks

__all__ = ["Sharding", "as_shard", "common_ranks", "is_split", "mesh_ranks", "moves_to_owner", "sharding_of"]


def moves_to_owner(m: int, n: int, width: int, size: int) -> bool:
    """Whether an m x n matrix, split by rows over `size` ranks, is projected on its owner and not where it lies.

    width: stored columns of the left basis; 0 without one. For a matrix split by columns, m and n the other way round
    and the right basis.

    A step projects twice. In place each projection is an all-reduce of width x n coefficients, 2 width n numbers a
    rank; with an owner the gradient goes there and the step comes back, 2 m n / size numbers in all. Where the first is
    cheaper, width is at most m / (2 size), so that the other side's basis, which every rank then needs whole, is small
    as well. A single rank owns all there is.
    """
    return size == 1 or 2 * size * width > m


@dataclass(frozen=True)
class Sharding:
    """A matrix split along `dim` (0 or 1) over the ranks of dimension `mesh_dim` of `mesh`, and the same on all others.

    Every rank has ceil(length / size) rows (columns), as far as they go: the last ones have fewer, or none.
    """

    mesh: DeviceMesh
    mesh_dim: int
    dim: int

    @property
    def ranks(self) -> Ranks:
        return Ranks.of(self.mesh.get_group(self.mesh_dim))

    def extent(self, length: int, rank: int) -> tuple[int, int]:
        """Where the part of `rank` begins, and its length."""
        share = -(-length // self.mesh.size(self.mesh_dim))
        start = min(length, share * rank)
        return start, min(length, start + share) - start

    def wrap(
        self, shard: Tensor, shape: tuple[int, ...], *, replicate: bool = False, dim: int | None = None
    ) -> DTensor:
        """This rank's part, or the whole (`replicate`), of a matrix of `shape` as a DTensor."""
        placements: list[Shard | Replicate] = [Replicate()] * self.mesh.ndim
        if not replicate:
            placements[self.mesh_dim] = Shard(self.dim if dim is None else dim)
        stride = (shape[1], 1)
        return DTensor.from_local(
            shard.contiguous(), self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
        )


def sharding_of(name: str, tensor: Tensor) -> Sharding:
    """How the DTensor `tensor`, a matrix, is sharded. ValueError unless one dimension of it is split over one dimension
    of the mesh."""
    assert isinstance(tensor, DTensor)
    placements = tensor.placements
    if any(isinstance(placement, Partial) for placement in placements):
        raise ValueError(f"{name} has the placements {placements}: a sum that is not reduced; redistribute it first")
    split = [index for index, placement in enumerate(placements) if not isinstance(placement, Replicate)]
    if len(split) != 1 or type(placements[split[0]]) is not Shard:
        raise ValueError(
            f"{name} has the placements {placements}, wanted Shard on one dimension of the mesh and Replicate on the "
            "others, as fully_shard makes them; the ops in torch.ops.sculpt take any"
        )
    dim = placements[split[0]].dim % tensor.ndim  # type: ignore[attr-defined]
    return Sharding(tensor.device_mesh, split[0], dim)


def is_split(tensor: Tensor) -> bool:
    """Whether `sharding_of` takes this DTensor."""
    try:
        sharding_of("", tensor)
    except ValueError:
        return False
    return True


def common_ranks(parameters: Mapping[str, Tensor]) -> dict[str, Sharding]:
    """The sharding of every one of `parameters`. ValueError unless all are DTensors on one mesh, sharded over the same
    ranks."""
    if plain := [name for name, parameter in parameters.items() if not isinstance(parameter, DTensor)]:
        raise ValueError(
            f"{list_names(plain)}: not sharded, while {len(parameters) - len(plain)} other parameters are; FSDP leaves "
            "parameters gathered after a forward pass without a backward: call reshard() on the modules, or shard all "
            "modules that hold targets"
        )
    shardings = {name: sharding_of(name, parameter) for name, parameter in parameters.items()}
    first_name, first = next(iter(shardings.items()))
    for name, sharding in shardings.items():
        if (sharding.mesh, sharding.mesh_dim) != (first.mesh, first.mesh_dim):
            raise ValueError(
                f"{name} is sharded over dimension {sharding.mesh_dim} of {sharding.mesh}, {first_name} over dimension "
                f"{first.mesh_dim} of {first.mesh}; wanted all on one"
            )
    if not dist.is_initialized() or first.mesh.get_coordinate() is None:
        raise ValueError(f"{first_name}: this rank is not part of {first.mesh}")
    return shardings


def mesh_ranks(parameters: Mapping[str, Tensor]) -> list[Ranks]:
    """The group of every dimension of the mesh that `parameters` are on: what is summed over one after the other is
    summed over all ranks, those of other replicas too. Raises what `common_ranks` does."""
    mesh = next(iter(common_ranks(parameters).values())).mesh
    return [Ranks.of(mesh.get_group(dim)) for dim in range(mesh.ndim)]


def as_shard(tensor: Tensor) -> Tensor:
    """The local part of a DTensor, any other tensor as it is; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

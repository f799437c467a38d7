"""Where the shards of a matrix lie, and the parts of thin tensors (bases, images, test matrices) that go with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

__all__ = [
    "CORE",
    "LEFT",
    "LEFT_IMAGE",
    "RIGHT",
    "RIGHT_IMAGE",
    "SAME",
    "Axes",
    "Layout",
    "Span",
    "common_mesh",
    "local_of",
    "moved",
    "sharded_dim",
    "wrap",
]

# Of each dimension of a thin tensor, counted from the end, the dimension of the matrix (-2 rows, -1 columns) that it
# runs along; None for the rank. Dimensions before these are batches.
LEFT = (-2, None)
RIGHT = (-1, None)
LEFT_IMAGE = (None, -1)
RIGHT_IMAGE = (-2, None)
CORE = (None, None)
SAME = (-2, -1)
Axes = tuple[int | None, int | None]
Result = TypeVar("Result")


class Span(NamedTuple):
    """What this rank has of one dimension: `length` of `size`, from `start` on, split over the mesh dimensions
    `dims`."""

    start: int
    length: int
    size: int
    dims: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Layout:
    """How a DTensor (..., m, n) lies on its mesh: Replicate or Shard on every dimension of it, batches included.

    One object for all DTensors of a shape and placements, unless traced: 200 matrices have few different ones."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    spans: tuple[Span, ...]

    @staticmethod
    def of(op: str, name: str, tensor: Tensor) -> Layout:
        """ValueError for Partial placements, for shards that are not in one piece, and on a rank outside the mesh."""
        assert isinstance(tensor, DTensor)
        _refuse_partial(op, name, tensor)
        mesh, placements = tensor.device_mesh, tuple(tensor.placements)
        if mesh.get_coordinate() is None:
            raise ValueError(f"{op}: {name}: given a DTensor on {mesh}, wanted a mesh that this rank is part of")
        found = _cached(_layout)(mesh, placements, tensor.shape)
        if found is None:
            raise ValueError(
                f"{op}: {name}: given placements {placements} that interleave the shards of shape "
                f"{tuple(tensor.shape)}, wanted one piece on every rank; redistribute it"
            )
        return found

    @property
    def rows(self) -> Span:
        return self.spans[-2]

    @property
    def columns(self) -> Span:
        return self.spans[-1]

    @property
    def batch_dims(self) -> tuple[int, ...]:
        return tuple(dim for span in self.spans[:-2] for dim in span.dims)

    def part(self, thin: Tensor, axes: Axes) -> Tensor:
        """This rank's part of `thin`: what runs along the matrix's dimensions is cut as they are. Without communication
        where `thin` is whole or cut so already, otherwise gathered first."""
        assert isinstance(thin, DTensor)
        kept, cuts = _cached(_cuts)(self, tuple(thin.placements), thin.shape, axes)
        if kept != thin.placements:
            thin = thin.redistribute(placements=kept)
        local = local_of(thin)
        for dim, start, length in cuts:
            local = local.narrow(dim, start, length)
        return local

    def placed(self, axes: Axes, ndim: int) -> list[Placement]:
        """Placements of a new thin tensor of `ndim` dimensions, whose part is that of :meth:`part`."""
        placements: list[Placement] = [Replicate()] * self.mesh.ndim
        for place in range(-ndim, 0):
            along = axes[place] if place >= -2 else place
            if along is not None:
                for i in self.spans[along].dims:
                    placements[i] = moved(self.placements[i], ndim + place)
        return placements


def common_mesh(op: str, tensors: Mapping[str, Tensor | None]) -> DeviceMesh:
    """The mesh of all of `tensors`, by argument. ValueError where one is no DTensor, on another mesh, or Partial."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first_name, first = next((name, tensor) for name, tensor in given.items() if isinstance(tensor, DTensor))
    for name, tensor in given.items():
        if not isinstance(tensor, DTensor):
            raise ValueError(
                f"{op}: {name}: given a plain tensor, wanted a DTensor on the mesh of {first_name}: "
                "distribute_tensor(...) makes one, with Replicate() where every rank has it whole"
            )
        if tensor.device_mesh is not first.device_mesh and tensor.device_mesh != first.device_mesh:
            raise ValueError(
                f"{op}: {name}: given a DTensor on {tensor.device_mesh}, wanted the mesh of {first_name}, "
                f"{first.device_mesh}"
            )
        _refuse_partial(op, name, tensor)
    return first.device_mesh


def local_of(tensor: Tensor) -> Tensor:
    """This rank's part; shares its memory."""
    assert isinstance(tensor, DTensor)
    local = tensor.to_local()
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def wrap(local: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]) -> DTensor:
    """A DTensor of `shape` from this rank's part."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * max(size, 1))
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides[: len(shape)])
    )


def _refuse_partial(op: str, name: str, tensor: DTensor) -> None:
    if any(isinstance(placement, Partial) for placement in tensor.placements):
        raise ValueError(
            f"{op}: {name}: given placements {tensor.placements}, a sum that is not reduced, wanted Replicate or "
            "Shard; redistribute it first"
        )


def sharded_dim(placement: Placement) -> int | None:
    """The tensor dimension that Shard or _StridedShard (no subclass of it in every version) splits."""
    return None if isinstance(placement, Replicate | Partial) else placement.dim  # type: ignore[attr-defined]


def moved(placement: Placement, dim: int) -> Placement:
    """The same split, of another dimension."""
    if type(placement) is Shard:
        return Shard(dim)
    return type(placement)(dim, split_factor=placement.split_factor)  # type: ignore[call-arg, attr-defined]


def _matches(a: Placement, b: Placement) -> bool:
    """Whether both split alike, whatever the dimension."""
    return type(a) is type(b) and getattr(a, "split_factor", 0) == getattr(b, "split_factor", 0)


def _cached(function: Callable[..., Result]) -> Callable[..., Result]:
    """The cached `function`; while tracing itself, which sizes that are symbols do not go with a cache."""
    return function.__wrapped__ if torch.compiler.is_compiling() else function  # type: ignore[attr-defined, no-any-return]


@lru_cache(maxsize=1024)
def _layout(mesh: DeviceMesh, placements: tuple[Placement, ...], shape: torch.Size) -> Layout | None:
    spans = []
    for dim, size in enumerate(shape):
        dims = _split_by(placements, dim)
        extent = _extent(mesh, placements, size, dims)
        if extent is None:
            return None
        spans.append(Span(*extent, size, dims))
    return Layout(mesh, placements, tuple(spans))


@lru_cache(maxsize=4096)
def _cuts(
    layout: Layout, placements: tuple[Placement, ...], shape: torch.Size, axes: Axes
) -> tuple[tuple[Placement, ...], list[tuple[int, int, int]]]:
    """Of a thin tensor: the placements that it needs, and dimension, start and length of what is then cut of it."""
    kept: list[Placement] = [Replicate()] * layout.mesh.ndim
    cuts = []
    for dim, size in enumerate(shape):
        place = dim - len(shape)
        along = axes[place] if place >= -2 else place
        span = None if along is None else layout.spans[along]
        if span is None or span.size != size:  # the rank, or one batch entry for all
            continue
        begin, held, own = 0, size, _split_by(placements, dim)
        # Of dimensions that the matrix's split first: the rest is cut from what this rank has.
        if own == span.dims[: len(own)] and all(_matches(placements[i], layout.placements[i]) for i in own):
            extent = _extent(layout.mesh, placements, size, own)
            if extent is not None:
                begin, held = extent
                for i in own:
                    kept[i] = placements[i]
        if held != span.length:
            # An empty shard starts where the dimension ends.
            cuts.append((dim, min(span.start - begin, held - span.length), span.length))
    return tuple(kept), cuts


def _split_by(placements: Sequence[Placement], dim: int) -> tuple[int, ...]:
    return tuple(i for i, placement in enumerate(placements) if sharded_dim(placement) == dim)


def _extent(
    mesh: DeviceMesh, placements: Sequence[Placement], size: int, dims: Sequence[int]
) -> tuple[int, int] | None:
    """Start and length of this rank's part of a dimension of `size`; None if that of any rank is not in one piece."""
    if all(type(placements[i]) is Shard for i in dims):
        start, length = 0, size
        for i in dims:
            share = -(-length // mesh.size(i))
            before = min(length, share * mesh.get_local_rank(i))
            start, length = start + before, min(length - before, share)
        return start, length
    parts: dict[tuple[int, ...], Tensor] = {(): torch.arange(size)}
    for i in dims:
        # Private in torch, and the one description of what _StridedShard does.
        split = placements[i]._split_tensor  # type: ignore[attr-defined]
        parts = {
            (*at, rank): piece
            for at, index in parts.items()
            for rank, piece in enumerate(split(index, mesh.size(i), with_padding=False)[0])
        }
    if any(len(index) and int(index[-1]) - int(index[0]) + 1 != len(index) for index in parts.values()):
        return None
    own = parts[tuple(mesh.get_local_rank(i) for i in dims)]
    return (int(own[0]), len(own)) if len(own) else (size, 0)

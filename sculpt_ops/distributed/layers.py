"""The subspaces of sharded parameters: every matrix is decomposed by its owner, which keeps the bases."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..basis import Basis
from ..decompose import Choice
from ..derive import CHUNK, derive_layers
from ..layer import LayerSubspace, Sides, project_each_
from ..leak import LayerLeak, measure_exact, measure_sketched
from ..ops.finite import check_finite
from ..remember import Remembered
from .agreement import Ranks
from .exchange import Place, assign_owners, broadcast, gather, round_trip, scatter
from .sharding import Sharding, as_shard, common_ranks, moves_to_owner, sharding_of

__all__ = [
    "derive_replicated",
    "derive_sharded",
    "in_place_layers",
    "measure_sharded",
    "place_of",
    "project_sharded_",
    "share_out",
    "whole_matrices",
]

Layers = dict[str, LayerSubspace]
Sketches = dict[str, Tensor]


def place_of(name: str, parameter: Tensor, layer: LayerSubspace) -> Place:
    """Where the shards of `parameter` go to be worked on."""
    assert layer.owner is not None
    return Place(layer.shape, sharding_of(name, parameter), layer.owner)


def derive_sharded(
    targets: Mapping[str, Tensor],
    wanted: Mapping[str, Choice] | float,
    sides: Sides,
    previous: Mapping[str, LayerSubspace],
    advance: Callable[[], None],
    basis_dtype: torch.dtype | None,
    remembered: Mapping[str, Remembered] | None,
) -> tuple[Layers, Sketches]:
    """`derive_layers` of DTensors, the work spread over their ranks; collective.

    A rank holds, besides its shards, the matrices it decomposes at the time and those that are on their way to it. Of
    matrices that it does not own it gets layers and sketches on the meta device. What one rank raises, all raise.
    """
    shardings = common_ranks(targets)
    first = next(iter(shardings.values()))
    ranks = first.ranks
    replicas = [Ranks.of(first.mesh.get_group(dim)) for dim in range(first.mesh.ndim) if dim != first.mesh_dim]

    def check() -> None:
        for name, matrix in targets.items():
            check_finite("from_model", name, as_shard(matrix.detach()))

    ranks.together("from_model", check)
    owners = assign_owners([_shape(matrix) for matrix in targets.values()], ranks.size)
    places = {
        name: Place(_shape(matrix), shardings[name], owner)
        for (name, matrix), owner in zip(targets.items(), owners, strict=True)
    }
    if remembered is not None:
        # A file says which layers share a basis, and no rank knows which of another's do: here none does.
        remembered = {name: _unshared(each) for name, each in remembered.items()}
    layers: Layers = {}
    sketches: Sketches = {}
    for names, wholes in whole_matrices("from_model", places, {name: [t] for name, t in targets.items()}):
        own = {name: whole for name, (whole,) in wholes.items()}

        def derive(own: Mapping[str, Tensor] = own) -> tuple[Layers, Sketches]:
            found, taken = _of_first_replica(
                lambda: derive_layers(own, wanted, sides, previous, lambda: None, basis_dtype, remembered),
                replicas,
                as_shard(next(iter(targets.values()))).device,
            )
            found = {name: replace(layer, owner=ranks.rank) for name, layer in found.items()}
            layers.update(found)
            sketches.update(taken)
            return _on_meta(found, taken)

        for found, taken in ranks.together("from_model", derive):
            for name in found:
                layers.setdefault(name, found[name])
                sketches.setdefault(name, taken[name])
        for _ in names:
            advance()
    return {name: layers[name] for name in targets}, {name: sketches[name] for name in targets}


def _of_first_replica(
    work: Callable[[], tuple[Layers, Sketches]], replicas: Sequence[Ranks], device: torch.device
) -> tuple[Layers, Sketches]:
    """What `work` gives where every group of `replicas` has its first rank; collective. On unlike processors it differs
    in the last digits (on unlike numbers of threads by 2e-4), and nothing brings the weights together afterwards."""
    if not replicas:
        return work()
    *others, ranks = replicas
    found: tuple[Layers, Sketches] = {}, {}

    def derive() -> tuple[Layers, Sketches]:
        nonlocal found
        found = _of_first_replica(work, others, device)
        return _on_meta(*found)

    first = ranks.together("from_model", derive)[0]
    layers, sketches = first if ranks.rank else found
    return _broadcast(layers, sketches, dict.fromkeys(layers, 0), ranks, device)


def _on_meta(layers: Layers, sketches: Sketches) -> tuple[Layers, Sketches]:
    """Without the values: what is small enough for every rank to be told."""
    return (
        {name: layer.to("meta") for name, layer in layers.items()},
        {name: sketch.to("meta") for name, sketch in sketches.items()},
    )


def derive_replicated(
    targets: Mapping[str, Tensor],
    wanted: Mapping[str, Choice] | float,
    sides: Sides,
    previous: Mapping[str, LayerSubspace],
    advance: Callable[[], None],
    basis_dtype: torch.dtype | None,
    remembered: Mapping[str, Remembered] | None,
    ranks: Ranks,
) -> tuple[Layers, Sketches]:
    """`derive_layers` of matrices that are the same on all of `ranks`: each does its share, all get all; collective."""
    names = list(targets)
    owners = dict(zip(names, assign_owners([_shape(targets[name]) for name in names], ranks.size), strict=True))
    own: tuple[Layers, Sketches] = {}, {}

    def derive() -> tuple[Layers, Sketches]:
        nonlocal own
        mine = {name: targets[name] for name in names if owners[name] == ranks.rank}
        own = derive_layers(mine, wanted, sides, previous, advance, basis_dtype, remembered)
        return _on_meta(*own)

    layers: Layers = {}
    sketches: Sketches = {}
    for found, taken in ranks.together("from_model", derive):
        layers |= found
        sketches |= taken
    layers |= own[0]
    sketches |= own[1]
    layers = {name: layers[name] for name in names}
    return _broadcast(layers, sketches, owners, ranks, next(iter(targets.values())).device)


def _broadcast(
    layers: Mapping[str, LayerSubspace],
    sketches: Mapping[str, Tensor],
    owners: Mapping[str, int],
    ranks: Ranks,
    device: torch.device,
) -> tuple[Layers, Sketches]:
    """Those of the owners on all of `ranks`, the others of which may have them on the meta device; collective."""
    pieces = [(name, key, part) for name in layers for key, part in _tensors(layers[name], sketches[name]).items()]
    whole = broadcast("from_model", [part for *_, part in pieces], [owners[name] for name, *_ in pieces], ranks, device)
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    for (name, key, _), tensor in zip(pieces, whole, strict=True):
        parts[name][key] = tensor
    return (
        {name: _with_tensors(layers[name], parts[name]) for name in layers},
        {name: parts[name]["sketch"] for name in layers},
    )


def share_out(
    layers: Mapping[str, LayerSubspace], sketches: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> tuple[Layers, Sketches]:
    """Layers and sketches that are whole on every rank, or at least on the owner, as `derive_sharded` leaves them for
    these DTensors."""
    ranks = next(iter(common_ranks(parameters).values())).ranks
    owners = assign_owners([layers[name].shape for name in layers], ranks.size)
    own_layers: Layers = {}
    own_sketches: Sketches = {}
    for (name, layer), owner in zip(layers.items(), owners, strict=True):
        device = parameters[name].device if owner == ranks.rank else "meta"
        if owner == ranks.rank and not layer.is_here:
            raise ValueError(
                f"the basis of {name} is on rank {layer.owner} of another group; save the subspaces and load them with "
                "the model"
            )
        own_layers[name] = replace(layer.to(device), owner=owner)
        if name in sketches:
            own_sketches[name] = sketches[name] if sketches[name].is_meta else sketches[name].to(device)
    return own_layers, own_sketches


def in_place_layers(layers: Mapping[str, LayerSubspace], parameters: Mapping[str, Tensor]) -> Layers:
    """Of the layers that are projected where they lie (`moves_to_owner`) a form with DTensors for bases: sharded like
    the parameter on the side that is split, whole on the other; collective."""
    split: list[tuple[str, Tensor, Place]] = []
    common: list[tuple[str, Tensor, int]] = []
    shardings: dict[str, Sharding] = {}
    for name, layer in layers.items():
        sharding = sharding_of(name, parameters[name])
        bases = (layer.left_basis, layer.right_basis)
        along, across = bases[sharding.dim], bases[1 - sharding.dim]
        m, n = layer.shape if sharding.dim == 0 else layer.shape[::-1]
        width = 0 if along is None else along.columns.shape[1]
        if not layer.protects or moves_to_owner(m, n, width, sharding.ranks.size):
            continue
        assert layer.owner is not None
        shardings[name] = sharding
        if along is not None:
            rows = replace(sharding, dim=0)
            split.append((name, along.span(), Place(_shape(along.columns), rows, layer.owner)))
        if across is not None:
            common.append((name, across.span(), layer.owner))
    if not shardings:
        return {}
    ranks = next(iter(shardings.values())).ranks
    device = as_shard(next(iter(parameters.values()))).device
    places = [place for *_, place in split]
    own = {i: span for i, (_, span, place) in enumerate(split) if place.owner == ranks.rank}
    likes = [torch.empty(0, dtype=span.dtype, device=device) for _, span, _ in split]
    shards = scatter("from_model", own, places, likes, ranks)() if split else []
    wholes = broadcast("from_model", [s for _, s, _ in common], [owner for *_, owner in common], ranks, device)
    sides: dict[str, dict[int, Tensor]] = {name: {} for name in shardings}
    for i, ((name, _, place), shard) in enumerate(zip(split, shards, strict=True)):
        # The owner has its rows already.
        rows_here = place.part(own[i], ranks.rank) if i in own else shard
        sides[name][shardings[name].dim] = place.sharding.wrap(rows_here, place.shape)
    for (name, _, _), whole in zip(common, wholes, strict=True):
        sides[name][1 - shardings[name].dim] = shardings[name].wrap(whole, tuple(whole.shape), replicate=True)
    return {name: _in_place(layers[name], sides[name]) for name in shardings}


def project_sharded_(pairs: Sequence[tuple[Tensor, LayerSubspace]]) -> None:
    """Project DTensors in place, each on the owner of its layer; collective."""
    shards = [as_shard(matrix) for matrix, _ in pairs]
    places = [place_of("grad", matrix, layer) for matrix, layer in pairs]

    def work(own: list[int], wholes: list[list[Tensor]]) -> list[Tensor]:
        matrices = [whole for (whole,) in wholes]
        project_each_((whole, pairs[i][1]) for i, whole in zip(own, matrices, strict=True))
        return matrices

    for i, shard in round_trip("project_gradients", [[shard] for shard in shards], places, shards, work):
        shards[i].copy_(shard)


def measure_sharded(
    layers: Mapping[str, LayerSubspace],
    parameters: Mapping[str, Tensor],
    sketches: Mapping[str, Tensor],
    start: Mapping[str, Tensor] | None,
) -> dict[str, LayerLeak]:
    """`Subspaces.leak` of DTensors; collective, the same on every rank. `start`: DTensors, or whole on every rank."""
    places = {name: place_of(name, parameters[name], layer) for name, layer in layers.items()}
    ranks = next(iter(places.values())).sharding.ranks
    rows = {name: [parameter] for name, parameter in parameters.items()}
    for name, tensor in (start or {}).items():
        if name in rows and as_shard(tensor) is not tensor:
            if sharding_of(f"start[{name!r}]", tensor) != places[name].sharding:
                raise ValueError(f"start[{name!r}] is sharded in another way than the parameter")
            rows[name].append(tensor)
    leaks: dict[str, LayerLeak] = {}
    for _, wholes in whole_matrices("leak", places, rows):
        found = {}
        for name, (weight, *before) in wholes.items():
            if start is None:
                found[name] = measure_sketched(layers[name], weight, sketches[name], name)
            else:
                found[name] = measure_exact(layers[name], weight, before[0] if before else start[name])
        for other in ranks.share("leak", found):
            leaks |= other
    return {name: leaks[name] for name in layers}


def whole_matrices(
    what: str, places: Mapping[str, Place], rows: Mapping[str, list[Tensor]]
) -> Iterator[tuple[list[str], dict[str, list[Tensor]]]]:
    """A few matrices of every owner at a time: the names of all, and of this rank's own what is in `rows`, whole. The
    next ones are on their way meanwhile."""
    ranks = next(iter(places.values())).sharding.ranks
    rounds = _rounds(places, ranks.size)

    def send(names: list[str]) -> Callable[[], dict[int, Tensor]]:
        shards = [as_shard(tensor.detach()) for name in names for tensor in rows[name]]
        return gather(what, shards, [places[name] for name in names for _ in rows[name]], ranks)

    arriving = send(rounds[0])
    for number, names in enumerate(rounds):
        wholes = iter(whole for _, whole in sorted(arriving().items()))
        if number + 1 < len(rounds):
            arriving = send(rounds[number + 1])
        own = [name for name in names if places[name].owner == ranks.rank]
        yield names, {name: [next(wholes) for _ in rows[name]] for name in own}


def _rounds(places: Mapping[str, Place], size: int) -> list[list[str]]:
    """Names in parts: of each owner's matrices, those of equal shape together, about `CHUNK` elements in each."""
    rounds: list[list[str]] = []
    for rank in range(size):
        own = sorted((name for name, place in places.items() if place.owner == rank), key=lambda n: places[n].shape)
        held, number = 0, 0
        for name in own:
            m, n = places[name].shape
            if held and held + m * n > CHUNK:
                held, number = 0, number + 1
            held += m * n
            rounds += [[] for _ in range(number + 1 - len(rounds))]
            rounds[number].append(name)
    return rounds


def _unshared(remembered: Remembered) -> Remembered:
    own: dict[str, Any] = {name: basis.detach() for name, basis in remembered.tensors().items()}
    return replace(remembered, **own)


def _in_place(layer: LayerSubspace, sides: Mapping[int, Tensor]) -> LayerSubspace:
    left, right = (
        None if side not in sides else Basis(sides[side], "free" if keep else "protected")
        for side, keep in enumerate((layer.keep_left, layer.keep_right))
    )
    return replace(layer, left_basis=left, right_basis=right, owner=None)


def _tensors(layer: LayerSubspace, sketch: Tensor) -> dict[str, Tensor]:
    parts = {"sketch": sketch}
    for side, basis in (("left", layer.left_basis), ("right", layer.right_basis)):
        if basis is not None:
            parts[side] = basis.columns
            if basis.correction is not None:
                parts[f"{side}:correction"] = basis.correction
    return parts


def _with_tensors(layer: LayerSubspace, parts: Mapping[str, Tensor]) -> LayerSubspace:
    left, right = (
        None if basis is None else replace(basis, columns=parts[side], correction=parts.get(f"{side}:correction"))
        for side, basis in (("left", layer.left_basis), ("right", layer.right_basis))
    )
    return replace(layer, left_basis=left, right_basis=right)


def _shape(matrix: Tensor) -> tuple[int, int]:
    m, n = matrix.shape
    return m, n

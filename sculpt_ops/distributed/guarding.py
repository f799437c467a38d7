"""`Subspaces.guard` for sharded parameters: the owner of a matrix keeps its start and puts it back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ..layer import LayerSubspace
from .agreement import Ranks
from .exchange import round_trip
from .layers import place_of, whole_matrices
from .sharding import as_shard

__all__ = ["make_at_owners", "restore_at_owners"]

Bound = Mapping[str, tuple[Tensor, LayerSubspace]]


def make_at_owners(
    bound: Bound, make: Callable[[str, Tensor, LayerSubspace], dict[str, Tensor]]
) -> tuple[dict[str, dict[str, Tensor]], Ranks]:
    """What `make` keeps of every whole weight, where its owner is, and on the meta device elsewhere; collective."""
    places = {name: place_of(name, parameter, layer) for name, (parameter, layer) in bound.items()}
    ranks = next(iter(places.values())).sharding.ranks
    starts: dict[str, dict[str, Tensor]] = {}
    for _, wholes in whole_matrices("guard", places, {name: [p] for name, (p, _) in bound.items()}):

        def keep(wholes: Mapping[str, list[Tensor]] = wholes) -> dict[str, dict[str, Tensor]]:
            own = {name: make(name, weight, bound[name][1]) for name, (weight,) in wholes.items()}
            starts.update(own)
            return {name: {part: t.to("meta") for part, t in start.items()} for name, start in own.items()}

        for found in ranks.together("guard", keep):
            for name in found:
                starts.setdefault(name, found[name])
    return {name: starts[name] for name in bound}, ranks


def restore_at_owners(bound: Bound, restore: Callable[[str, Tensor, LayerSubspace], None]) -> None:
    """Call `restore` with every whole weight where its owner is, and take it back; collective."""
    names = list(bound)
    shards = [as_shard(parameter.detach()) for parameter, _ in bound.values()]
    places = [place_of(name, parameter, layer) for name, (parameter, layer) in bound.items()]

    def work(own: list[int], wholes: list[list[Tensor]]) -> list[Tensor]:
        for i, (weight,) in zip(own, wholes, strict=True):
            restore(names[i], weight, bound[names[i]][1])
        return [weight for (weight,) in wholes]

    for i, shard in round_trip("guard", [[shard] for shard in shards], places, shards, work):
        shards[i].copy_(shard)

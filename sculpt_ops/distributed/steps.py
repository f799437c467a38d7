"""AdamW for sharded parameters whose matrices are worked on by their owners, who keep the moments as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..layer import LayerSubspace, project_each_
from ..optim.options import Options
from ..optim.precision import wide
from ..optim.rows import MOMENTS, Decayed, Row, apply_step, coordinates_of, decayed, make_steps, start_row
from .agreement import collective
from .exchange import Place, gather, round_trip, scatter
from .layers import place_of
from .sharding import as_shard, sharding_of

__all__ = ["collect_gradients", "moments_from_owners", "moments_to_owners", "norm_over_owners", "step_at_owners"]


def step_at_owners(options: Options, group: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """`step_rows` of parameters whose layers have an owner; collective.

    Gradients (and with weight decay weights) go to the owners, which make the steps; every rank adds its part.
    """
    decays = bool(group["weight_decay"])
    sent: list[list[Tensor]] = []
    for row in rows:
        start_row(options, group, row)
        grad = row.parameter.grad
        parts = [] if grad is None else [as_shard(grad)]
        sent.append(parts + ([as_shard(decayed(options, row).read())] if decays else []))
    places = [_place(row) for row in rows]
    likes = [torch.empty(0, dtype=wide(row.parameter.dtype), device=row.parameter.device) for row in rows]

    def work(own: list[int], wholes: list[list[Tensor]]) -> list[Tensor]:
        mine = [rows[i]._replace(layer=_layer(rows[i]).in_full()) for i in own]
        weights = {id(row.parameter): whole.pop() for row, whole in zip(mine, wholes, strict=True)} if decays else {}
        grads = []
        for row, whole in zip(mine, wholes, strict=True):
            fed = [] if row.compressed is None else [row.compressed]
            for grad in whole:
                # As `collect_gradients` leaves what waits.
                fed.append(prepare(options, row, grad))
            total = fed[0] if len(fed) == 1 else fed[0] + fed[1]
            grads.append(total.to(wide(total.dtype)))
        return make_steps(options, group, mine, grads, lambda row: Decayed(weights[id(row.parameter)]))

    for index, shard in round_trip("AdamW.step", sent, places, likes, work):
        row = rows[index]
        if places[index].owner != places[index].sharding.ranks.rank:
            row.state["step"] += 1
        apply_step(options, row, places[index].sharding.wrap(shard, places[index].shape))


def prepare(options: Options, row: Row, grad: Tensor) -> Tensor:
    """A whole gradient as it waits for Adam: projected in its own dtype as on one rank, or in coordinates."""
    if options.in_coordinates:
        return coordinates_of(options, row, grad)
    if options.project != "update":
        project_each_([(grad, _layer(row))])
    return grad


def collect_gradients(options: Options, rows: Sequence[Row]) -> list[Tensor]:
    """Take the gradients of `rows` to their owners and return them as Adam is fed with them, added to what waits there;
    on other ranks tensors on the meta device. Collective."""
    places = [_place(row) for row in rows]
    shards = [as_shard(cast(Tensor, row.parameter.grad)) for row in rows]
    if not rows:
        return []
    found = gather("clip_grad_norm_", shards, places, places[0].sharding.ranks)()
    out = []
    for index, row in enumerate(rows):
        if index in found:
            fed = prepare(options, row, found.pop(index))
            out.append(fed if row.compressed is None else row.compressed.add_(fed))
        else:
            shape, dtype = places[index].shape, shards[index].dtype
            if options.in_coordinates:
                shape, dtype = _layer(row).free_shape, wide(dtype)
            out.append(torch.empty(shape, dtype=dtype, device="meta"))
    return out


def norm_over_owners(held: Sequence[Tensor], parameter: Tensor, norm_type: float) -> Tensor:
    """The norm of tensors of which each is on one rank (on the meta device elsewhere); collective."""
    here = [tensor for tensor in held if not tensor.is_meta]
    own = torch.nn.utils.get_total_norm(here, norm_type) if here else torch.zeros((), device=parameter.device)
    own = own.float()
    ranks = sharding_of("parameter", parameter).ranks
    infinite = norm_type == float("inf")
    total = own if infinite else own**norm_type
    with collective("clip_grad_norm_"):
        reduce = torch.distributed.ReduceOp.MAX if infinite else torch.distributed.ReduceOp.SUM
        torch.distributed.all_reduce(total, reduce, group=ranks.group)
    return total if infinite else total ** (1.0 / norm_type)


def moments_from_owners(
    bound: Mapping[Tensor, LayerSubspace], states: Mapping[Tensor, Mapping[str, Any]], options: Options, names: Any
) -> dict[Tensor, dict[str, Tensor]]:
    """The moments of parameters whose layers have an owner as DTensors, sharded like the parameter; collective."""
    items: list[tuple[Tensor, str, Place]] = []
    for parameter, layer in bound.items():
        if "step" in states.get(parameter, {}):
            shape = layer.free_shape if options.in_coordinates else layer.shape
            place = replace(place_of("state_dict", parameter, layer), shape=shape)
            items += [(parameter, name, place) for name in names(parameter)]
    if not items:
        return {}
    ranks = items[0][2].sharding.ranks
    own = {i: states[p][name] for i, (p, name, place) in enumerate(items) if place.owner == ranks.rank}
    likes = [torch.empty(0, dtype=options.moments_of(p), device=p.device) for p, *_ in items]
    out: dict[Tensor, dict[str, Tensor]] = {}
    shards = scatter("state_dict", own, [place for *_, place in items], likes, ranks)()
    for (parameter, name, place), shard in zip(items, shards, strict=True):
        out.setdefault(parameter, {})[name] = place.sharding.wrap(shard.clone(), place.shape)
    return out


def moments_to_owners(bound: Mapping[Tensor, LayerSubspace], states: Mapping[Tensor, dict[str, Any]]) -> None:
    """Replace moments that are DTensors by whole ones at the owners, and by nothing elsewhere; collective.

    Moments that are whole on every rank, as a checkpoint of one process has them, stay with the owner only.
    """
    items: list[tuple[Tensor, str, Place]] = []
    for parameter, layer in bound.items():
        state = states.get(parameter, {})
        for name in MOMENTS:
            if name in state:
                place = replace(place_of("load_state_dict", parameter, layer), shape=tuple(state[name].shape))
                if isinstance(state[name], DTensor):
                    items.append((parameter, name, place))
                elif place.owner != place.sharding.ranks.rank:
                    del state[name]
    if not items:
        return
    ranks = items[0][2].sharding.ranks
    shards = [as_shard(states[p][name]) for p, name, _ in items]
    found = gather("load_state_dict", shards, [place for *_, place in items], ranks)()
    for index, (parameter, name, _) in enumerate(items):
        if index in found:
            states[parameter][name] = found[index]
        else:
            del states[parameter][name]


def _layer(row: Row) -> LayerSubspace:
    assert row.layer is not None
    return row.layer


def _place(row: Row) -> Place:
    return place_of("AdamW", row.parameter, _layer(row))

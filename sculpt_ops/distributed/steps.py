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
            _name_moments(options, group, row)
        apply_step(options, row, places[index].sharding.wrap(shard, places[index].shape))


def _name_moments(options: Options, group: Mapping[str, Any], row: Row) -> None:
    """On ranks without the moments their names and shapes. torch's flat state dicts have the names from here: without
    them what was loaded differed between the ranks, and the owners' moments were memory that nobody had written."""
    shape = _layer(row).free_shape if options.in_coordinates else _layer(row).shape
    for name in MOMENTS if group["amsgrad"] else MOMENTS[:2]:
        if name not in row.state:
            row.state[name] = torch.empty(shape, dtype=options.moments_of(row.parameter), device="meta")


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
    if norm_type <= 0:
        raise ValueError(f"norm_type must be above 0 for sharded parameters, got {norm_type}")
    here = [tensor for tensor in held if not tensor.is_meta]
    own = torch.nn.utils.get_total_norm(here, norm_type) if here else torch.zeros((), device=parameter.device)
    own = own.double()  # the square of a float32 norm overflows from 1.8e19 on
    ranks = sharding_of("parameter", parameter).ranks
    infinite = norm_type == float("inf")
    total = own if infinite else own**norm_type
    with collective("clip_grad_norm_"):
        reduce = torch.distributed.ReduceOp.MAX if infinite else torch.distributed.ReduceOp.SUM
        torch.distributed.all_reduce(total, reduce, group=ranks.group)
    return (total if infinite else total ** (1.0 / norm_type)).float()


def moments_from_owners(
    bound: Mapping[Tensor, LayerSubspace], states: Mapping[Tensor, Mapping[str, Any]], options: Options
) -> dict[Tensor, dict[str, Tensor]]:
    """The moments of parameters whose layers have an owner as DTensors, sharded like the parameter; collective."""
    items: list[tuple[Tensor, str, Place]] = []
    for parameter, layer in bound.items():
        state = states.get(parameter, {})
        place = place_of("state_dict", parameter, layer)
        items += [(parameter, n, replace(place, shape=tuple(state[n].shape))) for n in MOMENTS if n in state]
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
    """Replace moments that are DTensors by whole ones at the owners, and on the meta device elsewhere; collective.

    Moments that are whole on every rank, as a checkpoint of one process has them, stay with the owner only. ValueError
    on all ranks if what they have differs.
    """
    items: list[tuple[Tensor, str, Place]] = []
    given: list[list[tuple[str, tuple[int, ...], bool]]] = []
    for parameter, layer in bound.items():
        state = states.get(parameter, {})
        place = place_of("load_state_dict", parameter, layer)
        given.append([(n, tuple(state[n].shape), isinstance(state[n], DTensor)) for n in MOMENTS if n in state])
        for name, shape, sharded in given[-1]:
            if sharded:
                items.append((parameter, name, replace(place, shape=cast(tuple[int, int], shape))))
            elif place.owner != place.sharding.ranks.rank:
                state[name] = state[name].to("meta")
    if not given:
        return
    ranks = place.sharding.ranks
    if any(other != given for other in ranks.share("load_state_dict", given)):
        raise ValueError("load_state_dict: the ranks were given different moments, wanted the same on all")
    if not items:
        return
    shards = [as_shard(states[p][name]) for p, name, _ in items]
    found = gather("load_state_dict", shards, [place for *_, place in items], ranks)()
    for index, (parameter, name, _) in enumerate(items):
        state = states[parameter]
        if index in found:
            state[name] = found[index]
        else:
            state[name] = torch.empty(state[name].shape, dtype=state[name].dtype, device="meta")


def _layer(row: Row) -> LayerSubspace:
    assert row.layer is not None
    return row.layer


def _place(row: Row) -> Place:
    return place_of("AdamW", row.parameter, _layer(row))

"""What is done to gradients and states between steps, and what differs between the ranks: as on one rank, or refused by
all of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import sculpt_ops
from sculpt_ops import AdamW, Energy, Importance, Rank, Subspaces
from sculpt_ops.derive import derive_layers
from sculpt_ops.distributed import layers as layers_module

from .models import TARGETS, Stack, backward, batch, sharded, whole
from .ranks import Ranks

SETTINGS = pytest.mark.parametrize(
    "settings",
    [{"state": "full"}, {"state": "subspace"}, {"state": "full", "project": "gradient"}],
    ids=["full", "subspace", "gradient alone"],
)


def made(
    model: nn.Module, settings: dict[str, Any], protect: Any = 0.5, targets: Any = TARGETS
) -> tuple[AdamW, Subspaces]:
    subspaces = Subspaces.from_model(model, protect, targets=targets)
    return AdamW(model.named_parameters(), lr=1e-2, subspaces=subspaces, **settings), subspaces


def far(a: nn.Module, b: nn.Module) -> float:
    """The largest distance of a weight; collective where one is sharded."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((whole(p) - whole(q)).abs().max()) for p, q in pairs)


def moments(optimizer: AdamW) -> dict[tuple[Any, str], Tensor]:
    states = sorted(optimizer.state_dict()["state"].items())
    named = ((index, name, state[name]) for index, state in states for name in sorted(state) if name != "step")
    return {(index, name): whole(value) for index, name, value in named}


def clip_between_passes(settings: dict[str, Any], protect: Any) -> tuple[float, float]:
    models = Stack(), sharded(Stack())
    norms = []
    for model in models:
        optimizer, _ = made(model, settings, protect)
        for step in range(2):
            for part in range(2):
                backward(model, 2 * step + part)
                norms.append(optimizer.clip_grad_norm_(0.5))
            optimizer.step()
            optimizer.zero_grad()
    half = len(norms) // 2
    apart = max(abs(float(a) - float(b)) for a, b in zip(norms[:half], norms[half:], strict=True))
    return far(*models), apart


@SETTINGS
@pytest.mark.parametrize("protect", [0.5, Rank(1)], ids=str)
def test_gradients_added_after_clipping_count(two_ranks: Ranks, settings: dict[str, Any], protect: Any) -> None:
    for weights, norms in two_ranks.run(clip_between_passes, settings, protect):
        assert weights <= 1e-6
        assert norms <= 1e-6


def drop_gradients(settings: dict[str, Any], *, spoiled: bool) -> float:
    """A batch that is clipped and then dropped by the model, as transformers' Trainer does after a skipped step."""
    models = Stack(), sharded(Stack())
    for model, dropped in zip(models, (False, True), strict=True):
        optimizer, _ = made(model, settings)
        if dropped:
            backward(model, 7)
            for parameter in model.parameters():
                parameter.grad.mul_(float("nan") if spoiled else 1e6)  # type: ignore[union-attr]
            optimizer.clip_grad_norm_(1.0)
            model.zero_grad()
            optimizer.step()
        backward(model, 0)
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    return far(*models)


@SETTINGS
@pytest.mark.parametrize("spoiled", [False, True], ids=["large", "nan"])
def test_gradients_that_the_model_drops_are_gone(two_ranks: Ranks, settings: dict[str, Any], spoiled: bool) -> None:
    assert max(two_ranks.run(partial(drop_gradients, settings, spoiled=spoiled))) <= 1e-6


def flat_states(settings: dict[str, Any], dtype: torch.dtype) -> float:
    model = sharded(Stack(dtype))
    optimizer, _ = made(model, settings)
    for step in range(2):
        backward_of(model, step, dtype)
        optimizer.step()
        optimizer.zero_grad()
    before = moments(optimizer)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    set_optimizer_state_dict(model, optimizer, state, options=options)
    after = moments(optimizer)
    assert before.keys() == after.keys()
    return max(float((value - after[key]).abs().max()) for key, value in before.items())


def backward_of(model: nn.Module, step: int, dtype: torch.dtype) -> None:
    inputs, targets = (part.to(dtype) for part in batch(step))
    torch.nn.functional.mse_loss(model(inputs), targets).backward()


@pytest.mark.parametrize("settings", [{"state": "full"}, {"state": "subspace", "amsgrad": True}], ids=str)
def test_flat_state_dicts_are_loaded_as_they_were(ranks: Ranks, settings: dict[str, Any]) -> None:
    """On ranks that had no name of the moments, and so loaded none, the owners' were memory that nobody had written."""
    assert max(ranks.run(flat_states, settings, torch.float32)) == 0.0


def full_states() -> float:
    models = sharded(Stack(torch.bfloat16)), sharded(Stack(torch.bfloat16))
    options = StateDictOptions(full_state_dict=True)
    settings = {"master": "split"}
    first, _ = made(models[0], settings)
    backward_of(models[0], 0, torch.bfloat16)
    first.step()
    first.zero_grad()
    second, _ = made(models[1], settings)
    for target, source in zip(models[1].parameters(), models[0].parameters(), strict=True):
        target.data.copy_(source.data)
    set_optimizer_state_dict(
        models[1], second, get_optimizer_state_dict(models[0], first, options=options), options=options
    )
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    return max(float((whole(first.master_weight(a)) - whole(second.master_weight(b))).abs().max()) for a, b in pairs)


def test_full_state_dicts_hold_the_low_bits(two_ranks: Ranks) -> None:
    assert max(two_ranks.run(full_states)) == 0.0


def change_subspaces(late: bool) -> float:
    models = Stack(), sharded(Stack())
    for model in models:
        subspaces = Subspaces.from_model(model, 0.5, targets=TARGETS)
        first, second = (None, subspaces) if late else (subspaces, None)
        optimizer = AdamW(model.named_parameters(), lr=1e-2, subspaces=first, state="subspace")
        for step, given in enumerate((first, second)):
            if step:
                optimizer.set_subspaces(given)
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
    return far(*models)


@pytest.mark.parametrize("late", [False, True], ids=["taken away", "set later"])
def test_moments_enter_and_leave_coordinates(two_ranks: Ranks, late: bool) -> None:
    assert max(two_ranks.run(change_subspaces, late)) <= 1e-6


def importance_of_replicas() -> tuple[list[int], list[int]]:
    found = []
    for model in (nn.parallel.DistributedDataParallel(Stack()), sharded(Stack())):
        batches = [batch(dist.get_rank())[0]]
        found.append([s.rank for s in Subspaces.from_model(
            model, Importance(0.1, 0.8), targets=TARGETS, batches=batches
        ).values()])  # fmt: skip
    return found[0], found[1]


def test_importance_is_that_of_all_ranks_batches(two_ranks: Ranks) -> None:
    outcomes = two_ranks.run(importance_of_replicas)
    assert len({tuple(ranks) for pair in outcomes for ranks in pair}) == 1


def importance_without_batches() -> None:
    batches = [batch(0)[0]] if dist.get_rank() == 0 else []
    Subspaces.from_model(
        nn.parallel.DistributedDataParallel(Stack()), Importance(0.1, 0.8), targets=TARGETS, batches=batches
    )


def load_what_one_rank_lacks(path: Path, kind: str) -> None:
    model = sharded(Stack())
    _, subspaces = made(model, {}, Rank(1))
    own = path / ("here" if dist.get_rank() == 0 else "nowhere")
    if kind == "subspaces":
        subspaces.save(path / "here")
        Subspaces.load(own, model)
    else:
        other = torch.optim.SGD(model.parameters(), lr=0.1)
        subspaces.guard(other).save(path / "here")
        subspaces.guard(torch.optim.SGD(model.parameters(), lr=0.1), start=own)


def step_with_moments_of_others() -> None:
    model = sharded(Stack())
    first, _ = made(model, {"state": "subspace"}, 0.5, "blocks.3.weight")
    backward(model, 0)
    first.step()
    first.zero_grad()
    second, _ = made(model, {"state": "subspace"}, 0.75, "blocks.3.weight")
    second.load_state_dict(first.state_dict())
    backward(model, 1)
    second.step()


def test_what_one_rank_refuses_all_refuse(two_ranks: Ranks, tmp_path: Path) -> None:
    for raised, message in (
        (two_ranks.errors(importance_without_batches), "batches: empty"),
        (two_ranks.errors(load_what_one_rank_lacks, tmp_path, "subspaces"), "nowhere"),
        (two_ranks.errors(load_what_one_rank_lacks, tmp_path, "guard"), "nowhere"),
        (two_ranks.errors(step_with_moments_of_others), "wanted"),
    ):
        assert all(message in failure.message for failure in raised), raised


def load_beside_a_replicated_parameter(path: Path) -> bool:
    model = nn.ModuleDict({"first": nn.Linear(8, 8), "second": nn.Linear(8, 8)})
    mesh = init_device_mesh("cpu", (2,))
    for name, placement in (("first", Replicate()), ("second", Shard(0))):
        weight = distribute_tensor(model[name].weight.detach(), mesh, [placement])
        model[name].weight = nn.Parameter(weight)
    Subspaces.from_model(model, 0.5, targets="second.weight").save(path / "file")
    return list(Subspaces.load(path / "file", model)) == ["second.weight"]


def test_a_file_is_read_beside_a_replicated_parameter(two_ranks: Ranks, tmp_path: Path) -> None:
    assert all(two_ranks.run(load_beside_a_replicated_parameter, tmp_path))


def derive_with_other_owners() -> bool:
    sizes = {"a": 1024, "b": 1024, "c": 2400}
    model = nn.ModuleDict({name: nn.Linear(1030, rows, bias=False) for name, rows in sizes.items()})
    for part in model.values():
        fully_shard(part)
    before = Subspaces.from_model(model, Rank(8), targets=["a.weight", "b.weight"])
    after = Subspaces.from_model(model, Rank(8), targets=["a.weight", "b.weight", "c.weight"], previous=before)
    return any(before[name].owner != after[name].owner for name in before)


def test_earlier_subspaces_of_other_owners_are_no_start(two_ranks: Ranks) -> None:
    assert all(two_ranks.run(derive_with_other_owners)), "no owner has changed"


def orthonormalize_batches() -> float:
    mesh = init_device_mesh("cpu", (2,))
    found = []
    for entries in (0, 1, 3):
        given = torch.randn(entries, 6, 4, generator=torch.Generator().manual_seed(1))
        out = sculpt_ops.orthonormalize(distribute_tensor(given, mesh, [Shard(0)]))
        found.append((out.full_tensor() - sculpt_ops.orthonormalize(given)).abs().sum())  # type: ignore[attr-defined]
    return float(max(found))


def test_orthonormalize_of_batches_that_not_every_rank_has(two_ranks: Ranks) -> None:
    assert max(two_ranks.run(orthonormalize_batches)) <= 1e-5


def derive_on_unlike_replicas() -> list[Tensor]:
    """Bases here, where the second replica's come out with other signs."""

    def derive(*given: Any) -> Any:
        found, taken = derive_layers(*given)
        for layer in found.values() if dist.get_rank() >= 2 else ():
            for tensor in layer.tensors():
                tensor.neg_()
        return found, taken

    layers_module.derive_layers = derive  # type: ignore[attr-defined]
    try:
        subspaces = Subspaces.from_model(sharded(Stack(), "hybrid"), Energy(0.8), targets=TARGETS)
    finally:
        layers_module.derive_layers = derive_layers  # type: ignore[attr-defined]
    return [t for layer in subspaces.values() for t in layer.tensors() if layer.is_here and not t.is_meta]


def test_replicas_have_the_bases_of_the_first(four_ranks: Ranks) -> None:
    found = four_ranks.run(derive_on_unlike_replicas)
    for first, second in ((found[0], found[2]), (found[1], found[3])):
        assert len(first) == len(second) > 0
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

"""What several ranks save any number of them loads, and training goes on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from sculpt_ops import AdamW, Rank, Subspaces

from .models import (
    Case,
    Stack,
    backward,
    distances,
    optimizer_of,
    protect,
    sharded,
    table,
    take_steps,
    weights_of,
    whole,
)
from .ranks import Ranks

safetensors = pytest.importorskip("safetensors.torch", reason="saving subspaces needs safetensors")

CASES = {
    "full": Case(clip=0.5, passes=True),
    "full, rank 1": Case(Rank(1), optimizer={"amsgrad": True}),
    "full, float16 bases": Case(subspaces={"basis_dtype": torch.float16}, optimizer={"decay_to": "start"}),
    "subspace": Case(optimizer={"state": "subspace"}),
    "subspace, bfloat16 weights": Case(
        0.75,
        dtype=torch.bfloat16,
        optimizer={"state": "subspace", "master": "split", "moment_dtype": torch.bfloat16},
    ),
}
STEPS = 2


def model_of(case: Case, size: int) -> Stack:
    return Stack(case.dtype) if size == 1 else sharded(Stack(case.dtype), case.how)


def save_bases(case: Case, size: int, path: Path) -> None:
    protect(model_of(case, size), case).save(path)


def pass_on_bases(case: Case, size: int, source: Path, path: Path) -> list[str]:
    subspaces = Subspaces.load(source, model_of(case, size))
    subspaces.save(path)
    return table(subspaces)


def contents(path: Path) -> dict[str, Tensor]:
    return safetensors.load_file(path)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["full", "full, rank 1", "full, float16 bases"])
def test_bases_are_the_same_on_any_number_of_ranks(
    name: str, two_ranks: Ranks, four_ranks: Ranks, tmp_path: Path
) -> None:
    case, files = CASES[name], {size: tmp_path / f"{size}.safetensors" for size in (1, 2, 4)}
    save_bases(case, 1, files[1])
    two_ranks.run(save_bases, case, 2, files[2])
    tables = four_ranks.run(pass_on_bases, case, 4, files[2], files[4])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in files.values())
    made, loaded, alone = (contents(files[size]) for size in (2, 4, 1))
    assert made.keys() == loaded.keys() == alone.keys()
    for key, tensor in made.items():
        assert torch.equal(tensor, loaded[key]), key
        assert tensor.shape == alone[key].shape
    back = tmp_path / "back.safetensors"
    tables.append(pass_on_bases(case, 1, files[4], back))
    tables += two_ranks.run(pass_on_bases, case, 2, files[1], files[2])
    assert all(lines == tables[0] for lines in tables)
    assert all(torch.equal(tensor, made[key]) for key, tensor in contents(back).items())
    assert all(torch.equal(tensor, alone[key]) for key, tensor in contents(files[2]).items())


def parts(model: Stack, optimizer: AdamW) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def begin(case: Case, size: int, folder: Path) -> dict[str, Tensor]:
    """Train and save; returns the weights of a run that goes on."""
    model = model_of(case, size)
    subspaces = protect(model, case)
    optimizer = optimizer_of(model, subspaces, case)
    take_steps(model, optimizer, case, range(STEPS))
    subspaces.save(folder / "subspaces.safetensors")
    dcp.save(parts(model, optimizer), checkpoint_id=folder / "state")
    take_steps(model, optimizer, case, range(STEPS, 2 * STEPS))
    return weights_of(model, optimizer)


def go_on(case: Case, size: int, folder: Path) -> dict[str, Tensor]:
    """Load and train the second half."""
    model = model_of(case, size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    subspaces = Subspaces.load(folder / "subspaces.safetensors", model)
    optimizer = optimizer_of(model, subspaces, case)
    state = parts(model, optimizer)
    dcp.load(state, checkpoint_id=folder / "state")
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    take_steps(model, optimizer, case, range(STEPS, 2 * STEPS))
    return weights_of(model, optimizer)


def on(size: int, pools: dict[int, Ranks], function: Any, *arguments: Any) -> dict[str, Tensor]:
    result = function(*arguments) if size == 1 else pools[size].run(function, *arguments)[0]
    return result  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CASES)
def test_a_run_goes_on_with_another_number_of_ranks(
    name: str, two_ranks: Ranks, four_ranks: Ranks, tmp_path: Path
) -> None:
    case, pools = CASES[name], {2: two_ranks, 4: four_ranks}
    runs: dict[int, tuple[int, ...]] = {2: (4, 2), 4: (2, 1), 1: (2,)} if name == "full" else {2: (4,), 4: (1,)}
    for first, others in runs.items():
        folder = tmp_path / str(first)
        folder.mkdir()
        wanted = on(first, pools, begin, case, first, folder)
        for size in others:
            away = distances(on(size, pools, go_on, case, size, folder), wanted)
            assert max(away.values()) < 1e-6, (first, size, away)


def state_dict_round_trip(case: Case, folder: Path) -> dict[str, float]:
    """`state_dict` and `load_state_dict` alone, the way a checkpoint is written without the helpers."""
    model, other = sharded(Stack(case.dtype)), sharded(Stack(case.dtype))
    subspaces = protect(model, case)
    optimizer = optimizer_of(model, subspaces, case)
    take_steps(model, optimizer, case, range(STEPS))
    subspaces.save(folder / "subspaces.safetensors")
    dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=folder / "state")
    resumed = optimizer_of(other, Subspaces.load(folder / "subspaces.safetensors", other), case)
    take_steps(other, resumed, case, range(1))
    other.load_state_dict(model.state_dict())
    state = {"optimizer": resumed.state_dict()}
    dcp.load(state, checkpoint_id=folder / "state")
    resumed.load_state_dict(state["optimizer"])
    for one, its in ((model, optimizer), (other, resumed)):
        take_steps(one, its, case, range(STEPS, 2 * STEPS))
    return distances(weights_of(other, resumed), weights_of(model, optimizer))


@pytest.mark.parametrize("name", ["full", "subspace"])
def test_state_dicts_hold_what_training_needs(name: str, two_ranks: Ranks, tmp_path: Path) -> None:
    for away in two_ranks.run(state_dict_round_trip, CASES[name], tmp_path):
        assert not any(away.values()), away


def guard_with(case: Case, size: int, folder: Path, file: str | None) -> tuple[list[str], dict[str, Tensor]]:
    """Train under a guard, one of before if `file` is given; what it refuses, and the weights."""
    model, refused = model_of(case, size), []
    subspaces = Subspaces.load(folder / "subspaces.safetensors", model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    if file is None:
        guard = subspaces.guard(optimizer)
        guard.save(folder / f"{size}.safetensors")
    else:
        guard = subspaces.guard(optimizer, start=folder / file)
        other = protect(model, Case(0.25))
        try:
            other.guard(optimizer, start=folder / file)
        except ValueError as error:
            refused.append(str(error))
    for step in range(STEPS):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    guard.remove()
    return refused, {name: whole(parameter) for name, parameter in model.named_parameters()}


def test_a_guard_goes_on_with_another_number_of_ranks(two_ranks: Ranks, four_ranks: Ranks, tmp_path: Path) -> None:
    case = CASES["full"]
    save_bases(case, 1, tmp_path / "subspaces.safetensors")
    wanted = guard_with(case, 1, tmp_path, None)[1]
    four_ranks.run(guard_with, case, 4, tmp_path, None)
    alone, shared = (contents(tmp_path / f"{size}.safetensors") for size in (1, 4))
    assert alone.keys() == shared.keys()
    assert all(torch.equal(tensor, shared[key]) for key, tensor in alone.items())
    results = [*two_ranks.run(guard_with, case, 2, tmp_path, "4.safetensors")]
    results.append(guard_with(case, 1, tmp_path, "4.safetensors"))
    for refused, weights in results:
        assert refused == results[0][0]
        assert "of the start of blocks.0.weight it has" in refused[0]
        assert max(distances(weights, wanted).values()) < 1e-6

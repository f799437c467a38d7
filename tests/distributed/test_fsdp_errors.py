"""What goes wrong on one rank ends on all of them, with the same message or with one that says who is missing."""

from __future__ import annotations

import datetime
import os
import re
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from sculpt_ops import Remember, Subspaces, fuse_into_backward

from .models import Case, Stack, backward, batch, optimizer_of, protect, sharded
from .ranks import Failure, Ranks


def not_finite() -> None:
    model = sharded(Stack())
    if dist.get_rank() == 1:
        weight = model.blocks[3].weight
        assert isinstance(weight, DTensor)
        with torch.no_grad():
            weight.to_local()[0, 0] = float("nan")
    protect(model, Case())


def unreduced() -> None:
    model = Stack()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model.head.weight = nn.Parameter(DTensor.from_local(model.head.weight.detach(), mesh, [Partial()]))
    Subspaces.from_model(model, targets="head.weight")


def on_two_meshes() -> None:
    model = Stack()
    size = dist.get_world_size()
    for part, shape, placements in (
        (model.blocks[0], (size,), [Shard(0)]),
        (model.blocks[1], (1, size), [Replicate(), Shard(0)]),
    ):
        mesh = init_device_mesh("cpu", shape)
        part.weight = nn.Parameter(distribute_tensor(part.weight.detach(), mesh, placements))
    Subspaces.from_model(model, targets=["blocks.0.weight", "blocks.1.weight"])


def partly_gathered() -> None:
    model = sharded(Stack())
    with torch.no_grad():
        model(batch(0)[0])
    protect(model, Case())


def gathered() -> None:
    model = fully_shard(Stack())
    with torch.no_grad():
        model(batch(0)[0])
    protect(model, Case())


def stepped_under_ddp() -> None:
    model = nn.parallel.DistributedDataParallel(Stack())
    fuse_into_backward(model, optimizer_of(model, None, Case()))


def remembering() -> None:
    Subspaces.from_model(sharded(Stack()), 0.5, targets="blocks.*.weight", remember=Remember(2))


def with_bases_of_another_model() -> None:
    subspaces = protect(Stack(), Case())
    optimizer_of(sharded(Stack()), subspaces, Case())


MISTAKES = {
    not_finite: ("_LinAlgError", r"blocks\.3\.weight"),
    unreduced: ("ValueError", r"head\.weight has the placements .*Partial"),
    on_two_meshes: ("ValueError", r"blocks\.1\.weight is sharded over .* blocks\.0\.weight over"),
    partly_gathered: ("ValueError", r"head\.weight: not sharded.*reshard\(\)"),
    gathered: ("ValueError", r"not sharded.*reshard\(\)"),
    remembering: ("ValueError", r"remember: Remember: given with a sharded model"),
    with_bases_of_another_model: ("ValueError", r"blocks\.0\.weight .*bind\(model\)"),
    stepped_under_ddp: ("(ValueError|TypeError|RuntimeError)", r"DistributedDataParallel"),
}


def raised(mistake: Callable[[], Any]) -> tuple[str, str]:
    try:
        mistake()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", "nothing was raised"


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_wrong_use_is_one_error_on_every_rank(four_ranks: Ranks, mistake: Callable[[], None]) -> None:
    kind, message = MISTAKES[mistake]
    results = four_ranks.run(raised, mistake)
    for result in results:
        assert re.fullmatch(kind, result[0]), result
        assert re.search(message, result[1], re.DOTALL), result
        assert result == results[0]


def lose_a_rank() -> None:
    model = sharded(Stack())
    optimizer = optimizer_of(model, protect(model, Case()), Case())
    if dist.get_rank() == 1:
        optimizer.register_step_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    backward(model, 0)
    dist.barrier()
    # Ranks that wait for one that waits for the dead one have nothing but this to go by.
    _set_pg_timeout(datetime.timedelta(seconds=3), None)
    optimizer.step()


def test_a_rank_that_dies_in_a_step_ends_the_others(four_ranks: Ranks) -> None:
    results = four_ranks.attempt(lose_a_rank, timeout=60)
    assert all(isinstance(result, Failure) for result in results)
    assert "died with exit code -9" in results.pop(1).message
    for failure in results:
        assert failure.kind == "RuntimeError"
        assert "a rank died, or did not come within the timeout" in failure.message


def misses() -> dict[str, tuple[str, str]]:
    """The last rank comes to everything but one call after the other; what that raised on the others."""
    away = dist.get_rank() == dist.get_world_size() - 1
    found = {}
    for missed in ("from_model", "step", "leak", "clip_grad_norm_"):
        group = dist.new_group()
        # Named, since DTensor takes meshes of the same ranks and names for one, whatever their groups.
        model = sharded(Stack(), mesh=DeviceMesh.from_group(group, "cpu", mesh_dim_names=(missed,)))
        calls: dict[str, Callable[[], Any]] = {"from_model": partial(protect, model, Case())}
        if missed != "from_model":
            subspaces = protect(model, Case())
            optimizer = optimizer_of(model, subspaces, Case())
            backward(model, 0)
            calls |= {"step": optimizer.step, "leak": subspaces.leak}
            calls["clip_grad_norm_"] = partial(optimizer.clip_grad_norm_, 1.0)
        # Only now: on a busy machine ranks are seconds apart until here.
        dist.barrier()
        _set_pg_timeout(datetime.timedelta(seconds=1), group)
        if not away:
            found[missed] = raised(calls[missed])
        dist.barrier()
    return found


def test_a_rank_that_does_not_come_is_not_waited_for_forever(two_ranks: Ranks) -> None:
    found, _ = two_ranks.run(misses)
    for missed, (kind, message) in found.items():
        assert kind == "RuntimeError", (missed, message)
        assert re.match({"step": "(AdamW.step|foreach_project_):"}.get(missed, f"{missed}:"), message), (
            missed,
            message,
        )

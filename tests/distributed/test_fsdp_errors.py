"""What goes wrong on one rank ends on all of them, with the same message or with one that says who is missing."""

from __future__ import annotations

import datetime
import os
import re
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from sculpt_ops import Subspaces, fuse_into_backward

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
    partial = DTensor.from_local(model.head.weight.detach(), mesh, [Partial()])
    model.head.weight = nn.Parameter(partial)
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


MISTAKES = {
    not_finite: ("_LinAlgError", r"blocks\.3\.weight"),
    unreduced: ("ValueError", r"head\.weight has the placements .*Partial"),
    on_two_meshes: ("ValueError", r"blocks\.1\.weight is sharded over .* blocks\.0\.weight over"),
    partly_gathered: ("ValueError", r"head\.weight: not sharded.*reshard\(\)"),
    gathered: ("ValueError", r"not sharded.*reshard\(\)"),
    stepped_under_ddp: ("(ValueError|TypeError|RuntimeError)", r"DistributedDataParallel"),
}


def raised(mistake: Callable[[], None]) -> tuple[str, str]:
    try:
        mistake()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", "nothing was raised"


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_wrong_use_is_one_error_on_every_rank(ranks: Ranks, mistake: Callable[[], None]) -> None:
    kind, message = MISTAKES[mistake]
    results = ranks.run(raised, mistake)
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
    optimizer.step()


def test_a_rank_that_dies_in_a_step_ends_the_others(ranks: Ranks) -> None:
    results = ranks.attempt(lose_a_rank, timeout=60)
    assert all(isinstance(result, Failure) for result in results)
    assert "died with exit code -9" in results.pop(1).message
    for failure in results:
        assert failure.kind == "RuntimeError"
        assert "a rank died, or did not come within the timeout" in failure.message


def miss(call: str) -> None:
    """The last rank comes to everything but `call`."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    model = sharded(Stack(), mesh=DeviceMesh.from_group(group, "cpu"))
    away = dist.get_rank() == dist.get_world_size() - 1
    if call != "from_model":
        subspaces = protect(model, Case())
        optimizer = optimizer_of(model, subspaces, Case())
        backward(model, 0)
    calls: dict[str, Callable[[], Any]] = {
        "from_model": lambda: protect(model, Case()),
        "step": lambda: optimizer.step(),
        "leak": lambda: subspaces.leak(),
        "clip_grad_norm_": lambda: optimizer.clip_grad_norm_(1.0),
    }
    if not away:
        calls[call]()
    time.sleep(4)


@pytest.mark.parametrize("missed", ["from_model", "step", "leak", "clip_grad_norm_"])
def test_a_rank_that_does_not_come_is_not_waited_for_forever(two_ranks: Ranks, missed: str) -> None:
    first, _ = two_ranks.attempt(miss, missed, timeout=60)
    assert isinstance(first, Failure)
    assert first.kind == "RuntimeError"
    assert re.match({"step": "(step|foreach_project_):"}.get(missed, f"{missed}:"), first.message), first.message
    assert "a rank died, or did not come within the timeout" in first.message

"""Training on the device that SCULPT_TEST_DEVICE names: guards, steps in the backward pass, compressed gradients,
remembered inputs, a sharded model on one rank. On the CPU the other tests ask for the same and more."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sculpt_ops import AdamW, RememberInputs, Subspaces, fuse_into_backward

NAME = os.environ.get("SCULPT_TEST_DEVICE", "")
pytestmark = pytest.mark.skipif(not NAME, reason="SCULPT_TEST_DEVICE names no device")
DEVICE = torch.device(NAME or "cpu")
STEPS = 4


def small_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(96, 160, bias=False), nn.GELU(), nn.Linear(160, 64, bias=False)
    return nn.Sequential(*layers).to(DEVICE, dtype)


def batches(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(32, 96, generator=torch.Generator().manual_seed(i)).to(DEVICE, dtype) for i in range(STEPS)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, after: Callable[[], None] = lambda: None) -> None:
    for batch in batches(next(model.parameters()).dtype):
        model(batch).float().square().mean().backward()
        after()
        optimizer.step()
        optimizer.zero_grad()


def start_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_learned_outside(model: nn.Module, subspaces: Subspaces, start: dict[str, Tensor], roundings: float) -> None:
    """The weights have moved, and in the protected space by so many of their roundings, and of the change's."""
    for name, leak in subspaces.leak(start).items():
        eps = torch.finfo(start[name].dtype).eps
        assert leak.change > 1e-3 * float(start[name].float().norm())
        assert leak.total_norm <= roundings * eps * float(start[name].float().norm()) + 1e-5 * leak.change


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("protect", [0.25, 0.75])
def test_a_guard_of_any_optimizer(dtype: torch.dtype, protect: float) -> None:
    model = small_model(dtype)
    subspaces = Subspaces.from_model(model, protect, targets="*")
    start = start_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    guard = subspaces.guard(optimizer)
    train(model, optimizer)
    assert_learned_outside(model, subspaces, start, 1.0)
    guard.remove()


@pytest.mark.parametrize("state", ["full", "subspace"])
def test_steps_in_the_backward_pass_are_those_after_it(state: str) -> None:
    stepped = []
    for fused in (False, True):
        model = small_model()
        subspaces = Subspaces.from_model(model, 0.5, targets="*")
        optimizer = AdamW(model.named_parameters(), lr=1e-2, subspaces=subspaces, state=state)  # type: ignore[arg-type]
        if fused:
            fuse_into_backward(model, optimizer)
        train(model, optimizer)
        stepped.append(start_of(model))
    for name, weight in stepped[0].items():
        torch.testing.assert_close(stepped[1][name], weight, rtol=0, atol=1e-6)


def test_compressed_and_clipped_gradients() -> None:
    """By clipping to a norm that none reaches and compressing between two halves nothing changes but the order."""
    stepped = []
    for compressed in (False, True):
        model = small_model()
        subspaces = Subspaces.from_model(model, 0.5, targets="*")
        optimizer = AdamW(model.named_parameters(), lr=1e-2, subspaces=subspaces, state="subspace")
        start = start_of(model)

        def after(optimizer: AdamW = optimizer, compressed: bool = compressed) -> None:
            if compressed:
                optimizer.compress_gradients()
            assert float(optimizer.clip_grad_norm_(1e6)) > 0

        train(model, optimizer, after)
        assert_learned_outside(model, subspaces, start, 8.0)
        stepped.append(start_of(model))
    for name, weight in stepped[0].items():
        torch.testing.assert_close(stepped[1][name], weight, rtol=0, atol=1e-5)


def test_remembered_inputs_keep_their_outputs() -> None:
    """What the first layer was fed in the first task it answers as before after the second."""
    model = small_model()
    mixing = torch.randn(96, 24, device=DEVICE) @ torch.randn(24, 96, device=DEVICE)
    first = [batch @ mixing for batch in batches()]
    remember = RememberInputs(0.9999)
    subspaces = Subspaces.from_model(model, 0.0, targets=["0.weight"], sides="right", remember=remember)
    subspaces = Subspaces.from_model(
        model, 0.0, targets=["0.weight"], sides="right", remember=remember, previous=subspaces.carry(), batches=first
    )
    assert subspaces["0.weight"].protected_dims[1] == 24
    with torch.no_grad():
        before = model[0](first[0])
    train(model, AdamW(model.named_parameters(), lr=1e-2, subspaces=subspaces))
    with torch.no_grad():
        change = (model[0](first[0]) - before).norm() / before.norm()
        assert (model[0](batches()[0]) - small_model()[0](batches()[0])).norm() > 1e-2
    assert change < 1e-3


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("state", ["full", "subspace"])
def test_a_sharded_model_of_one_rank_is_trained_as_a_whole_one(one_rank: None, state: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(DEVICE.type, (1,))
    stepped = []
    for sharded in (False, True):
        model = small_model()
        if sharded:
            fully_shard(model, mesh=mesh)
        subspaces = Subspaces.from_model(model, 0.5, targets="*")
        optimizer = AdamW(model.named_parameters(), lr=1e-2, subspaces=subspaces, state=state)  # type: ignore[arg-type]
        train(model, optimizer)
        stepped.append([getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in model.parameters()])
    for whole, part in zip(*stepped, strict=True):
        torch.testing.assert_close(part, whole, rtol=0, atol=2e-6)

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sculpt_ops.optim import AdamW
from sculpt_ops.subspaces import Subspaces

from .training import SHAPES, STEPS, Shapes, assert_kept, assert_same_weights, copied, gradients, start_of, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.0},
        {"amsgrad": True, "maximize": True},
        {"lr": torch.tensor(3e-3), "betas": (0.8, 0.95), "eps": 1e-4},
        {"foreach": True},
        {"foreach": False},
        {"fused": True},
    ],
)
def test_without_subspaces_it_is_torch_adamw(options: dict[str, Any]) -> None:
    ours, theirs = Shapes(), Shapes()
    optimizers = []
    for cls, model in ((AdamW, ours), (torch.optim.AdamW, theirs)):
        groups = [{"params": [model.square, model.wide]}, {"params": [model.tall, model.bias], "weight_decay": 0.3}]
        optimizers.append(cls(groups, **options))
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        train(model, optimizer, 10)
    assert_same_weights(ours, theirs)
    assert optimizers[0].state_dict()["param_groups"] == optimizers[1].state_dict()["param_groups"]


def test_differentiable_step_without_subspaces() -> None:
    slopes = []
    for cls in (AdamW, torch.optim.AdamW):
        weight, grad = torch.ones(3, requires_grad=True), torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
        parameter = weight * 2
        optimizer = cls([parameter], 1e-2, eps=0.5, differentiable=True)
        parameter.grad = grad * 1
        optimizer.step()
        parameter.sum().backward()
        slopes.append((weight.grad, grad.grad))
    for ours, theirs in zip(*slopes, strict=True):
        assert ours is not None
        assert torch.equal(ours, theirs)
        assert ours.norm() > 0


def test_parameters_without_a_basis_get_torch_adamw() -> None:
    ours, theirs = Shapes(), Shapes()
    subspaces = Subspaces.from_model(ours, 0.5, targets="square")
    train(ours, AdamW(ours.parameters(), 1e-2, subspaces=subspaces), 10)
    train(theirs, torch.optim.AdamW(theirs.parameters(), 1e-2), 10)
    for name in ("wide", "tall", "bias"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert not torch.allclose(ours.square, theirs.square, atol=1e-3)


def test_rank_0_is_torch_adamw() -> None:
    ours, theirs = Shapes(), Shapes()
    subspaces = Subspaces.from_model(ours, 0.0, targets=list(SHAPES))
    train(ours, AdamW(ours.parameters(), subspaces=subspaces), 10)
    train(theirs, torch.optim.AdamW(theirs.parameters()), 10)
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize(("source", "target"), [(AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW)])
def test_state_dict_goes_either_way(
    source: type[torch.optim.AdamW], target: type[torch.optim.AdamW], tmp_path: Path
) -> None:
    first = Shapes()
    before = source(first.parameters(), 1e-2, amsgrad=True)
    train(first, before, 5)
    torch.save(before.state_dict(), tmp_path / "optimizer.pt")
    second = Shapes()
    second.load_state_dict(first.state_dict())
    after = target(second.parameters())
    after.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for optimizer, model in ((before, first), (after, second)):
        train(model, optimizer, 5)
    assert_same_weights(first, second)
    assert after.param_groups[0]["lr"] == 1e-2


def test_resume_with_subspaces(tmp_path: Path) -> None:
    """Twice 5 steps with everything saved and loaded in between is 10 steps."""
    straight, first = Shapes(), Shapes()
    train(straight, AdamW(straight.parameters(), subspaces=Subspaces.from_model(straight, targets=list(SHAPES))), 5)
    subspaces = Subspaces.from_model(first, targets=list(SHAPES))
    optimizer = AdamW(first.named_parameters(), subspaces=subspaces)
    train(first, optimizer, 5)
    subspaces.save(tmp_path / "subspaces.safetensors")
    second = Shapes()
    second.load_state_dict(first.state_dict())
    resumed = AdamW(second.named_parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    loaded = Subspaces.load(tmp_path / "subspaces.safetensors")
    resumed.set_subspaces(loaded)
    for model, opt in ((first, optimizer), (second, resumed)):
        train(model, opt, 5)
    assert_same_weights(first, second)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_stay_protected(how: str) -> None:
    model = Shapes()
    subspaces = Subspaces.from_model(model, 0.5, targets=list(SHAPES))
    optimizer = AdamW(model.parameters(), 1e-2, subspaces=subspaces)
    train(model, optimizer, 2)
    model, optimizer = copied((model, optimizer), how)
    assert optimizer.param_groups[0]["params"][0] is model.square
    start = start_of(model)
    train(model, optimizer)
    assert_kept(subspaces.bind(model), start)


def test_parameters_without_a_gradient_stay() -> None:
    model = Shapes()
    optimizer = AdamW(model.parameters(), weight_decay=0.5, subspaces=Subspaces.from_model(model, targets=list(SHAPES)))
    start = start_of(model)
    model.square.grad = torch.randn(32, 32)
    optimizer.step()
    assert not torch.equal(model.square, start["square"])
    assert torch.equal(model.tall, start["tall"])
    assert model.tall not in optimizer.state


def test_closure_is_called_with_gradients_enabled() -> None:
    model = nn.Linear(6, 6)
    optimizer = AdamW(model.parameters(), subspaces=Subspaces.from_model(model, targets="weight"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 6)).square().sum()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(3)]
    assert losses[2] < losses[0]


def test_sparse_gradient_is_refused_before_anything_changes() -> None:
    model = Shapes()
    optimizer = AdamW(model.parameters(), subspaces=Subspaces.from_model(model, targets="square"))
    start = start_of(model)
    model.square.grad = grad = torch.randn(32, 32)
    before = grad.clone()
    model.tall.grad = torch.randn(56, 24).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    assert torch.equal(grad, before)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name])


def test_step_hooks_run_once() -> None:
    torch.optim.AdamW([nn.Parameter(torch.zeros(2))])  # patches torch's class, which must not wrap ours again
    model = Shapes()
    optimizer = AdamW(model.parameters(), subspaces=Subspaces.from_model(model, targets="square"))
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    train(model, optimizer, 2)
    assert len(calls) == 2


def test_learning_rate_schedule_and_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = Shapes()
    subspaces = Subspaces.from_model(model, 0.5, targets=list(SHAPES))
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = AdamW(model.parameters(), 1e-2, weight_decay=0.1, subspaces=subspaces)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=STEPS)
    prepared, schedule = accelerator.prepare(optimizer, schedule)
    start = start_of(model)
    for _ in gradients(model, STEPS):
        prepared.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.0
    assert_kept(subspaces, start)
    subspaces.guard(prepared)

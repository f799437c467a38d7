"""Steps in the backward pass give what `step()` after it gives, to the bit, without all gradients at once."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sculpt_ops import AdamW, Subspaces, fuse_into_backward

from .training import assert_same_weights

pytestmark = pytest.mark.usefixtures("one_thread")

TARGETS = ["first.weight", "second.weight", "third.weight"]


class Net(nn.Module):
    """Three matrices, one of them used twice, and a tied pair; the middle recomputed if `recompute`."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(24, 40), nn.Linear(40, 40), nn.Linear(40, 24)
        self.table = nn.Embedding(11, 24)
        self.head = nn.Linear(24, 11, bias=False)
        self.head.weight = self.table.weight
        self.recompute = recompute

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.table(tokens)))
        x = checkpoint(self._middle, x, use_reentrant=False) if self.recompute else self._middle(x)
        return nn.functional.cross_entropy(self.head(self.third(x)).flatten(0, -2), tokens.flatten())

    def _middle(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.second(x))))


def tokens(step: int) -> Tensor:
    return torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(step))


def prepared(state: str, recompute: bool = False, **options: Any) -> tuple[Net, AdamW, Subspaces]:
    model = Net(recompute)
    subspaces = Subspaces.from_model(model, 0.4, targets=TARGETS)
    return model, AdamW(model.named_parameters(), 1e-2, subspaces=subspaces, state=state, **options), subspaces  # type: ignore[arg-type]


@pytest.mark.parametrize("state", ["full", "subspace"])
@pytest.mark.parametrize("recompute", [False, True])
def test_same_as_a_step_after_the_backward_pass(state: str, recompute: bool) -> None:
    (usual, usual_optimizer, _), (fused, fused_optimizer, subspaces) = (prepared(state, recompute) for _ in range(2))
    start = {name: p.detach().clone() for name, p in fused.named_parameters()}
    fuse_into_backward(fused, fused_optimizer)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (usual_optimizer, fused_optimizer)]
    for step in range(5):
        for model, optimizer in ((usual, usual_optimizer), (fused, fused_optimizer)):
            model(tokens(step)).backward()
            assert (model is usual) == any(p.grad is not None for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        for schedule in schedules:
            schedule.step()
    assert_same_weights(usual, fused)
    assert max(leak.total for leak in subspaces.leak(start).values()) < 1e-5


def test_gradients_of_all_parameters_are_never_there_together() -> None:
    alive = {}
    for fuse in (False, True):
        model, optimizer, _ = prepared("subspace")
        if fuse:
            fuse_into_backward(model, optimizer)
        counts: list[int] = []

        def count(_: Tensor, model: nn.Module = model, counts: list[int] = counts) -> None:
            counts.append(sum(p.grad is not None for p in model.parameters()))

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(count)
        model(tokens(0)).backward()
        alive[fuse] = max(counts)
    assert alive == {False: 7, True: 0}


@pytest.mark.parametrize("passes", [4, 5])
def test_accumulation_waits_in_free_coordinates(passes: int) -> None:
    """Two passes a step; an odd one at the end is stepped by `step()`."""
    (usual, usual_optimizer, _), (fused, fused_optimizer, _) = (prepared("subspace") for _ in range(2))
    fuse_into_backward(fused, fused_optimizer, accumulation_steps=2)
    for step in range(passes):
        for model in (usual, fused):
            model(tokens(step)).backward()
        for linear in (fused.first, fused.second, fused.third):
            assert linear.weight.grad is None
        if step % 2 or step == passes - 1:
            usual_optimizer.step()
            usual_optimizer.zero_grad()
            fused_optimizer.step()
        else:
            usual_optimizer.compress_gradients()
    assert_same_weights(usual, fused)


def test_remove_goes_back_to_steps_after_the_backward_pass() -> None:
    model, optimizer, _ = prepared("full")
    fuse_into_backward(model, optimizer).remove()
    before = model.first.weight.detach().clone()
    model(tokens(0)).backward()
    assert torch.equal(model.first.weight, before)
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    assert not torch.equal(model.first.weight, before)
    optimizer.zero_grad()
    fuse_into_backward(model, optimizer)


def test_what_cannot_be_done_is_refused() -> None:
    model, optimizer, _ = prepared("full")
    with pytest.raises(TypeError, match=r"must be a sculpt_ops.AdamW or wrap one, got SGD"):
        fuse_into_backward(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match="accumulation_steps must be 1 or more, got 0"):
        fuse_into_backward(model, optimizer, accumulation_steps=0)
    with pytest.raises(ValueError, match="accumulation_steps must be 1 with state='full'"):
        fuse_into_backward(model, optimizer, accumulation_steps=2)
    with pytest.raises(ValueError, match="holds no parameter of the model"):
        fuse_into_backward(nn.Linear(2, 2), optimizer)
    model(tokens(0)).backward()
    with pytest.raises(RuntimeError, match="gradients are there already"):
        fuse_into_backward(model, optimizer)
    optimizer.zero_grad()
    fuse_into_backward(model, optimizer)
    with pytest.raises(RuntimeError, match="already; remove"):
        fuse_into_backward(model, optimizer)
    with pytest.raises(RuntimeError, match="norm is not known"):
        optimizer.clip_grad_norm_(1.0)


@pytest.mark.parametrize("unscale", [False, True])
def test_a_gradient_scaler_is_refused(unscale: bool) -> None:
    model, optimizer, _ = prepared("full")
    fuse_into_backward(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(tokens(0))).backward()
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="cannot be combined with GradScaler"):
        scaler.step(optimizer)


def test_guard_puts_back_after_the_step() -> None:
    model, optimizer, subspaces = prepared("full", project="gradient")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    fuse_into_backward(model, optimizer)
    subspaces.guard(optimizer)
    for step in range(5):
        model(tokens(step)).backward()
        optimizer.step()
    assert max(leak.total for leak in subspaces.leak(start).values()) < 1e-5

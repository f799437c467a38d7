"""What training loops do besides backward and step: drop gradients, load in another order, step under autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sculpt_ops import AdamW, RememberInputs, Subspaces, fuse_into_backward

from .training import SHAPES, Shapes, assert_same_weights, feed, recorded, train

pytestmark = pytest.mark.usefixtures("one_thread")

STATES = pytest.mark.parametrize("state", ["full", "subspace"])


def made(model: Shapes, protect: float = 0.5, **options: Any) -> AdamW:
    subspaces = Subspaces.from_model(model, protect, targets=list(SHAPES))
    return AdamW(model.named_parameters(), lr=1e-2, subspaces=subspaces, **options)


@STATES
@pytest.mark.parametrize("factor", [1e6, float("nan")])
def test_gradients_that_the_model_drops_are_gone(state: str, factor: float) -> None:
    """As transformers' Trainer drops those of a step that a GradScaler has skipped."""
    models = Shapes(), Shapes()
    large, small = recorded(models[0], 2)
    for model, dropped in zip(models, (False, True), strict=True):
        optimizer = made(model, state=state)
        if dropped:
            feed(model, [factor * grad for grad in large])
            optimizer.clip_grad_norm_(1.0)
            model.zero_grad()
            optimizer.step()
            assert_same_weights(model, Shapes())
        feed(model, small)
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    assert_same_weights(*models)


def test_gradients_added_after_clipping_count() -> None:
    """Both states clip the same sums."""
    models, norms = (Shapes(), Shapes()), []
    grads = recorded(models[0], 4)
    for model, state in zip(models, ("full", "subspace"), strict=True):
        optimizer = made(model, state=state)
        model.zero_grad()
        for first, second in zip(grads[::2], grads[1::2], strict=True):
            for grad in (first, second):
                parts = zip(model.parameters(), grad, strict=True)
                torch.stack([(parameter * part).sum() for parameter, part in parts]).sum().backward()
                norms.append(optimizer.clip_grad_norm_(1.0))
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(torch.stack(norms[:4]), torch.stack(norms[4:]))


def test_compressed_gradients_wait_whatever_the_model_drops() -> None:
    models = Shapes(), Shapes()
    for model in models:
        optimizer = made(model, state="subspace")
        for grads in recorded(model, 2):
            feed(model, grads)
            if model is models[0]:
                optimizer.compress_gradients()
                model.zero_grad()
        if model is models[1]:
            sums = [a + b for a, b in zip(*recorded(model, 2), strict=True)]
            feed(model, sums)
        optimizer.step()
    for name in SHAPES:
        torch.testing.assert_close(models[0].get_parameter(name), models[1].get_parameter(name))


@STATES
def test_stepping_under_autocast_keeps_the_promise(state: str) -> None:
    model = Shapes()
    subspaces = Subspaces.from_model(model, 0.75, targets=list(SHAPES))
    optimizer = AdamW(model.named_parameters(), lr=1e-2, subspaces=subspaces, state=state)  # type: ignore[arg-type]
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        train(model, optimizer, 5)
    assert max(leak.total for leak in subspaces.leak(start).values()) <= 5e-6


def test_hooks_of_a_load_decide_what_is_loaded() -> None:
    """A state of another order, put right by a hook as torch's documentation has it; and a hook after it."""
    model, other = Shapes(), Shapes()
    optimizer = made(model)
    train(model, optimizer, 2)
    subspaces = Subspaces.from_model(other, 0.5, targets=list(SHAPES))
    turned = AdamW(reversed(list(other.named_parameters())), lr=1e-2, subspaces=subspaces)

    def in_its_order(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        last = len(given["state"]) - 1
        return {**given, "state": {last - index: state for index, state in given["state"].items()}}

    turned.register_load_state_dict_pre_hook(in_its_order)
    turned.register_load_state_dict_post_hook(lambda o: o.state[other.bias].update(seen=True))
    turned.load_state_dict(optimizer.state_dict())
    assert turned.state[other.bias]["seen"]
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(turned.state[theirs][name], optimizer.state[mine][name])


def test_dropped_passes_do_not_count() -> None:
    model = torch.nn.Linear(24, 24)
    subspaces = Subspaces.from_model(model, 0.5, targets="weight")
    optimizer = AdamW(model.named_parameters(), lr=1e-2, subspaces=subspaces, state="subspace")
    fuse_into_backward(model, optimizer, accumulation_steps=2)
    before = model.weight.detach().clone()
    for passes in range(2):
        model(torch.ones(3, 24)).square().sum().backward()
        if passes == 0:
            optimizer.zero_grad()
    assert torch.equal(model.weight, before)
    model(torch.ones(3, 24)).square().sum().backward()
    assert not torch.equal(model.weight, before)
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="stepped in the backward pass"):
        optimizer.clip_grad_norm_(1.0)


def test_decay_goes_to_the_start_of_each_task() -> None:
    """The subspaces of the first one protect nothing yet."""
    model = torch.nn.Sequential(torch.nn.Linear(24, 24))
    batches, remember = [torch.randn(8, 24)], RememberInputs(0.9)
    subspaces = Subspaces.from_model(model, 0.0, targets="*weight", remember=remember)
    optimizer = AdamW(model.named_parameters(), lr=1e-2, subspaces=subspaces, decay_to="start", weight_decay=0.1)
    train(model, optimizer, 2)
    subspaces = Subspaces.from_model(
        model, 0.0, targets="*weight", remember=remember, previous=subspaces.carry(), batches=batches
    )
    start = model[0].weight.detach().clone()
    optimizer.set_subspaces(subspaces)
    train(model, optimizer, 1)
    assert torch.equal(optimizer.state[model[0].weight]["start"], start)


def test_two_bases_of_one_parameter_are_refused(tmp_path: Any) -> None:
    class Pair(torch.nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.table, self.head = torch.nn.Embedding(24, 16), torch.nn.Linear(16, 24, bias=False)
            if tied:
                self.head.weight = self.table.weight  # type: ignore[assignment]

    names = ["table.weight", "head.weight"]
    Subspaces.from_model(Pair(False), 0.25, targets=names).save(tmp_path / "file")
    with pytest.raises(ValueError, match=r"table.weight and head.weight have a basis each, and are one parameter"):
        Subspaces.load(tmp_path / "file", Pair(True))

"""AdamW(state="subspace"): moments of the free coordinates, gradients accumulated and clipped in them."""

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sculpt_ops.layer import LayerSubspace, project_each_
from sculpt_ops.optim import AdamW
from sculpt_ops.subspaces import Subspaces

from .training import (
    SHAPES,
    Kinds,
    Shapes,
    assert_kept,
    assert_same_weights,
    copied,
    feed,
    gradients,
    recorded,
    start_of,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def subspace_optimizer(model: Kinds, **options: Any) -> AdamW:
    return AdamW(model.parameters(), **({"lr": 1e-2} | options), subspaces=model.subspaces, state="subspace")


def free_part(model: Kinds, name: str, matrix: Tensor) -> Tensor:
    """(I - P_left) matrix (I - P_right) in float64."""
    layer, free = model.subspaces[name], matrix.double()
    if layer.left_basis is not None:
        free = free - layer.protected_left(free)
    if layer.right_basis is not None:
        free = free - layer.protected_right(free.mT).mT
    return free


def test_moments_have_the_shape_of_the_free_space() -> None:
    model = Shapes()
    subspaces = Subspaces.from_model(model, 0.75, targets=list(SHAPES))
    optimizer = AdamW(model.parameters(), subspaces=subspaces, state="subspace", amsgrad=True)
    train(model, optimizer, 2)
    shapes = {name: optimizer.state[parameter]["exp_avg_sq"].shape for name, parameter in model.named_parameters()}
    assert shapes == {"square": (8, 8), "wide": (6, 38), "tall": (38, 6), "bias": (7,)}
    for state in optimizer.state.values():
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == state["max_exp_avg_sq"].shape


def test_bases_are_shared_with_the_subspaces() -> None:
    model = Kinds()
    before = model.subspaces.memory()
    optimizer = subspace_optimizer(model)
    assert model.subspaces.memory() == before
    assert {id(x) for x in optimizer._bound.values()} == {id(x) for x in model.subspaces.values()}
    forms = {b.form for x in model.subspaces.values() for b in (x.left_basis, x.right_basis) if b is not None}
    assert forms == {"reflector", "free"}


def test_gradients_are_left_as_they_are() -> None:
    model = Kinds()
    grads = recorded(model, 1)[0]
    feed(model, grads)
    subspace_optimizer(model).step()
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, grad)


def test_parameters_without_a_basis_get_torch_adamw() -> None:
    ours, theirs = Shapes(), Shapes()
    subspaces = Subspaces.from_model(ours, 0.5, targets="square")
    train(ours, AdamW(ours.parameters(), 1e-2, subspaces=subspaces, state="subspace"), 10)
    train(theirs, torch.optim.AdamW(theirs.parameters(), 1e-2), 10)
    for name in ("wide", "tall", "bias"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_rank_0_is_torch_adamw_and_full_rank_stands_still() -> None:
    ours, theirs = Shapes(), Shapes()
    subspaces = Subspaces.from_model(ours, 0.0, targets=list(SHAPES))
    train(ours, AdamW(ours.parameters(), subspaces=subspaces, state="subspace"), 10)
    train(theirs, torch.optim.AdamW(theirs.parameters()), 10)
    assert_same_weights(ours, theirs)
    subspaces = Subspaces.from_model(ours, 1.0, targets="square")
    before = start_of(ours)["square"]
    train(ours, AdamW(ours.parameters(), 1e-2, subspaces=subspaces, state="subspace"), 3)
    assert torch.equal(start_of(ours)["square"], before)


def test_float64_weights() -> None:
    model = Shapes(torch.float64)
    subspaces = Subspaces.from_model(model, 0.5, targets=list(SHAPES))
    train(model, AdamW(model.parameters(), 1e-2, subspaces=subspaces, state="subspace"))
    assert max(leak.total for leak in subspaces.leak().values()) < 1e-13


def test_what_has_no_coordinates_is_refused() -> None:
    model = Shapes()
    block = Subspaces.from_model(model, sides="block", targets="wide")
    with pytest.raises(
        ValueError, match="state='subspace' needs sides 'both', 'left' or 'right'; 1 matrices have 'block'"
    ):
        AdamW(model.parameters(), subspaces=block, state="subspace")
    for project in ("gradient", "update"):
        with pytest.raises(ValueError, match=f"project must be 'both' with state='subspace'.*; got '{project}'"):
            AdamW(model.parameters(), project=project, state="subspace")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="compress_gradients needs state='subspace'"):
        AdamW(model.parameters()).compress_gradients()


def test_closure_and_missing_gradients() -> None:
    used, unused = nn.Linear(6, 6), nn.Linear(6, 6)
    model = nn.Sequential(used, unused)
    subspaces = Subspaces.from_model(model, targets="*.weight")
    optimizer = AdamW(model.parameters(), 1e-2, subspaces=subspaces, state="subspace")
    before = unused.weight.detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = used(torch.ones(2, 6)).square().sum()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(3)]
    assert losses[2] < losses[0]
    assert torch.equal(unused.weight, before)
    assert unused.weight not in optimizer.state


def test_sparse_gradient_is_refused_before_anything_changes() -> None:
    model = Kinds()
    optimizer = subspace_optimizer(model)
    start = start_of(model)
    feed(model, recorded(model, 1)[0])
    last = list(model.parameters())[-1]
    last.grad = torch.randn(last.shape).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name])


def test_compressed_gradients_add_up() -> None:
    """Two backward passes compressed and one in `.grad`, against their sum in `.grad`."""
    accumulated, summed = Kinds(), Kinds()
    optimizer, reference = subspace_optimizer(accumulated), subspace_optimizer(summed)
    start = start_of(summed)
    grads = iter(recorded(summed, 60))
    for _ in range(20):
        parts = [next(grads) for _ in range(3)]
        for part in parts:
            feed(accumulated, part)
            if part is not parts[-1]:
                optimizer.compress_gradients()
                assert all(parameter.grad is None for parameter in accumulated.parameters())
        feed(summed, [torch.stack(of_one).sum(0) for of_one in zip(*parts, strict=True)])
        optimizer.step()
        reference.step()
    for (name, a), b in zip(accumulated.named_parameters(), summed.parameters(), strict=True):
        assert (a - b).detach().norm() <= 1e-5 * (b - start[name]).detach().norm(), name
    assert optimizer._waiting.sums == {}


def test_zero_grad_and_load_state_dict_drop_compressed_gradients() -> None:
    model = Kinds()
    optimizer = subspace_optimizer(model)
    start = start_of(model)
    saved = copy.deepcopy(optimizer.state_dict())
    for drop in (optimizer.zero_grad, lambda: optimizer.load_state_dict(saved)):
        feed(model, recorded(model, 1)[0])
        optimizer.compress_gradients()
        drop()
        optimizer.step()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, start[name])


def test_gradients_without_a_basis_stay_where_they_are() -> None:
    model = Shapes()
    subspaces = Subspaces.from_model(model, targets="wide")
    optimizer = AdamW(model.parameters(), subspaces=subspaces, state="subspace")
    next(gradients(model, 1))
    optimizer.compress_gradients()
    assert model.wide.grad is None
    assert all(p.grad is not None for p in (model.square, model.tall, model.bias))
    optimizer.step()
    assert all(p in optimizer.state for p in model.parameters())


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("state", ["full", "subspace"])
def test_clipping_is_torch_on_projected_gradients(state: str, max_norm: float) -> None:
    """eps=1, so that the step depends on the gradient's size."""
    model, plain = Kinds(), Kinds()
    options: dict[str, Any] = {"lr": 1e-2, "eps": 1.0, "subspaces": model.subspaces, "state": state}
    optimizer = AdamW(model.parameters(), **options)
    reference = AdamW(plain.parameters(), **(options | {"subspaces": plain.subspaces}))
    start = start_of(plain)
    for grads in recorded(model, 3):
        feed(model, grads)
        feed(plain, grads)
        held = [free_part(plain, name, grad) for (name, _), grad in zip(plain.named_parameters(), grads, strict=True)]
        norm = torch.nn.utils.get_total_norm(held)
        assert float(optimizer.clip_grad_norm_(max_norm)) == pytest.approx(float(norm), rel=1e-6)
        feed(plain, [grad * min(1.0, max_norm / (float(norm) + 1e-6)) for grad in grads])
        optimizer.step()
        reference.step()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        change, last_digit = (b - start[name]).detach(), 2**-23 * b.detach().abs().max()
        assert (a - b).detach().norm() <= 1e-5 * change.norm() + last_digit, name


def test_clipping_projects_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(12, 8)
    optimizer = AdamW(model.parameters(), subspaces=Subspaces.from_model(model, targets="weight"))
    counts: list[int] = []

    def counted(pairs: Iterable[tuple[Tensor, LayerSubspace]], in_parts: bool = False) -> None:
        pairs = list(pairs)
        counts.append(len(pairs))
        project_each_(pairs)

    monkeypatch.setattr("sculpt_ops.optim.adamw.project_each_", counted)

    def backward() -> None:
        model(torch.ones(3, 12)).square().sum().backward()

    for _ in range(3):
        optimizer.zero_grad()
        backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    assert counts == [1, 0] * 3
    # What has changed since then is projected again: more gradient, another tensor, zeros and a new gradient.
    for change in (
        backward,
        lambda: setattr(model.weight, "grad", torch.ones(8, 12)),
        lambda: optimizer.zero_grad(False),
    ):
        counts.clear()
        optimizer.clip_grad_norm_(1.0)
        change()
        optimizer.step()
        assert counts[-1] == 1
    optimizer.step()
    assert counts[-1] == 1


def test_clipping_arguments() -> None:
    model = Kinds()
    optimizer, full = subspace_optimizer(model), AdamW(model.parameters(), subspaces=model.subspaces)
    assert float(optimizer.clip_grad_norm_(1.0)) == 0.0
    feed(model, recorded(model, 1)[0])
    with pytest.raises(ValueError, match="norm_type must be 2 with state='subspace', got 1"):
        optimizer.clip_grad_norm_(1.0, 1.0)
    assert all(parameter.grad is not None for parameter in model.parameters())
    largest = full.clip_grad_norm_(1e-3, float("inf"))
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert max(float(grad.abs().max()) for grad in grads) == pytest.approx(1e-3, rel=1e-2)
    assert float(largest) > 1.0
    grads[0][0, 0] = float("nan")
    for one in (full, optimizer):
        with pytest.raises(RuntimeError, match="non-finite"):
            one.clip_grad_norm_(1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies_and_resumed_runs_go_on_to_the_bit(how: str) -> None:
    """With a gradient that waits, except in a state_dict, which has none."""
    model, other = Kinds(), Kinds()
    optimizer = subspace_optimizer(model, weight_decay=0.1)
    train(model, optimizer, 3)
    if how == "state_dict":
        other.load_state_dict(model.state_dict())
        resumed = subspace_optimizer(other)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        next(gradients(model, 1))
        optimizer.compress_gradients()
        subspaces = model.__dict__.pop("subspaces")  # weak references, which are not pickled
        other, resumed = copied((model, optimizer), how)
        other.subspaces = subspaces
    start = start_of(other)
    train(model, optimizer, 20)
    train(other, resumed, 20)
    assert_same_weights(model, other)
    assert_kept(other.subspaces.bind(other), start, 20)

"""What every way to step must hold: the leak bound, and the algorithm as written out in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sculpt_ops.layer import LayerSubspace
from sculpt_ops.optim import AdamW

from .training import Kinds, assert_kept, feed, recorded, start_of, train

pytestmark = pytest.mark.usefixtures("one_thread")

MODES: dict[str, dict[str, Any]] = {"full": {}, "update": {"project": "update"}, "subspace": {"state": "subspace"}}
BOTH_DTYPES = (torch.float32, torch.bfloat16)


def master_weights(model: Kinds, optimizer: AdamW) -> dict[str, Tensor]:
    return {name: optimizer.master_weight(parameter).clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("lr", [1e-3, 1e-5])
@pytest.mark.parametrize("mode", MODES)
def test_leak_of_1000_steps(mode: str, lr: float) -> None:
    """Of float32 weights, and of the masters of bfloat16 ones."""
    model = Kinds(BOTH_DTYPES)
    subspaces = model.subspaces
    optimizer = AdamW(model.parameters(), lr, weight_decay=0.1, subspaces=subspaces, master="split", **MODES[mode])
    start = master_weights(model, optimizer)
    train(model, optimizer, 1000)
    assert_kept(subspaces, start, 1000, weights=master_weights(model, optimizer), moved=500 * lr)


@pytest.mark.parametrize("lr", [1e-3, 1e-5])
@pytest.mark.parametrize("mode", MODES)
def test_a_restore_every_50_steps_holds_the_leak_at_that_of_50(mode: str, lr: float) -> None:
    model = Kinds()
    subspaces = model.subspaces
    optimizer = AdamW(model.parameters(), lr, weight_decay=0.1, subspaces=subspaces, **MODES[mode])
    start = start_of(model)
    for step, grads in enumerate(recorded(model, 240), start=1):
        feed(model, grads)
        guard = subspaces.guard(optimizer, start=start) if step % 50 == 0 else None
        optimizer.step()
        if guard is not None:
            guard.remove()
            assert_kept(subspaces, start, 50, moved=lr)
    assert_kept(subspaces, start, 50, moved=120 * lr)


class Reference:
    """One matrix of the algorithm in float64, with the bases of the free spaces as factors."""

    def __init__(self, weight: Tensor, layer: LayerSubspace, options: dict[str, Any]) -> None:
        bases = zip((layer.left_basis, layer.right_basis), layer.shape, strict=True)
        self.left, self.right = (torch.eye(d).double() if b is None else b.free_columns().double() for b, d in bases)
        self.weight = weight.detach().double()
        self.start = self.weight.clone()
        self.options: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "decay_to": "zero"} | options
        self.in_coordinates = options.get("state") == "subspace"
        self.steps = 0
        moment = self.to_coordinates(self.weight) if self.in_coordinates else self.weight
        self.first, self.second, self.largest = (torch.zeros_like(moment) for _ in range(3))

    def to_coordinates(self, matrix: Tensor) -> Tensor:
        return self.left.mT @ matrix @ self.right

    def from_coordinates(self, coordinates: Tensor) -> Tensor:
        return self.left @ coordinates @ self.right.mT

    def project(self, matrix: Tensor) -> Tensor:
        return self.from_coordinates(self.to_coordinates(matrix))

    def step(self, grad: Tensor) -> None:
        options = self.options
        grad = -grad.double() if options.get("maximize") else grad.double()
        if self.in_coordinates:
            grad = self.to_coordinates(grad)
        elif options.get("project") != "update":
            grad = self.project(grad)
        beta1, beta2 = options["betas"]
        self.steps += 1
        self.first = beta1 * self.first + (1 - beta1) * grad
        self.second = beta2 * self.second + (1 - beta2) * grad**2
        self.largest = torch.maximum(self.largest, self.second)
        squares = self.largest if options.get("amsgrad") else self.second
        direction = self.first / (1 - beta1**self.steps)
        direction = direction / ((squares / (1 - beta2**self.steps)).sqrt() + options["eps"])
        decayed = self.weight - self.start if options["decay_to"] == "start" else self.weight
        change = self.from_coordinates(direction) if self.in_coordinates else self.project(direction)
        self.weight = self.weight - float(options["lr"]) * (change + options["weight_decay"] * self.project(decayed))


def assert_follows(model: Kinds, optimizer: AdamW, references: dict[str, Reference], steps: int) -> None:
    """To 1e-5 of the change, every matrix."""
    for grads in recorded(model, steps):
        feed(model, grads)
        optimizer.step()
        for reference, grad in zip(references.values(), grads, strict=True):
            reference.step(grad)
    for (name, reference), parameter in zip(references.items(), model.parameters(), strict=True):
        error = (parameter.detach().double() - reference.weight).norm()
        assert error <= 1e-5 * (reference.weight - reference.start).norm(), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"foreach": True},
        {"amsgrad": True, "maximize": True},
        {"lr": torch.tensor(2e-3), "betas": (0.8, 0.95), "eps": 1e-4},
        {"decay_to": "start"},
        {"weight_decay": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", MODES)
def test_recorded_gradients_give_the_weights_of_the_algorithm(mode: str, options: dict[str, Any]) -> None:
    model = Kinds()
    options = {"lr": 1e-3, "weight_decay": 0.5} | options | MODES[mode]
    optimizer = AdamW(model.parameters(), subspaces=model.subspaces, **options)
    names = dict(model.named_parameters())
    if mode != "subspace":
        model.subspaces.use_reflectors()  # which have the free columns that the reference is written with
    assert_follows(model, optimizer, {n: Reference(p, model.subspaces[n], options) for n, p in names.items()}, 100)


@pytest.mark.parametrize("mode", ["full", "subspace"])
def test_groups_have_their_own_rate_and_decay(mode: str) -> None:
    model = Kinds()
    model.subspaces.use_reflectors()
    names = dict(model.named_parameters())
    groups: list[dict[str, Any]] = [{"lr": 1e-3, "weight_decay": 0.0}, {"lr": 3e-3, "weight_decay": 0.5}]
    half = len(names) // 2
    references = {
        n: Reference(p, model.subspaces[n], groups[i >= half] | MODES[mode]) for i, (n, p) in enumerate(names.items())
    }
    members = list(names.items())
    given = [group | {"params": part} for group, part in zip(groups, (members[:half], members[half:]), strict=True)]
    optimizer = AdamW(given, subspaces=model.subspaces, **MODES[mode])
    assert_follows(model, optimizer, references, 100)

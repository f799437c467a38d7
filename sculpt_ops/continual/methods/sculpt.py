"""Protected subspaces: derived before each task, once and for all, or drawn at random."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...basis import Basis
from ...input_covariance import input_sides
from ...layer import LayerSubspace, check_sides, project_each_
from ...leak import sketch_weight
from ...ops import orthonormalize
from ...ranks import Importance, Schedule
from ...storage import pack, unpack
from ...subspaces import Subspaces
from ...targets import resolve_targets
from ..config import TrainConfig
from ..policies import parse_remember
from .base import Method, TaskContext

__all__ = ["First", "Random", "Sculpt"]

# Training rows of the task before that the importance of layers, or their inputs, are measured on, and of a batch.
MEASURED_ROWS, BATCH_ROWS = 32, 8


class Sculpt(Method):
    """Subspaces derived from the weights as they stand before each task; config.protect None protects nothing."""

    def check(self, model: Any, config: TrainConfig) -> None:
        if config.protects:
            found = resolve_targets(model, config.targets)
            if config.remembers_inputs:
                input_sides(model, found, config.sides)

    def begin_task(self, context: TaskContext) -> Subspaces | None:
        config, index = context.config, context.index
        if config.protect is None:
            return None
        options: dict[str, Any] = {
            "remember": parse_remember(config.remember),
            "sides": check_sides(config.sides),
            "targets": config.targets,
        }
        previous: Mapping[str, LayerSubspace] | None = context.previous
        batches = None
        if isinstance(config.protect, Importance) or config.remembers_inputs:
            rows = context.tasks[max(index - 1, 0)].train
            if index == 0 and context.text:
                # As if the text had been a task: what is remembered before it is nothing.
                rows, previous = list(context.text), Subspaces.from_model(context.model, protect=0.0, **options).carry()
            chosen = random.Random(0).sample(range(len(rows)), min(MEASURED_ROWS, len(rows)))
            # Of similar length together, so that little is padding.
            chosen.sort(key=lambda row: len(rows[row].prompt) + len(rows[row].answer))
            parts = [chosen[first : first + BATCH_ROWS] for first in range(0, len(chosen), BATCH_ROWS)]
            batches = [context.collate([rows[row] for row in part]) for part in parts]
        return Subspaces.from_model(
            context.model,
            protect=Schedule(index + 1, len(context.tasks)) if config.protect == "schedule" else config.protect,
            batches=batches,
            previous=previous,
            others="freeze" if config.others == "freeze" else "train",
            basis_dtype=getattr(torch, config.basis_dtype),
            **options,
        )


class Random(Sculpt):
    """As many directions as `Sculpt` would protect of every side, but drawn at random: what the choice is worth."""

    def begin_task(self, context: TaskContext) -> Subspaces | None:
        derived = super().begin_task(context)
        if derived is None:
            return None
        generator = torch.Generator().manual_seed(1000 * context.config.seed + context.index)
        parameters = {name: parameter for name in derived if (parameter := derived.parameter(name)) is not None}
        layers = {name: drawn(derived[name], parameters[name], generator) for name in derived}
        sketches = {name: sketch_weight(layers[name], parameters[name], name) for name in layers}
        memory = derived.memory_of_tasks
        return Subspaces(layers, sketches, derived.unprotected, derived.importance, memory).bind(context.model)


def drawn(layer: LayerSubspace, weight: Tensor, generator: torch.Generator) -> LayerSubspace:
    """A layer of the same dimensions with random bases. energy: the share ||P W||² / ||W||² that they hold."""

    def other(basis: Basis) -> Basis:
        shape, dtype = basis.columns.shape, basis.columns.dtype
        wide = torch.promote_types(dtype, torch.float32)
        normal = torch.randn(shape, generator=generator, dtype=wide).to(weight.device)
        return Basis.store(orthonormalize(normal), "free" if basis.keep else "protected", dtype)

    made = layer.with_bases(other)
    free = weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    total = float(free.norm())
    project_each_([(free, made)])
    return replace(made, energy=1.0 - float(free.norm()) ** 2 / total**2 if total else 0.0)


class First(Sculpt):
    """The subspaces of the weights before the first task, for all tasks: what deriving anew is worth."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def begin_task(self, context: TaskContext) -> Subspaces | None:
        if not self._kept:
            subspaces = super().begin_task(context)
            if subspaces is not None:
                tensors, header = pack(subspaces, {})
                self._kept = tensors | {
                    "header": torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
                }
            return subspaces
        tensors = dict(self._kept)
        header = json.loads(bytes(tensors.pop("header").tolist()))
        layers = unpack(tensors, header, "the state of the method").layers
        weights = dict(context.model.named_parameters())
        layers = {name: layer.to(weights[name].device) for name, layer in layers.items()}
        sketches = {name: sketch_weight(layer, weights[name], name) for name, layer in layers.items()}
        return Subspaces(layers, sketches).bind(context.model)

    def state(self) -> dict[str, Tensor]:
        return self._kept

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._kept = dict(state)

"""Elastic weight consolidation (Kirkpatrick et al., PNAS 2017, arXiv 1612.00796), summed online over tasks."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from .base import Method, TaskContext

__all__ = ["Ewc"]


class Ewc(Method):
    """Adds (lambda / 2) sum_i F_i (w_i - w*_i)² to the loss: F the mean over rows of the squared gradient of a row's
    loss, summed over the tasks so far, and w* the weights after the last. Two copies of the trained weights."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._fisher: dict[str, Tensor] = {}
        self._anchors: dict[str, Tensor] = {}

    def begin_task(self, context: TaskContext) -> None:
        self._weight = context.config.ewc_lambda
        trained = {name: p for name, p in context.model.named_parameters() if p.requires_grad}
        for kept in (self._fisher, self._anchors):
            for name in kept:
                kept[name] = kept[name].to(trained[name].device)

    def penalty(self, model: Any) -> Tensor | None:
        if not self._fisher:
            return None
        trained = {name: p for name, p in model.named_parameters() if name in self._fisher}
        terms = [(self._fisher[name] * (p - self._anchors[name]).square()).sum() for name, p in trained.items()]
        return 0.5 * self._weight * torch.stack(terms).sum()

    def end_task(self, context: TaskContext) -> None:
        rows = context.rows
        chosen = random.Random(context.config.seed).sample(range(len(rows)), min(context.config.ewc_rows, len(rows)))
        found = squared_gradients(context, sorted(chosen))
        for name, weight in context.model.named_parameters():
            if name in found:
                self._fisher[name] = found[name] + self._fisher[name] if name in self._fisher else found[name]
                self._anchors[name] = weight.detach().clone()

    def state(self) -> dict[str, Tensor]:
        kinds = {"fisher": self._fisher, "anchor": self._anchors}
        return {f"{kind}:{name}": tensor for kind, kept in kinds.items() for name, tensor in kept.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for key, tensor in state.items():
            kind, _, name = key.partition(":")
            (self._fisher if kind == "fisher" else self._anchors)[name] = tensor


def squared_gradients(context: TaskContext, rows: list[int]) -> dict[str, Tensor]:
    """Mean over `rows` of the squared gradient of each row's loss, of every trained weight."""
    model, training = context.model, context.model.training
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    sums = {name: torch.zeros_like(p) for name, p in trained}
    model.eval()
    try:
        for row in rows:
            batch = {
                key: v.to(model.device) if isinstance(v, Tensor) else v
                for key, v in context.collate([context.rows[row]]).items()
            }
            loss = model(**batch).loss
            grads = torch.autograd.grad(loss, [p for _, p in trained], allow_unused=True)
            for (name, _), grad in zip(trained, grads, strict=True):
                if grad is not None:
                    sums[name].addcmul_(grad, grad, value=1.0 / len(rows))
    finally:
        model.train(training)
    return sums

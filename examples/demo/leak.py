"""How much of the weight change lands in the protected space: plain AdamW, projected gradients, sculpt_ops.AdamW."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sculpt_ops import AdamW, Subspaces
from sculpt_ops.continual import Task
from sculpt_ops.continual.encoding import Collator, Encoded, encode_task
from sculpt_ops.continual.modeling import open_model


@dataclass(frozen=True)
class LeakRow:
    """One way of training. left, right: ||P_L dW|| / ||dW|| and ||dW P_R|| / ||dW||, one figure a matrix."""

    method: str
    left: list[float]
    right: list[float]
    seconds_per_step: float

    def figures(self) -> tuple[float, float, float, float]:
        """Median and maximum over the matrices on the left, then on the right."""
        medians_and_maxima = [(statistics.median(side), max(side)) for side in (self.left, self.right)]
        return (*medians_and_maxima[0], *medians_and_maxima[1])


@dataclass(frozen=True)
class LeakTable:
    """matrices, layers: those that were trained and measured, everything else in the model frozen."""

    rows: list[LeakRow]
    matrices: int
    layers: list[int]
    steps: int
    batch_size: int
    protect: float
    lr: float
    seconds_per_matrix: float


def measure_leak(
    model_folder: Path,
    task: Task,
    *,
    layers: int,
    steps: int,
    batch_size: int,
    protect: float,
    lr: float,
    bf16: bool,
    device: str,
    advance: Callable[[], None] = lambda: None,
) -> LeakTable:
    """Trains the attention and feed-forward matrices of `layers` layers, evenly spaced, on the same batches from the
    same start three times; calls `advance` after each step."""
    model, tokenizer = open_model(model_folder)
    model.to(device).train()
    rows = encode_task(task, tokenizer, 128, seq2seq=False).train[: steps * batch_size]
    collate = Collator(model, tokenizer)
    batches = [collate(chunk) for chunk in _chunks(rows, batch_size)]
    chosen = evenly_spaced(model.config.num_hidden_layers, layers)
    targets = [f"model.layers.{layer}.*_proj.weight" for layer in chosen]
    began = time.perf_counter()
    subspaces = Subspaces.from_model(model, protect=protect, targets=targets, others="freeze")
    seconds_per_matrix = (time.perf_counter() - began) / len(subspaces)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    start = {name: weight.detach().clone() for name, weight in trained.items()}

    def train(method: str, optimizer: torch.optim.Optimizer, before_step: Callable[[], None]) -> LeakRow:
        seconds = []
        for batch in batches:
            began = time.perf_counter()
            loss_of(model, batch, device, bf16).backward()
            before_step()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - began)
            advance()
        leaks = subspaces.leak(start).values()
        with torch.no_grad():
            for name, weight in trained.items():
                weight.copy_(start[name])
        left, right = [[getattr(leak, side) for leak in leaks] for side in ("left", "right")]
        return LeakRow(method, left, right, statistics.median(seconds))

    def adam() -> torch.optim.AdamW:
        return torch.optim.AdamW(trained.values(), lr=lr, weight_decay=0.0)

    ours = AdamW(trained.values(), lr=lr, weight_decay=0.0, subspaces=subspaces)
    return LeakTable(
        rows=[
            train("AdamW", adam(), lambda: None),
            train("AdamW, gradients projected", adam(), subspaces.project_gradients),
            train("sculpt_ops.AdamW", ours, lambda: None),
        ],
        matrices=len(subspaces),
        layers=chosen,
        steps=len(batches),
        batch_size=batch_size,
        protect=protect,
        lr=lr,
        seconds_per_matrix=seconds_per_matrix,
    )


def loss_of(model: nn.Module, batch: Mapping[str, Any], device: str, bf16: bool) -> Tensor:
    """The loss of one collated batch, under bf16 autocast where asked for."""
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        loss: Tensor = model(**moved).loss
    return loss


def evenly_spaced(layers: int, wanted: int) -> list[int]:
    """Up to `wanted` of the layers 0 to layers - 1, the first and the last among them."""
    wanted = min(wanted, layers)
    return sorted({round(index * (layers - 1) / max(wanted - 1, 1)) for index in range(wanted)})


def _chunks(rows: Sequence[Encoded], size: int) -> Iterator[Sequence[Encoded]]:
    for begin in range(0, len(rows), size):
        yield rows[begin : begin + size]

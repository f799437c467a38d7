"""One row of the training table, measured in a process of its own."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tables import Row
from torch import Tensor, nn
from training_data import Batches, load_batches
from training_methods import Method, Training, nbytes, tensors_of

from sculpt_ops import Subspaces
from sculpt_ops.continual.memory import PeakMemory
from sculpt_ops.continual.modeling import open_model
from sculpt_ops.leak import measure_exact

# Optimizer states are made in the first step, and the allocator still grows in the second.
WARM_UP = 2
# Where a method protects nothing, its leak is into this share of the start weights.
REFERENCE = 0.5


@dataclass(frozen=True)
class Settings:
    """model, task: folders. A step takes rows * length tokens; held_out: batches the loss is compared on."""

    model: Path
    task: Path
    steps: int = 12
    lr: float = 1e-5
    rows: int = 4
    length: int = 128
    held_out: int = 2
    threads: int = 2


def measure(method: Method, settings: Settings) -> Row:
    """Seconds, bytes, leak and loss of `settings.steps` steps of `method`; memory is counted from what imports take."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    if method.load is not None:
        method.load()
    from transformers import AutoTokenizer

    batches = load_batches(
        settings.task,
        AutoTokenizer.from_pretrained(settings.model),
        steps=settings.steps,
        held_out=settings.held_out,
        rows=settings.rows,
        length=settings.length,
    )
    memory = PeakMemory(torch.device("cpu"))
    gc.collect()
    memory.reset()
    baseline = memory.read()

    model = opened(settings.model, method.dtype)
    if method.convert is not None:
        model = method.convert(model)
    begin = time.perf_counter()
    training = method.prepare(model, settings.lr)
    row: Row = {"setup_s": time.perf_counter() - begin, "setup_peak": memory.read() - baseline}
    del model
    row["loss_before"] = mean_loss(training.model, batches.held_out)
    row |= train(training, batches)
    row["peak"] = memory.read() - baseline
    row["loss_after"] = mean_loss(training.model, batches.held_out)
    row["saved"] = training.saved()
    return row | measure_leak(method, training, settings.model)


def opened(folder: Path, dtype: torch.dtype) -> nn.Module:
    model: nn.Module = open_model(folder, str(dtype).removeprefix("torch."))[0]
    return model.train()


def train(training: Training, batches: Batches) -> Row:
    """One step a batch, timed from the forward pass to zeroed gradients; after_backward_s: clipping and optimizer."""
    forward, after, losses = [], [], []
    owned: dict[str, int] = {}
    for batch in batches.train:
        begin = time.perf_counter()
        loss = training.model(input_ids=batch, labels=batch).loss
        loss.backward()
        losses.append(float(loss.detach()))
        forward.append(time.perf_counter() - begin)
        if len(losses) == len(batches.train):
            owned = owned_bytes(training)
        begin = time.perf_counter()
        training.step()
        after.append(time.perf_counter() - begin)
    steps = [sum(parts) for parts in zip(forward, after, strict=True)][WARM_UP:]
    return {
        **quartiles("step_s", steps),
        **quartiles("after_backward_s", after[WARM_UP:]),
        "steps_s": steps,
        "losses": losses,
        "owned": owned,
    }


def quartiles(name: str, seconds: Sequence[float]) -> Row:
    low, middle, high = statistics.quantiles(seconds, n=4)
    return {name: middle, f"{name}_low": low, f"{name}_high": high}


def owned_bytes(training: Training) -> dict[str, int]:
    """What the method keeps between steps, with all gradients that exist at the end of a backward pass."""
    parameters = list(training.model.parameters())
    return {
        "weights": nbytes(parameters),
        "gradients": nbytes(parameter.grad for parameter in parameters if parameter.grad is not None),
        "states": nbytes(tensors_of(dict(training.optimizer.state))),
        "bases": training.bases(),
    }


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Tensor]) -> float:
    return statistics.fmean(float(model(input_ids=batch, labels=batch).loss) for batch in batches)


def measure_leak(method: Method, training: Training, folder: Path) -> Row:
    """Median and largest `LayerLeak.total` of all protected matrices, in float64 against the start weights.

    Ours are measured in the space that they store; the others in the space of the same rank that `Subspaces.from_model`
    finds in the start weights. moved: ||dW|| / ||W||, inside: the protected part of dW as a share of ||W||, medians.
    """
    start = opened(folder, method.dtype)
    subspaces = training.subspaces or Subspaces.from_model(start, protect=method.protect or REFERENCE)
    weights = {name: weight.detach() for name, weight in start.named_parameters() if name in subspaces}
    leaks = {
        name: measure_exact(subspaces[name], weight, weights[name])
        for name, weight in training.weights()
        if name in subspaces
    }
    totals = [leak.total for leak in leaks.values()]
    norms = [float(torch.linalg.vector_norm(weights[name].double())) for name in leaks]
    return {
        "matrices": len(leaks),
        "leak": statistics.median(totals),
        "leak_max": max(totals),
        "moved": statistics.median(leak.change / norm for leak, norm in zip(leaks.values(), norms, strict=True)),
        "inside": statistics.median(leak.total_norm / norm for leak, norm in zip(leaks.values(), norms, strict=True)),
    }


def described(settings: Settings) -> dict[str, Any]:
    """The settings as the results file holds them; folders by name only."""
    facts = {name: value for name, value in vars(settings).items() if not isinstance(value, Path)}
    return facts | {"model": settings.model.resolve().name, "task": settings.task.resolve().name}

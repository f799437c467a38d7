"""What this machine needs for a step, an evaluated item and a decomposition, from a few of each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from leak import LeakTable, loss_of
from plan import Speed

from sculpt_ops.continual import Task
from sculpt_ops.continual.encoding import Collator, EncodedTask, encode_task
from sculpt_ops.continual.evaluate import greedy_answers
from sculpt_ops.continual.modeling import open_model
from sculpt_ops.targets import resolve_targets


@dataclass(frozen=True)
class Timing:
    """seconds_fp32 and seconds_bf16: forward and backward of one small batch; None where only bf16 was considered."""

    bf16: bool
    step: float
    first: float
    item: float
    matrices: int
    seconds_fp32: float | None
    seconds_bf16: float | None

    def speed(self, leak: LeakTable) -> Speed:
        """With what the leak table's few matrices took, scaled up to all that the run protects."""
        plain, _, protected = (row.seconds_per_step for row in leak.rows)
        scale = self.matrices / leak.matrices
        return Speed(
            step=self.step,
            first=self.first,
            protection=max(protected - plain, 0.0) * scale,
            item=self.item,
            decomposition=leak.seconds_per_matrix * self.matrices,
        )


def measure_timing(
    model_folder: Path,
    tasks: Sequence[Task],
    *,
    batch_size: int,
    max_length: int,
    steps: int,
    device: str,
) -> Timing:
    """Times `steps` plain steps and the answers to one batch of every task, in the faster of fp32 and bf16 autocast."""
    model, tokenizer = open_model(model_folder)
    model.to(device).train()
    encoded = [encode_task(task, tokenizer, max_length, seq2seq=False) for task in tasks]
    collate = Collator(model, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def forward_backward(rows: int, index: int, bf16: bool) -> None:
        task = encoded[index % len(encoded)]
        first = index * rows % max(len(task.train) - rows, 1)
        loss_of(model, collate(task.train[first : first + rows]), device, bf16).backward()

    def step(index: int, bf16: bool) -> None:
        forward_backward(batch_size, index, bf16)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    fp32 = bf16 = None
    if device == "cpu":
        fp32, bf16 = [min(_seconds(forward_backward, 2, 0, precision) for _ in range(3)) for precision in (False, True)]
    faster = bf16 is None or fp32 is None or bf16 < fp32
    first = _seconds(step, 0, faster)
    seconds = [_seconds(step, index, faster) for index in range(1, steps + 1)]
    per_item = [
        _seconds(greedy_answers, model, tokenizer, EncodedTask([], task.test[:16], task.max_new_tokens), bf16=faster)
        / len(task.test[:16])
        for task in encoded
    ]
    return Timing(
        bf16=faster,
        step=statistics.mean(seconds),
        first=max(first - statistics.mean(seconds), 0.0),
        item=statistics.mean(per_item),
        matrices=len(resolve_targets(model)),
        seconds_fp32=fp32,
        seconds_bf16=bf16,
    )


def _seconds(function: Callable[..., object], *args: object, **kwargs: object) -> float:
    began = time.perf_counter()
    function(*args, **kwargs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began

"""What a run would do, and about how long it would take: `sculpt train --dry-run`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..ranks import Fraction, Schedule, SizePolicy
from ..targets import resolve_targets
from .config import Protect, TrainConfig, format_protect
from .distributed import World
from .encoding import Collator, Encoded, EncodedTask
from .evaluate import greedy_answers
from .learn import steps_of
from .plan import make_plan
from .prepare import open_for_training, prepare, read_tasks, resumed_at
from .progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Estimate", "TaskEstimate", "estimate"]


@dataclass(frozen=True)
class TaskEstimate:
    """steps, tokens: of all its training, prompts and answers; of a run that is resumed, of what is left. ranks: the
    smallest and the largest of the protected matrices; None where the weights, the data or what is remembered decide,
    and for nothing protected. seconds: of training and of evaluation."""

    name: str
    train_rows: int
    test_rows: int
    steps: int
    tokens: int
    ranks: tuple[int, int] | None
    training_seconds: float
    evaluation_seconds: float


@dataclass(frozen=True)
class Estimate:
    """matrices: how many are protected. memory: bytes at the peak of training, without the bases of what is remembered;
    None where it is not known before the ranks are. Seconds are extrapolated from one forward and backward pass and one
    batch of answers; the optimizer's step and the decomposition are not in them."""

    model: str
    parameters: int
    trained: int
    matrices: int
    method: str
    protect: str
    remember: str | None
    lr: float
    memory: int | None
    tasks: Sequence[TaskEstimate]
    notes: Sequence[str] = ()

    @property
    def seconds(self) -> float:
        return sum(task.training_seconds + task.evaluation_seconds for task in self.tasks)

    def table(self) -> str:
        """For people."""
        head = f"{'task':<20} {'train':>7} {'test':>6} {'steps':>7} {'tokens':>11} {'ranks':>11}"
        head += f" {'train s':>9} {'test s':>8}"
        rows = [
            f"{task.name:<20} {task.train_rows:>7} {task.test_rows:>6} {task.steps:>7} {task.tokens:>11} "
            f"{_ranks(task.ranks):>11} {task.training_seconds:>9.1f} {task.evaluation_seconds:>8.1f}"
            for task in self.tasks
        ]
        peak = "not known beforehand" if self.memory is None else f"{self.memory / 2**30:.2f} GiB at the peak"
        if self.remember is not None:
            peak += ", without the bases of what is remembered"
        lines = [
            f"{self.model}: {self.parameters:,} parameters, {self.trained:,} trained, {self.matrices} matrices "
            "protected",
            f"method: {self.method}, protect {self.protect}, remember {self.remember or 'none'}, lr {self.lr:g}",
            f"memory: {peak}",
            f"time: an estimate of {self.seconds:.0f} s, from one forward and backward pass and one batch of answers "
            "measured here; optimizer steps and decompositions not counted",
            *self.notes,
            "nothing was written",
        ]
        return "\n".join([head, *rows, "", *lines])


def estimate(config: TrainConfig) -> Estimate:
    """Read the tasks, open the model, measure one forward and backward pass and one batch of answers; write nothing.
    Of a run that is resumed, what is left of it.

    Refuses what `train` would refuse before its first step, by the same errors; ValueError under torchrun.
    """
    if "RANK" in os.environ:
        raise ValueError("dry_run: got several processes, wanted one: start it without torchrun")
    cuda = torch.cuda.is_available() and not config.cpu
    world = World(torch.device("cuda" if cuda else "cpu"))
    tasks = read_tasks(config, world)
    opened = open_for_training(config, world)
    run = prepare(config, world, Progress(True), tasks, opened)
    model, tokenizer, encoded = run.model, run.tokenizer, run.encoded
    targets = resolve_targets(model, config.targets) if config.protects else {}
    pass_seconds = _pass_seconds(config, model, tokenizer, encoded[0]) if encoded[0].train else 0.0
    item_seconds = _item_seconds(config, model, tokenizer, encoded[0])
    sizes = [min(weight.shape) for weight in targets.values()]
    counts = [len(rows.train) for rows in encoded]
    done, measured = len(run.result.learned), len(run.result.evaluation_seconds)
    made = []
    for index, (task, rows) in enumerate(zip(tasks, encoded, strict=True)):
        steps = 0 if index < done else steps_of(config, run.method.row_count(config, counts, index), world, index)
        if run.saved is not None and run.saved.task == index:
            steps -= run.saved.step or 0
        mean = sum(map(_length, rows.train)) / max(len(rows.train), 1)
        per_step = config.batch_size * config.gradient_accumulation_steps
        policy = _size_policy(config.protect, index + 1, len(tasks)) if config.protects else None
        grows = (index > 0 or config.remember_text is not None) and config.remember is not None
        ranks = None if policy is None or not sizes or grows else [policy.rank_of(size) for size in sizes]
        answered = sum(index in config.measured_after(row, len(tasks)) for row in range(measured, len(tasks) + 1))
        made.append(
            TaskEstimate(
                name=task.name,
                train_rows=len(task.train),
                test_rows=len(task.test),
                steps=steps,
                tokens=round(steps * per_step * mean),
                ranks=None if ranks is None else (min(ranks), max(ranks)),
                training_seconds=steps * per_step * mean * pass_seconds,
                evaluation_seconds=answered * len(task.test) * item_seconds,
            )
        )
    frozen = config.protects and config.others == "freeze"
    trained = targets.values() if frozen else model.parameters()
    return Estimate(
        model=str(config.model),
        parameters=sum(weight.numel() for weight in model.parameters()),
        trained=sum(weight.numel() for weight in trained if weight.requires_grad),
        matrices=len(targets),
        method=config.method,
        protect=format_protect(config.protect if config.protects else None),
        remember=config.remember,
        lr=config.lr,
        memory=_memory(config, encoded),
        tasks=made,
        notes=[
            *([resumed_at(run.saved, run.result.tasks)] if run.result.learned or run.saved is not None else []),
            *[f"{task.name}: {task.note}" for task in tasks if task.note],
            *run.result.notes,
        ],
    )


def _pass_seconds(
    config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: EncodedTask
) -> float:
    """Of a forward and backward pass, by token; of the rows around the median length, the first pass not counted."""
    rows = sorted(task.train, key=_length)
    middle = max((len(rows) - config.batch_size) // 2, 0)
    chosen = rows[middle : middle + config.batch_size]
    batch = Collator(model, tokenizer)(chosen)
    inputs = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()}
    model.train()
    for _ in range(2):
        start = time.perf_counter()
        with torch.autocast(model.device.type, torch.bfloat16, config.bf16):
            loss = model(**inputs).loss
        loss.backward()
        model.zero_grad()
        _wait(model)
    return (time.perf_counter() - start) / sum(map(_length, chosen))


def _item_seconds(
    config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: EncodedTask
) -> float:
    items = sorted(task.test, key=_length)
    middle = max((len(items) - config.eval_batch_size) // 2, 0)
    chosen = items[middle : middle + config.eval_batch_size]
    start = time.perf_counter()
    greedy_answers(model, tokenizer, replace(task, test=chosen), batch_size=config.eval_batch_size, bf16=config.bf16)
    _wait(model)
    return (time.perf_counter() - start) / len(chosen)


def _memory(config: TrainConfig, encoded: Sequence[EncodedTask]) -> int | None:
    """Bytes at the peak of training by `sculpt plan`, at the longest batch there can be and the task with the most
    protected; None where it has no such row."""
    if config.method not in ("sculpt", "random", "first", "plain", "replay", "multitask", "per-task"):
        return None
    protect = config.protect if config.protects else None
    if protect == "schedule":
        # The bases are widest at half.
        share = min((Fraction(i / len(encoded)) for i in range(len(encoded))), key=lambda s: abs(s.share - 0.5))
        protect = share
    if config.dtype == "float16" or not (protect is None or _size_policy(protect, 1, 1)):
        return None
    length = max(_length(row) for task in encoded for row in task.train)
    plan = make_plan(
        config.model,
        protect=[] if protect is None else [protect],
        sides=config.sides,
        targets=config.targets,
        others=config.others,
        dtypes=[config.dtype],
        bf16=config.bf16,
        tokens=length * config.batch_size,
        batch_size=config.batch_size,
        gradient_checkpointing=config.gradient_checkpointing,
        moment_dtype=config.adam_dtype,
        peers=False,
        trust_remote_code=config.trust_remote_code,
    )
    for row in plan.settings:
        setting = row.setting
        same = (
            setting.method == ("AdamW" if protect is None else "sculpt")
            and (protect is None or setting.state == config.state)
            and (setting.basis_dtype or "float32") == config.basis_dtype
            and (setting.master == config.master or config.dtype == "float32")
        )
        if same and row.memory is not None:
            return replace(row, setting=replace(setting, in_backward=config.fuse_backward)).peak
    return None


def _size_policy(protect: Protect, task: int, n_tasks: int) -> SizePolicy | None:
    policy: object = Fraction(protect) if isinstance(protect, float) else protect
    if protect == "schedule":
        policy = Schedule(task, n_tasks)
    return policy if isinstance(policy, SizePolicy) else None


def _length(row: Encoded) -> int:
    return len(row.prompt) + len(row.answer)


def _wait(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _ranks(ranks: tuple[int, int] | None) -> str:
    if ranks is None:
        return "-"
    return str(ranks[0]) if ranks[0] == ranks[1] else f"{ranks[0]}..{ranks[1]}"

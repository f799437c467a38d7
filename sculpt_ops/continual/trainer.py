"""Continual fine-tuning: a sequence of tasks, each with a fresh `transformers.Trainer` and fresh subspaces.

One process on one device, a GPU where there is one. So far it has been run on CPUs only.
"""

from __future__ import annotations

import math
import os
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..derive import search_starts
from ..layer import LayerSubspace, check_sides
from ..ranks import Importance, Schedule
from ..subspaces import Subspaces
from ..targets import resolve_targets
from .benchmark import benchmark_note
from .config import TrainConfig
from .encoding import Collator, EncodedTask, encode_task
from .environment import versions
from .evaluate import greedy_answers
from .leak_trace import LeakTrace
from .memory import PeakMemory
from .modeling import longest_input, open_model, save_model
from .progress import Progress
from .result import LearnedTask, Prediction, RunResult
from .tasks import Task, hold_out, load_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["train"]

# The same for every run, whatever its seed, so that runs are compared on the same items.
SELECTION_SEED = 0
# Rows of a task that the importance of layers is measured on. Measured on SmolLM2-135M, 32 rows of two different tasks
# give cosines that correlate to 0.93 and more: what is left to gain from more rows is small.
IMPORTANCE_ROWS = 32
# What has to agree for one run's zero-shot answers to be another's.
ZERO_SHOT_SETTINGS = ("model", "max_length", "dtype", "bf16")


def train(config: TrainConfig, *, zero_shot: RunResult | None = None, quiet: bool = False) -> RunResult:
    """Learn the tasks in order and measure on all of them before the first and after each.

    Subspaces are derived anew before each task from the weights as they stand. The output folder gets run.json and
    predictions.jsonl (rewritten after each task) and at the end model/, which `from_pretrained` opens.

    zero_shot: an earlier run of the same model on the same items, whose answers before the first task are taken over.
    quiet: report no progress.

    Raises ValueError for settings, tasks or a model that do not fit and FileExistsError for an output that is not
    empty, both before anything is written; FloatingPointError for a loss that is not finite.
    """
    run = _prepare(config, Progress(quiet))
    if zero_shot is None:
        _evaluate(run, row=0)
    else:
        _take_over(run, zero_shot)
    run.result.save()
    for index in range(len(run.tasks)):
        run.result.learned.append(_learn(run, index))
        _evaluate(run, row=index + 1)
        run.result.save()
    save_model(run.model, run.tokenizer, Path(config.output) / "model")
    return run.result


@dataclass(frozen=True)
class _Run:
    """starts: of the last task's subspaces, what the search for the next task's may start from."""

    config: TrainConfig
    progress: Progress
    tasks: Sequence[Task]
    encoded: Sequence[EncodedTask]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    result: RunResult
    starts: dict[str, LayerSubspace] = field(default_factory=dict)


def _prepare(config: TrainConfig, progress: Progress) -> _Run:
    """Open and check everything that a run needs; writes nothing."""
    from .hf_trainer import training_arguments

    output = Path(config.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"output: {output} is there and not empty; name a new folder or remove this one")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("train runs in one process, on one device; start it without torchrun or accelerate launch")
    training_arguments(config, str(output), 0)
    tasks = [_measured(task, config) for task in load_tasks(config.tasks, config.order)]
    progress.say(f"opening {config.model}")
    model, tokenizer = open_model(config.model, config.dtype, config.trust_remote_code)
    limit = longest_input(model)
    if limit is not None and config.max_length > limit:
        raise ValueError(f"max_length: got {config.max_length}, the model has positions for {limit} tokens")
    if config.protect is not None:
        resolve_targets(model, config.targets)
    encoded = [encode_task(task, tokenizer, config.max_length, model.config.is_encoder_decoder) for task in tasks]
    device = torch.device("cuda" if torch.cuda.is_available() and not config.cpu else "cpu")
    model.to(device)
    if config.gradient_checkpointing:
        # Here and not as a TrainingArgument, whose name changes between transformers 5.17 and 6; the method's does too.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    names = [task.name for task in tasks]
    note = benchmark_note(names)
    result = RunResult(config.method, names, str(output), config.to_dict(), versions(device), [note] if note else [])
    return _Run(config, progress, tasks, encoded, model, tokenizer, result)


def _measured(task: Task, config: TrainConfig) -> Task:
    """The task with the items that this run measures on as its test set."""
    if config.dev_items is not None:
        task = hold_out(task, config.dev_items, SELECTION_SEED)
    if config.eval_items is None or config.eval_items >= len(task.test):
        return task
    chosen = sorted(random.Random(SELECTION_SEED).sample(range(len(task.test)), config.eval_items))
    return replace(task, test=[task.test[index] for index in chosen])


def _learn(run: _Run, index: int) -> LearnedTask:
    """Derive subspaces and train on the `index`-th task."""
    from transformers import PrinterCallback

    from .hf_trainer import StepClock, SubspaceTrainer, optimizer_options, training_arguments

    config, model, task = run.config, run.model, run.tasks[index]
    label = f"task {index + 1}/{len(run.tasks)} {task.name}"
    memory = PeakMemory(model.device)
    memory.reset()
    start = time.perf_counter()
    subspaces = _derive(run, index, label)
    derived = time.perf_counter()
    use_cache = model.config.use_cache
    rows = run.encoded[index].train
    steps = _steps(config, len(rows))
    trace = LeakTrace(subspaces, config.leak_every, steps)
    with tempfile.TemporaryDirectory() as folder, run.progress.bar(f"{label}: training", steps) as advance:
        clock = StepClock(task.name, advance, trace)
        trainer = SubspaceTrainer(
            model=model,
            args=training_arguments(config, folder, index),
            train_dataset=rows,
            data_collator=Collator(model, run.tokenizer),
            callbacks=[clock],
            subspaces=subspaces,
            options=optimizer_options(config),
            fuse_backward=config.fuse_backward,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trace.finish(trainer.state.global_step)
    # Trainer leaves its own use_cache in the config, and autocast wrapped around the forward pass.
    model.config.use_cache = use_cache
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    trained = time.perf_counter()
    peak = memory.read()
    if subspaces is not None:
        run.starts.update(search_starts(subspaces))
    return LearnedTask(
        name=task.name,
        train_items=len(task.train),
        test_items=len(task.test),
        note=task.note,
        steps=trainer.state.global_step,
        derive_seconds=derived - start,
        train_seconds=trained - derived,
        step_seconds=clock.seconds,
        losses=clock.losses,
        peak_memory_bytes=peak,
        layers={
            name: {"shape": list(layer.shape), "rank": layer.rank, "energy": layer.energy}
            for name, layer in (subspaces or {}).items()
        },
        leak={name: leak.total for name, leak in trace.last.items()},
        leak_left={name: leak.left for name, leak in trace.last.items() if leak.left is not None},
        leak_right={name: leak.right for name, leak in trace.last.items() if leak.right is not None},
        leak_over_time=trace.points,
        leak_seconds=trace.seconds,
    )


def _derive(run: _Run, index: int, label: str) -> Subspaces | None:
    config = run.config
    if config.protect is None:
        return None
    run.progress.say(f"{label}: deriving protected subspaces")
    subspaces = Subspaces.from_model(
        run.model,
        protect=Schedule(index + 1, len(run.tasks)) if config.protect == "schedule" else config.protect,
        batches=_importance_batches(run, index) if isinstance(config.protect, Importance) else None,
        previous=run.starts,
        sides=check_sides(config.sides),
        targets=config.targets,
        others="freeze" if config.others == "freeze" else "train",
        basis_dtype=None if config.basis_dtype == "float32" else getattr(torch, config.basis_dtype),
        progress=run.progress.on_terminal,
    )
    # Taken again after the training, which may keep the bases in another form: two of them would be too many.
    run.starts.clear()
    return subspaces


def _importance_batches(run: _Run, index: int) -> list[dict[str, Any]]:
    """Training rows of the task before the `index`-th, whose layers are to be kept; before the first, of its own.

    One row a batch: nothing is padded, in a decoder neither.
    """
    rows = run.encoded[max(index - 1, 0)].train
    chosen = random.Random(SELECTION_SEED).sample(range(len(rows)), min(IMPORTANCE_ROWS, len(rows)))
    collate = Collator(run.model, run.tokenizer)
    return [collate([rows[row]]) for row in sorted(chosen)]


def _steps(config: TrainConfig, rows: int) -> int:
    """Optimizer steps of a task, as Trainer counts them."""
    if config.max_steps is not None:
        return config.max_steps
    batches = math.ceil(rows / config.batch_size)
    return math.ceil(config.epochs * math.ceil(batches / config.gradient_accumulation_steps))


def _evaluate(run: _Run, row: int) -> None:
    """Answer every task's items and add the answers to the result as `row`."""
    start = time.perf_counter()
    label = "zero-shot" if row == 0 else f"after task {row}/{len(run.tasks)}"
    with run.progress.bar(f"{label}: evaluating", sum(len(task.test) for task in run.tasks)) as advance:
        for task, encoded in zip(run.tasks, run.encoded, strict=True):
            answers = greedy_answers(
                run.model,
                run.tokenizer,
                encoded,
                batch_size=run.config.eval_batch_size,
                bf16=run.config.bf16,
                advance=advance,
            )
            run.result.predictions.extend(
                Prediction(row, task.name, item, example.answer, answer)
                for item, (example, answer) in enumerate(zip(task.test, answers, strict=True))
            )
    run.result.evaluation_seconds.append(time.perf_counter() - start)


def _take_over(run: _Run, earlier: RunResult) -> None:
    """Take the answers before the first task from an earlier run; ValueError unless they would be the same."""
    for setting in ZERO_SHOT_SETTINGS:
        theirs, ours = earlier.config.get(setting), run.result.config[setting]
        if theirs != ours:
            raise ValueError(f"zero_shot: that run had {setting}={theirs}, this one has {ours}")
    taken = [prediction for prediction in earlier.predictions if prediction.row == 0]
    wanted = [(task.name, item, example.answer) for task in run.tasks for item, example in enumerate(task.test)]
    if sorted((p.task, p.item, p.answer) for p in taken) != sorted(wanted):
        raise ValueError("zero_shot: that run was not measured on the same items of the same tasks")
    run.result.predictions.extend(taken)
    run.result.evaluation_seconds.append(0.0)

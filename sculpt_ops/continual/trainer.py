"""Continual fine-tuning: a sequence of tasks, each with a fresh `transformers.Trainer` and fresh subspaces.

One process on one device, a GPU where there is one; under torchrun one process a GPU, or several on CPUs. So far it has
been run on CPUs only.
"""

from __future__ import annotations

import functools
import math
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
from ..names import canonical_parameters
from ..ranks import Importance, Schedule
from ..subspaces import Subspaces
from ..targets import resolve_targets
from .benchmark import benchmark_note
from .checkpoint import Checkpoints, Saved, check_same_run, leftovers
from .config import TrainConfig
from .distributed import World, join_world, restarted, shard
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

    Under torchrun every process is to call it; the first writes and reports, all return the same.

    zero_shot: an earlier run of the same model on the same items, whose answers before the first task are taken over.
    quiet: report no progress.

    Raises ValueError for settings, tasks or a model that do not fit and FileExistsError for an output that is not
    empty, both before anything is written; FloatingPointError for a loss that is not finite; TimeoutError or
    ConnectionError where a process does not come or is lost. What one process raises all raise.
    """
    with join_world(config) as world:
        return _train(config, zero_shot, world, quiet)


def _train(config: TrainConfig, zero_shot: RunResult | None, world: World, quiet: bool) -> RunResult:
    if done := world.together("opening the output", lambda: _finished(config)):
        return done
    progress = Progress(quiet or not world.first)
    tasks = world.together("reading the tasks", lambda: _read_tasks(config, world))
    progress.say(f"opening {config.model}")
    # In turns where it is sharded: a machine's memory then has to hold the whole model once, and not for every process.
    opened = (world.in_turns if world.sharded else world.together)("opening the model", lambda: _open(config, world))
    run = world.together("preparing the run", lambda: _prepare(config, world, progress, tasks, *opened))
    if run.saved is None:
        if zero_shot is None:
            _evaluate(run, row=0)
        else:
            world.together("zero_shot", lambda: _take_over(run, zero_shot))
        _write(run)
    for index in range(len(run.result.learned), len(run.tasks)):
        run.result.learned.append(_learn(run, index))
        _evaluate(run, row=index + 1)
        _write(run)
    save_model(run.model, run.tokenizer, Path(config.output) / "model", world)
    run.checkpoints.remove()
    return run.result


@dataclass(frozen=True)
class _Run:
    """starts: of the last task's subspaces, what the search for the next task's may start from. saved: the state that
    the run goes on from."""

    config: TrainConfig
    world: World
    progress: Progress
    tasks: Sequence[Task]
    encoded: Sequence[EncodedTask]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    result: RunResult
    checkpoints: Checkpoints
    saved: Saved | None = None
    starts: dict[str, LayerSubspace] = field(default_factory=dict)


def _resumed(config: TrainConfig) -> bool:
    return config.resume or restarted()


def _finished(config: TrainConfig) -> RunResult | None:
    """The run that is to be resumed, if there is nothing left to do."""
    output = Path(config.output)
    # Removed last, so that a run cut short while it writes its model is not taken for finished.
    if not _resumed(config) or (output / "checkpoint").exists() or not (output / "model").is_dir():
        return None
    result = RunResult.load(output)
    return result if result.complete else None


def _read_tasks(config: TrainConfig, world: World) -> list[Task]:
    """The tasks, after a look at the output folder and the training arguments; writes nothing."""
    from .hf_trainer import training_arguments

    output = Path(config.output)
    if world.first and output.exists():
        _check_output(output, _resumed(config))
    training_arguments(config, str(output), 0)
    return [_measured(task, config) for task in load_tasks(config.tasks, config.order)]


def _open(config: TrainConfig, world: World) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, checked; the model on world.device, or its shards."""
    model, tokenizer = open_model(config.model, config.dtype, config.trust_remote_code)
    limit = longest_input(model)
    if limit is not None and config.max_length > limit:
        raise ValueError(f"max_length: got {config.max_length}, the model has positions for {limit} tokens")
    if config.protect is not None:
        targets = resolve_targets(model, config.targets)
        if config.others == "freeze":
            # Before the model is sharded, which settles for good what has a gradient.
            for name, parameter in canonical_parameters(model)[0].items():
                parameter.requires_grad_(name in targets)
    if config.gradient_checkpointing:
        # Here and not as a TrainingArgument, whose name changes between transformers 5.17 and 6; the method's does too.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if world.sharded:
        shard(model, world)
    else:
        model.to(world.device)
    return model, tokenizer


def _prepare(
    config: TrainConfig,
    world: World,
    progress: Progress,
    tasks: list[Task],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> _Run:
    """The run as it stands: at its beginning, or where it is to go on."""
    encoded = [encode_task(task, tokenizer, config.max_length, model.config.is_encoder_decoder) for task in tasks]
    names = [task.name for task in tasks]
    note = benchmark_note(names)
    settings = config.to_dict() | {"rows_per_step": _rows_per_step(config, world)}
    if world.parallel is not None:
        settings |= {"parallel": world.parallel, "processes": world.size}
    output = str(config.output)
    result = RunResult(config.method, names, output, settings, versions(world.device), [note] if note else [])
    checkpoints = Checkpoints(Path(output), world)
    saved = checkpoints.latest() if _resumed(config) else None
    if saved is not None:
        earlier = saved.result(output)
        check_same_run(earlier.config, settings)
        result = replace(earlier, config=settings, versions=result.versions)
        progress.say(f"resuming task {saved.task + 1}/{len(tasks)} {names[saved.task]} after step {saved.step}")
    return _Run(config, world, progress, tasks, encoded, model, tokenizer, result, checkpoints, saved)


def _check_output(output: Path, resumed: bool) -> None:
    if not output.is_dir() or (any(output.iterdir()) and not resumed):
        raise FileExistsError(f"output: {output} is there and not empty; name a new folder or remove this one")
    if found := leftovers(output):
        raise FileExistsError(
            f"output: {output} holds {', '.join(found)}, which no run has written; name another folder"
        )


def _rows_per_step(config: TrainConfig, world: World) -> int:
    return config.batch_size * config.gradient_accumulation_steps * world.size


def _write(run: _Run) -> None:
    run.world.on_first("writing the results", run.result.save)


def _measured(task: Task, config: TrainConfig) -> Task:
    """The task with the items that this run measures on as its test set."""
    if config.dev_items is not None:
        task = hold_out(task, config.dev_items, SELECTION_SEED)
    if config.eval_items is None or config.eval_items >= len(task.test):
        return task
    chosen = sorted(random.Random(SELECTION_SEED).sample(range(len(task.test)), config.eval_items))
    return replace(task, test=[task.test[index] for index in chosen])


def _learn(run: _Run, index: int) -> LearnedTask:
    """Derive subspaces and train on the `index`-th task, from its saved state where the run is resumed in it."""
    from transformers import PrinterCallback

    from .hf_trainer import SaveEvery, StepClock, SubspaceTrainer, optimizer_options, training_arguments

    config, model, task, world = run.config, run.model, run.tasks[index], run.world
    saved = run.saved if run.saved is not None and run.saved.task == index else None
    label = f"task {index + 1}/{len(run.tasks)} {task.name}"
    memory = PeakMemory(model.device)
    memory.reset()
    start = time.perf_counter()
    if saved is None:
        subspaces = _derive(run, index, label)
        derive_seconds = time.perf_counter() - start
    else:
        subspaces, derive_seconds = saved.subspaces(model)
    use_cache = model.config.use_cache
    rows = run.encoded[index].train
    steps = _steps(config, len(rows), world)
    trace = LeakTrace(subspaces, config.leak_every, steps)
    with tempfile.TemporaryDirectory() as folder, run.progress.bar(f"{label}: training", steps) as advance:
        clock = StepClock(task.name, advance, trace, world)
        trainer = SubspaceTrainer(
            model=model,
            args=training_arguments(config, folder, index, steps),
            train_dataset=rows,
            data_collator=Collator(model, run.tokenizer),
            callbacks=[clock],
            subspaces=subspaces,
            options=optimizer_options(config),
            fuse_backward=config.fuse_backward,
            save=None if config.save_every is None else functools.partial(run.checkpoints.save, index),
            clock=clock,
        )
        trainer.remove_callback(PrinterCallback)
        if config.save_every is not None:
            if saved is None:
                run.checkpoints.begin_task(index, run.result, subspaces, derive_seconds)
            trainer.add_callback(SaveEvery(config.save_every, trainer))
        trainer.train(resume_from_checkpoint=None if saved is None else str(saved.folder))
        trace.finish(trainer.state.global_step)
    # Trainer leaves its own use_cache in the config, and autocast wrapped around the forward pass.
    model.config.use_cache = use_cache
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    peak = memory.read()
    if subspaces is not None:
        run.starts.update(search_starts(subspaces))
    learned = LearnedTask(
        name=task.name,
        train_items=len(task.train),
        test_items=len(task.test),
        note=task.note,
        steps=trainer.state.global_step,
        derive_seconds=derive_seconds,
        train_seconds=clock.elapsed,
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
    everyone = world.share("the task's figures", learned)
    return replace(everyone[0], peak_memory_bytes=max(task.peak_memory_bytes for task in everyone))


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
        basis_dtype=getattr(torch, config.basis_dtype),
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


def _steps(config: TrainConfig, rows: int, world: World) -> int:
    """Optimizer steps of a task, as Trainer counts them."""
    if config.max_steps is not None:
        return config.max_steps
    batches = math.ceil(rows / (config.batch_size * world.size))
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
                world=run.world,
            )
            run.result.predictions.extend(
                Prediction(row, task.name, item, example.answer, answer)
                for item, (example, answer) in enumerate(zip(task.test, answers, strict=True))
            )
    run.result.evaluation_seconds.append(run.world.share("evaluation", time.perf_counter() - start)[0])


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

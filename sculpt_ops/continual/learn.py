"""One task of a run: a fresh `transformers.Trainer`, and what the run's method does before, in and after it."""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

from ..names import list_names
from ..subspaces import Subspaces
from .config import GENERATED, TrainConfig
from .distributed import World
from .encoding import Encoded
from .leak_trace import LeakTrace
from .memory import PeakMemory
from .methods.sculpt import MEASURED_ROWS
from .own_text import generate_rows
from .result import GENERATED_FILE, LearnedTask, write_text
from .run import Run
from .score import majority_rate

__all__ = ["learn", "steps_of"]


def learn(run: Run, index: int) -> None:
    """Train on the `index`-th task, from its saved state where the run is resumed in it, and keep what comes of it."""
    from transformers import PrinterCallback, set_seed

    from .hf_trainer import MethodSteps, SaveEvery, StepClock, SubspaceTrainer, optimizer_options, training_arguments

    config, model, task, world, context = run.config, run.model, run.tasks[index], run.world, run.context(index)
    saved = run.saved if run.saved is not None and run.saved.task == index and run.saved.step is not None else None
    label = f"task {index + 1}/{len(run.tasks)} {task.name}"
    memory = PeakMemory(model.device)
    memory.reset()
    start = time.perf_counter()
    # Whatever was drawn before: a run that is resumed here has drawn nothing.
    set_seed(config.seed + index)
    if saved is None:
        if index == 0 and config.remember_text == GENERATED:
            run.progress.say(f"{label}: generating the text whose inputs are protected")
            run.text = _own_text(run)
            context = run.context(index)
        if config.protects:
            run.progress.say(f"{label}: deriving protected subspaces")
        subspaces = run.method.begin_task(context)
        derive_seconds = time.perf_counter() - start
    else:
        subspaces, derive_seconds = saved.subspaces(model)
        if subspaces is None:
            run.method.begin_task(context)
    if full := [name for name, layer in (subspaces or {}).items() if not layer.block and 0 in layer.free_shape]:
        run.progress.say(
            f"{label}: {len(full)} weights have no free direction left and are not trained: {list_names(full)}"
        )
    # Released before the training.
    run.previous = None
    context = run.context(index)
    use_cache = model.config.use_cache
    rows = run.method.train_rows(context)
    steps = steps_of(config, len(rows), world, index)
    trace = LeakTrace(subspaces, config.leak_every, steps)
    with _folder(config, index) as folder, run.progress.bar(f"{label}: training", steps) as advance:
        clock = StepClock(task.name, advance, trace, world)
        trainer = SubspaceTrainer(
            model=model,
            args=training_arguments(config, folder, index, steps),
            train_dataset=rows,
            data_collator=context.collate,
            callbacks=[clock, MethodSteps(run.method)],
            subspaces=subspaces,
            options=optimizer_options(config),
            fuse_backward=config.fuse_backward,
            penalty=run.method.penalty,
            lengths=[len(row.prompt) + len(row.answer) for row in rows] if config.group_by_length else None,
            save=functools.partial(run.checkpoints.save, index) if config.save_every else None,
            clock=clock,
        )
        trainer.remove_callback(PrinterCallback)
        if config.save_every:
            if saved is None:
                run.checkpoints.begin_task(index, subspaces, derive_seconds)
            trainer.add_callback(SaveEvery(config.save_every))
        if rows:
            with warnings.catch_warnings():
                # A note of the run says it.
                warnings.filterwarnings("ignore", message="protected weights in 16 bit")
                trainer.train(resume_from_checkpoint=None if saved is None else str(saved.folder))
            trace.finish(trainer.state.global_step)
    # Trainer leaves its own use_cache in the config, and autocast wrapped around the forward pass.
    model.config.use_cache = use_cache
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    peak = memory.read()
    run.method.end_task(context)
    carried = _carry(run, subspaces)
    if carried is not None and carried.memory_of_tasks is not None and index + 1 == len(run.tasks):
        run.last = carried
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
            name: {
                "shape": list(layer.shape),
                "rank": layer.rank,
                "energy": layer.energy,
                "protected": list(layer.protected_dims),
            }
            for name, layer in (subspaces or {}).items()
        },
        leak={name: leak.total for name, leak in trace.last.items()},
        leak_left={name: leak.left for name, leak in trace.last.items() if leak.left is not None},
        leak_right={name: leak.right for name, leak in trace.last.items() if leak.right is not None},
        leak_over_time=trace.points,
        leak_seconds=trace.seconds,
        majority=majority_rate((e.answer for e in task.train), [e.answer for e in task.test]) if task.options else None,
        remembered={} if subspaces is None else subspaces.remembered_share(),
        remembered_earlier=[] if subspaces is None else _of_earlier_tasks(subspaces, index),
    )
    everyone = world.share("the task's figures", learned)
    peak = max(task.peak_memory_bytes for task in everyone)
    run.result.learned.append(replace(everyone[0], peak_memory_bytes=peak))
    if run.keeps:
        run.checkpoints.end_task(index, run.result, model, run.method.state(), carried)


def _own_text(run: Run) -> list[Encoded]:
    """What the model writes on the first rank, in the run's folder for whoever wants to see it."""
    config, world = run.config, run.world

    def generate() -> list[Encoded]:
        if not world.first:
            return []
        rows = generate_rows(run.model, run.tokenizer, MEASURED_ROWS, config.max_length, config.seed, config.bf16)
        texts = [run.tokenizer.decode(row.prompt + row.answer, skip_special_tokens=True) for row in rows]
        write_text(Path(config.output) / GENERATED_FILE, "\n\n".join(texts) + "\n")
        return rows

    return world.share("the generated text", world.together("generating text", generate))[0]


def steps_of(config: TrainConfig, rows: int, world: World, index: int) -> int:
    """Optimizer steps of the `index`-th task, of so many rows, as Trainer counts them."""
    if config.max_steps is not None:
        return config.max_steps if rows else 0
    batches = math.ceil(rows / (config.batch_size * world.size))
    return math.ceil(config.epochs_of(index) * math.ceil(batches / config.gradient_accumulation_steps))


def _of_earlier_tasks(subspaces: Subspaces, count: int) -> list[float | None]:
    """Of each of `count` earlier tasks' changes the protected share, the median over the weights."""
    shares = list(subspaces.remembered_shares().values())
    # The last is of the task before; earlier than the first are a remembered text and nothing.
    known = min(map(len, shares), default=0)
    return [median(share[-back] for share in shares) if back <= known else None for back in range(count, 0, -1)]


def _carry(run: Run, subspaces: Subspaces | None) -> Subspaces | None:
    """The subspaces of the task that was learned, where the next task's have a use for them."""
    if subspaces is None:
        return None
    run.previous = subspaces.carry()
    return subspaces if run.previous or run.previous.memory_of_tasks is not None else None


@contextlib.contextmanager
def _folder(config: TrainConfig, index: int) -> Iterator[str]:
    """Where Trainer's reports go: into the run if there are some."""
    if config.report_to != "none":
        yield str(Path(config.output) / "logs" / f"task-{index + 1}")
        return
    with tempfile.TemporaryDirectory() as folder:
        yield folder

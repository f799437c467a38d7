"""Continual fine-tuning: a sequence of tasks, each with a fresh `transformers.Trainer` and fresh subspaces.

One process on one device, a GPU where there is one; under torchrun one process a GPU, or several on CPUs. Several GPUs
have not been tried.
"""

from __future__ import annotations

from pathlib import Path

from .attention import without_cudnn_attention
from .checkpoint import Checkpoints
from .config import TrainConfig
from .distributed import World, join_world
from .learn import learn
from .measure import measure_abilities, measure_row, take_over
from .modeling import save_model
from .prepare import check_finished, finished_run, is_resumed, open_for_training, prepare, read_tasks
from .progress import Progress
from .result import RunResult
from .run import Run
from .settings import keep_settings

__all__ = ["train"]


def train(config: TrainConfig, *, zero_shot: RunResult | None = None, quiet: bool = False) -> RunResult:
    """Learn the tasks in order and measure before the first and after each.

    Subspaces are derived anew before each task from the weights as they stand. The output folder gets run.json,
    predictions.jsonl and state.json (rewritten after each task), settings.yaml, and at the end model/, which
    `from_pretrained` opens.

    With config.resume a run goes on from its last state on disk, and a finished one from its model, if config.tasks has
    more tasks after those that were learned. An added task is measured zero-shot and from the last row before it on; in
    the rows between it is absent.

    Under torchrun every process is to call it; the first writes and reports, all return the same.

    zero_shot: an earlier run of the same model on the same items, whose answers before the first task are taken over.
    quiet: report no progress.

    Raises ValueError for settings, tasks or a model that do not fit and FileExistsError for an output that is not
    empty, both before anything is written; OSError for a disk that is full; FloatingPointError for a loss that is not
    finite; TimeoutError or ConnectionError where a process does not come or is lost. What one process raises all raise.
    """
    with join_world(config) as world, without_cudnn_attention():
        return _train(config, zero_shot, world, quiet)


def _train(config: TrainConfig, zero_shot: RunResult | None, world: World, quiet: bool) -> RunResult:
    progress = Progress(quiet or not world.first)
    tasks = world.together("reading the tasks", lambda: read_tasks(config, world))
    checkpoints = Checkpoints(Path(config.output), world)
    if is_resumed(config):
        checkpoints.settle()
    done = world.together("opening the output", lambda: finished_run(config))
    names = [task.name for task in tasks]
    if done is not None and done.complete and done.tasks == names:
        world.together("opening the output", lambda: check_finished(config, world, tasks, done))
        checkpoints.clear()
        return done
    progress.say(f"opening {config.model}")
    # In turns where it is sharded: a machine's memory then has to hold the whole model once, and not for every process.
    opening = world.in_turns if world.sharded else world.together
    opened = opening("opening the model", lambda: open_for_training(config, world))
    run = world.together("preparing the run", lambda: prepare(config, world, progress, tasks, opened))
    if zero_shot is not None and not run.result.predictions:
        world.together("zero_shot", lambda: take_over(run, zero_shot))
    # An output that cannot be written is found before anything is measured.
    world.on_first("opening the output", lambda: keep_settings(config))
    if run.result.predictions:
        # What is taken over, or what a killed run had not yet written of what it had done.
        run.write()
    measure_row(run, 0)
    measure_abilities(run, "before")
    _go_on(run)
    for index in range(len(run.result.learned), len(run.tasks)):
        # Of the task before; it was killed in between, or has one more task to answer, where anything is missing.
        measure_row(run, index)
        learn(run, index)
    measure_row(run, len(run.tasks))
    state = run.method.state()
    run.method.finish(run.model)
    measure_abilities(run, "after")
    about = {"tasks": names, "carried": bool(state) or run.last is not None}
    checkpoints.carry(names, state, run.last)
    save_model(run.model, run.tokenizer, Path(config.output) / "model", world, about)
    checkpoints.settle()
    checkpoints.clear()
    return run.result


def _go_on(run: Run) -> None:
    """Bring model and method to where the last task ended."""
    run.method.prepare(run.model)
    if run.saved is None:
        return
    state, subspaces = run.saved.carried(run.model)
    run.method.load_state(state)
    if subspaces is not None:
        run.previous = subspaces.carry()
        if subspaces.memory_of_tasks is not None and run.saved.task == len(run.tasks):
            run.last = subspaces
    run.saved.load_weights(run.model, run.world)

"""Everything that can go wrong before the first step: output, tasks, model, and the state that a run goes on from."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..files import check_folder
from ..names import canonical_parameters
from ..remember import Remember
from ..targets import resolve_targets
from .ability import check_sources
from .benchmark import benchmark_note, load_sequence
from .checkpoint import STATE_FILE, Checkpoints, Saved, check_same_run, has_states, leftovers, read_state
from .config import GENERATED, TrainConfig
from .distributed import World, restarted, shard
from .encoding import Encoded, encode_tasks, encode_text
from .environment import versions
from .methods import make_method
from .methods.sculpt import MEASURED_ROWS
from .modeling import check_saved, longest_input, open_model, read_about
from .own_text import check_generates
from .policies import parse_remember
from .progress import Progress
from .result import RUN_FILE, RunResult, resume_command
from .run import Run
from .settings import kept_settings
from .shards import fingerprint
from .tasks import Task, hold_out, load_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    *("check_finished", "finished_run", "is_resumed", "open_for_training", "prepare", "read_tasks", "resumed_at"),
]

# The same for every run, whatever its seed, so that runs are compared on the same items.
SELECTION_SEED = 0
_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}

Opened = tuple["PreTrainedModel", "PreTrainedTokenizerBase", str]


def finished_run(config: TrainConfig) -> RunResult | None:
    """The run that is to be resumed, as it was when its model was written; its tasks may be fewer than those of
    `config`, and there may be results, but no state, of one more that was begun."""
    output = Path(config.output)
    # States go last, so that a run cut short while it writes its model is not taken for finished.
    if not is_resumed(config) or has_states(output) or not (output / "model").is_dir():
        return None
    result, about = RunResult.load(output), read_about(output / "model")
    if about is None:
        return result if result.complete else None
    return result.until(len(about["tasks"]))


def check_finished(config: TrainConfig, world: World, tasks: Sequence[Task], done: RunResult) -> None:
    """ValueError unless a run of these settings and tasks is the one that is `done`, as far as that is known without
    opening the model."""
    check_same_run(done.config, _settings(config, world))
    kept = kept_settings(Path(config.output)) or {}
    before, now = (Path(str(model)) for model in (kept.get("model", done.config["model"]), config.model))
    if before.resolve() != now.resolve():
        raise ValueError(f"resume: the run was started with model={before}, this one has {now}")
    if (state := read_state(Path(config.output))) is not None:
        _check_same_data(state, done.tasks, {task.name: _hash_rows(task) for task in tasks}, state["weights"])
    check_saved(Path(config.output) / "model")


def read_tasks(config: TrainConfig, world: World) -> list[Task]:
    """The tasks, after a look at the output folder and the training arguments; writes nothing."""
    from .hf_trainer import check_reports, check_schedule, training_arguments

    output = Path(config.output)
    if world.first:
        check_folder(output, "output")
        if output.exists():
            _check_output(output, is_resumed(config))
    check_schedule(config)
    training_arguments(config, str(output), 0)
    check_reports(config)
    if config.sequence is None:
        tasks = load_tasks(config.tasks, config.order)
    else:
        (source,) = config.tasks
        if isinstance(source, Task):
            raise ValueError(f"sequence: got {config.sequence!r} with the task {source.name}, wanted a folder of tasks")
        tasks = load_sequence(config.sequence, source).tasks
    if config.task_epochs is not None and len(config.task_epochs) != len(tasks):
        names = ", ".join(task.name for task in tasks)
        raise ValueError(f"task_epochs: got {len(config.task_epochs)} numbers for {len(tasks)} tasks: {names}")
    return [measured_task(task, config) for task in tasks]


def open_for_training(config: TrainConfig, world: World) -> Opened:
    """Model, on world.device or its shards, and tokenizer, checked, and on the first rank a hash of the weights."""
    model, tokenizer = open_model(config.model, config.dtype, config.trust_remote_code)
    limit = longest_input(model)
    if limit is not None and config.max_length > limit:
        raise ValueError(f"max_length: got {config.max_length}, the model has positions for {limit} tokens")
    _check_finite(config, model)
    make_method(config, parallel=world.parallel is not None).check(model, config)
    if config.ability:
        check_sources(config.ability, bool(model.config.is_encoder_decoder))
    if config.remember_text == GENERATED:
        check_generates(model, world.sharded)
    if config.protects:
        targets = resolve_targets(model, config.targets)
        if config.others == "freeze":
            # Before the model is sharded, which settles for good what has a gradient.
            for name, parameter in canonical_parameters(model)[0].items():
                parameter.requires_grad_(name in targets)
    if config.gradient_checkpointing:
        # Here and not as a TrainingArgument, whose name changes between transformers 5.17 and 6; the method's does too.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    weights = fingerprint(model) if world.first else ""
    if world.sharded:
        shard(model, world)
    else:
        model.to(world.device)
    return model, tokenizer, weights


def _check_finite(config: TrainConfig, model: PreTrainedModel) -> None:
    for name, weight in model.named_parameters():
        # A sum of squares may overflow without an infinite term.
        norm = torch.linalg.vector_norm(weight.detach(), dtype=_WIDE.get(weight.dtype))
        if not norm.isfinite() and not weight.isfinite().all():
            raise ValueError(f"model: {config.model} has NaN or Inf in {name}")


def prepare(config: TrainConfig, world: World, progress: Progress, tasks: list[Task], opened: Opened) -> Run:
    """The run as it stands: at its beginning, or where it is to go on."""
    model, tokenizer, weights = opened
    encoded, cut = encode_tasks(tasks, tokenizer, model, config)
    names = [task.name for task in tasks]
    scored = [
        f"{task.name} is measured by {task.metric}, a score from 0 to 1, in place of exact match"
        for task in tasks
        if task.metric != "exact"
    ]
    notes = [*sequence_notes(config, names), *scored, *rounding_notes(config), *cut]
    for note in notes:
        progress.say(note)
    settings = _settings(config, world)
    output = Path(config.output)
    result = RunResult(config.title, names, str(output), settings, versions(world.device), notes)
    rows = {task.name: _hash_rows(task) for task in tasks}
    saved = None
    state = read_state(output) if is_resumed(config) else None
    if state is None and is_resumed(config):
        _check_nothing_learned(output)
        progress.say(f"resume: there is no run in {output}, so that this one begins anew")
    if state is not None:
        saved, earlier = _latest(config, world, len(tasks))
        if earlier is not None:
            check_same_run(earlier.config, settings)
            _check_same_data(state, earlier.tasks, rows, weights if world.first else state["weights"])
            ability = dict(earlier.ability)
            if len(earlier.learned) < len(names):
                ability.pop("after", None)
            result = replace(
                earlier, name=result.name, tasks=names, config=settings, versions=result.versions, ability=ability
            )
            progress.say(resumed_at(saved, names))
    if world.sharded and any(isinstance(each, Remember) for each in parse_remember(config.remember)):
        raise ValueError(
            f"remember: got {config.remember!r} with FSDP, where no process has the whole weights whose change it is; "
            "wanted inputs alone, none, or parallel ddp"
        )
    method = make_method(config, parallel=world.parallel is not None)
    text = remembered_text(config, tokenizer)
    return Run(
        config, world, progress, tasks, encoded, model, tokenizer, method, result, weights, rows, saved, text=text
    )


def sequence_notes(config: TrainConfig, names: Sequence[str]) -> list[str]:
    """What a published sequence lacks, if it lacks anything."""
    note = benchmark_note(names, config.sequence)
    return [] if note is None else [note]


def rounding_notes(config: TrainConfig) -> list[str]:
    """What `AdamW` warns of at its first step, before anything is trained: steps that are rounded to 16-bit weights."""
    if not config.protects or config.dtype == "float32" or config.master != "none":
        return []
    instead = "--master split" if config.dtype == "bfloat16" else "--dtype float32"
    return [
        f"weights in {config.dtype}: each step is rounded to them, so that much of the change ends up in the protected "
        f"space; use {instead}"
    ]


def remembered_text(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """As many rows of the file config.remember_text as of a task; none without one."""
    if config.remember_text in (None, GENERATED):
        return []
    return encode_text(Path(str(config.remember_text)), tokenizer, config.max_length, MEASURED_ROWS)


def _latest(config: TrainConfig, world: World, tasks: int) -> tuple[Saved | None, RunResult | None]:
    """The last state in the output, and the results that go with it."""
    output = Path(config.output)
    if (done := finished_run(config)) is not None:
        return Saved(output, len(done.learned), None, finished=True), done
    saved = Checkpoints(output, world).latest()
    if saved is not None:
        return saved, saved.result(output)
    earlier = RunResult.load(output) if (output / "run.json").exists() else None
    if earlier is not None and earlier.learned:
        if config.save_every is None:
            return None, None
        raise ValueError(
            f"resume: {output} has results of {len(earlier.learned)} tasks, but the state they left is gone from "
            f"{output / 'checkpoint'}; name another output"
        )
    return None, earlier


def _settings(config: TrainConfig, world: World) -> dict[str, Any]:
    """As a run's results hold them."""
    settings = config.to_dict() | {"rows_per_step": config.batch_size * config.gradient_accumulation_steps * world.size}
    if world.parallel is not None:
        settings |= {"parallel": world.parallel, "processes": world.size}
    return settings


def _check_nothing_learned(output: Path) -> None:
    """A run whose state.json is gone is not begun again over what it has learned."""
    earlier = RunResult.load(output) if (output / RUN_FILE).exists() else None
    if has_states(output) or (output / "model").is_dir() or (earlier is not None and earlier.learned):
        raise ValueError(f"resume: {output / STATE_FILE} is missing, without which no run goes on; name another output")


def is_resumed(config: TrainConfig) -> bool:
    return config.resume or restarted()


def resumed_at(saved: Saved | None, names: Sequence[str]) -> str:
    """For people, where a run goes on."""
    if saved is None:
        return "resuming before the first task"
    if saved.task == len(names):
        return "resuming after the last task"
    after = "" if saved.step is None else f" after step {saved.step}"
    return f"resuming task {saved.task + 1}/{len(names)} {names[saved.task]}{after}"


def _check_same_data(state: dict[str, object], earlier: list[str], rows: dict[str, str], weights: str) -> None:
    if state["weights"] != weights:
        raise ValueError("resume: the run was started from other weights than model has now (their hashes differ)")
    known = state["rows"]
    assert isinstance(known, dict)
    if list(rows)[: len(earlier)] != earlier:
        raise ValueError(
            f"resume: the run was started with the tasks {', '.join(earlier)}, wanted the same, or more after them, "
            f"got {', '.join(rows)}"
        )
    # An added task is in run.json first: a run killed right then has learned nothing of it.
    if changed := [name for name in earlier if known.get(name, rows[name]) != rows[name]]:
        raise ValueError(f"resume: the rows of task {changed[0]} are not those that the run was started with")


def _hash_rows(task: Task) -> str:
    """Of everything that decides what is trained on and how answers count."""
    digest = hashlib.sha256(json.dumps([task.metric, task.options and list(task.options)]).encode())
    for part in (task.train, task.test):
        for example in part:
            digest.update(f"{len(example.prompt)} {example.prompt} {len(example.answer)} {example.answer}\n".encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _check_output(output: Path, resumed: bool) -> None:
    if any(output.iterdir()) and not resumed:
        ours = (output / STATE_FILE).exists()
        advice = f"{resume_command(output)} goes on with its run, or " if ours else ""
        raise FileExistsError(f"output: {output} is there and not empty; {advice}name a new folder")
    if found := leftovers(output):
        raise FileExistsError(
            f"output: {output} holds {', '.join(found)}, which no run has written; name another folder"
        )


def measured_task(task: Task, config: TrainConfig) -> Task:
    """The task with the items that this run measures on as its test set."""
    if config.dev_items is not None:
        task = hold_out(task, config.dev_items, SELECTION_SEED)
    if config.eval_items is None or config.eval_items >= len(task.test):
        return task
    chosen = sorted(random.Random(SELECTION_SEED).sample(range(len(task.test)), config.eval_items))
    return replace(task, test=[task.test[index] for index in chosen])

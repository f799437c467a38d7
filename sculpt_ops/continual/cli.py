"""The `sculpt` command. Needs typer, which comes with pip install sculpt-ops[train]."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from ..files import check_folder
from ..layer import Sides, check_sides
from ..ranks import Importance
from .config import MOMENT_DTYPES, OTHERS, TrainConfig
from .options import with_settings
from .policies import parse_protect

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # The boxed help cuts long option names off at 80 columns.
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Argument(help="Model folder (or hub name) that from_pretrained opens.")]
Protect = Annotated[str, typer.Option(help="A share of the directions such as 0.5, or rank:64, energy:0.9.")]
SideNames = Annotated[str, typer.Option(help=f"Sides to protect: {', '.join(get_args(Sides))}.")]
Targets = Annotated[list[str] | None, typer.Option(help="Glob pattern of weights to protect; may be given repeatedly.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")]


def _version(asked: bool) -> None:
    if asked:
        from .. import __version__

        typer.echo(f"sculpt-ops {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Continual full fine-tuning in protected subspaces."""


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Wrong use ends in one line and exit code 2, a run that diverged or lost a process in one and 1; a fault keeps its
    traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1 if isinstance(error, FloatingPointError | ConnectionError | TimeoutError) else 2) from error


@app.command()
@with_settings
def train(
    settings: dict[str, Any],
    config: Annotated[Path | None, typer.Option(help="YAML file of settings by name; flags win over it.")] = None,
    zero_shot: Annotated[
        Path | None, typer.Option(help="Run of the same model and tasks whose answers before training are taken over.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show tasks, steps, ranks, memory and an estimated time; write nothing.")
    ] = False,
    add: Annotated[
        list[str] | None,
        typer.Option(help="One more task for the run that --resume goes on with; may be given repeatedly."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Learn TASKS one after the other, measure on them after each, and write a report.

    A run that was stopped, or is to learn one more task, goes on with --output RUN --resume alone.
    """
    from .distributed import is_first_process
    from .settings import SETTINGS_FILE, check_files, make_config

    with _one_line_errors():
        chosen = make_config(config, settings, add or ())
        if "RANK" not in os.environ:  # under torchrun what is wrong with that comes first
            check_files(chosen)
        if dry_run:
            from .estimate import estimate

            typer.echo(estimate(chosen).table())
            return
        from .report import write_report
        from .result import RunResult, resume_command
        from .trainer import train as run

        try:
            result = run(chosen, zero_shot=None if zero_shot is None else RunResult.load(zero_shot), quiet=quiet)
        except KeyboardInterrupt:
            if is_first_process():
                kept = (Path(chosen.output) / SETTINGS_FILE).exists()
                goes_on = f"{resume_command(chosen.output)} goes on" if kept else "nothing was changed"
                typer.echo(f"stopped; {goes_on}", err=True)
            raise typer.Exit(130) from None
        if is_first_process():
            typer.echo(write_report([result], chosen.output))
            if not quiet:
                metrics = result.metrics
                kind, figure = "average accuracy", metrics.average_accuracy.value
                if math.isnan(figure):  # of a bound
                    kind, figure = "learning accuracy", metrics.learning_accuracy.value
                typer.echo(f"{kind} {100 * figure:.1f} %; the model is in {chosen.output}/model", err=True)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `sculpt train` wrote; the first is the baseline.")],
    output: Annotated[Path, typer.Option(help="Folder for report.md and its pictures.")] = Path("report"),
) -> None:
    """Compare runs of the same tasks side by side."""
    from .report import write_report
    from .result import RunResult

    with _one_line_errors():
        typer.echo(write_report([RunResult.load(run) for run in runs], output))


@app.command()
def inspect(
    model: Model,
    protect: Protect = "0.5",
    sides: SideNames = TrainConfig.sides,
    targets: Targets = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for inspect.md with every weight's spectrum and the ranks of other policies."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Show every matrix, not every kind of matrix.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Show what of MODEL would be protected: kind of layer, number, shape, rank, energy held."""
    from ..derive import progress_bar
    from ..subspaces import Subspaces
    from ..targets import resolve_targets
    from .modeling import open_weights

    with _one_line_errors():
        share = parse_protect(protect)
        if share is None:
            raise ValueError("protect: got none, there is nothing to inspect")
        if isinstance(share, str | Importance):
            raise ValueError(f"protect: got {protect}, which depends on tasks; wanted a share, or such as schedule:2:5")
        if output is not None:
            check_folder(output, "output")
        opened = open_weights(model, trust_remote_code=trust_remote_code)
        subspaces = Subspaces.from_model(opened, protect=share, sides=check_sides(sides), targets=targets)
        if output is None:
            typer.echo(subspaces.summary(kinds=not every))
            return
        from .inspection import write_inspection

        summaries = {f"--protect {protect} --sides {sides}": subspaces.summary()}
        with progress_bar(len(resolve_targets(opened, targets)), True) as advance:
            typer.echo(write_inspection(opened, Path(model).name, output, targets, advance, summaries))


@app.command()
def bench(
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("bench-results"),
    seconds: Annotated[float, typer.Option(help="Time for all tables.")] = 240.0,
    only: Annotated[list[str] | None, typer.Option(help="This table: projections, models, optimizer_step, ...")] = None,
    rank: Annotated[list[int] | None, typer.Option(help="Of single projections; may be given repeatedly.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tiny sizes on the CPU; its figures mean nothing.")
    ] = False,
) -> None:
    """Measure the ops on this GPU against torch's own; writes JSON, a table and a roofline."""
    from ..bench import main

    with _one_line_errors():
        arguments = ["--output", str(output), "--seconds", str(seconds), *(["--dry-run"] if dry_run else [])]
        arguments += [word for table in only or () for word in ("--only", table)]
        arguments += [word for number in rank or () for word in ("--rank", str(number))]
        raise typer.Exit(main(arguments))


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Folder, config.json, hub name, or a known one such as llama-2-7b.")],
    gpu: Annotated[str | None, typer.Option(help="What it has to fit: 80GB, 24GiB, or a name such as H100.")] = None,
    tokens: Annotated[int, typer.Option(help="In one forward pass.")] = 4096,
    batch_size: Annotated[int | None, typer.Option(help="Rows they come in; not given, as few as can be.")] = None,
    protect: Annotated[
        list[str] | None, typer.Option(help="A share such as 0.5, or rank:64; may be given repeatedly.")
    ] = None,
    sides: SideNames = TrainConfig.sides,
    targets: Targets = None,
    others: Annotated[str, typer.Option(help=f"Weights without a basis: {', '.join(OTHERS)}.")] = "train",
    dtype: Annotated[str | None, typer.Option(help="Of the weights: float32 or bfloat16; not given, both.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16/--no-bf16", help="bfloat16 autocast over float32 weights.")] = True,
    moment_dtype: Annotated[
        str | None, typer.Option(help=f"Of our moments: {', '.join(MOMENT_DTYPES)}; not given, AdamW's own choice.")
    ] = None,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing")] = False,
    peers: Annotated[bool, typer.Option(help="Compare with PEFT and mini_trainer, for twice the time.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Bytes and seconds as JSON.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Show what memory and least time MODEL takes to train, every way there is; needs its config, not its weights."""
    from .plan import make_plan
    from .plan.gpus import find_gpu
    from .plan.table import show_plan

    with _one_line_errors():
        made = make_plan(
            model,
            protect=[parse_protect(share) for share in protect or ["0.5"]],
            sides=sides,
            targets=targets,
            others=others,
            dtypes=("float32", "bfloat16") if dtype is None else (dtype,),
            bf16=bf16,
            moment_dtype=moment_dtype,
            tokens=tokens,
            batch_size=batch_size,
            gradient_checkpointing=gradient_checkpointing,
            gpu=None if gpu is None else find_gpu(gpu),
            peers=peers,
            trust_remote_code=trust_remote_code,
        )
        typer.echo(json.dumps(made.to_dict(), indent=1) if as_json else show_plan(made))


@app.command()
def doctor() -> None:
    """Show versions, devices and which kernels are there, and what to do about what is missing."""
    from .doctor import examine

    findings = examine()
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        typer.echo(f"{finding.what:<{width}}  {finding.found}")
        if finding.advice:
            typer.echo(f"{'':<{width}}  -> {finding.advice}")

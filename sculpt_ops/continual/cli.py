"""The `sculpt` command. Needs typer, which comes with pip install sculpt-ops[train]."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, get_args

import typer

from ..layer import Sides, check_sides
from ..ranks import Importance
from .config import DTYPES, OTHERS, TrainConfig, parse_protect

app = typer.Typer(
    help="Continual full fine-tuning in protected subspaces.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # The boxed help cuts long option names off at 80 columns.
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Argument(help="Model folder (or hub name) that from_pretrained opens.")]
Protect = Annotated[
    str,
    typer.Option(
        help="A share such as 0.5, or rank:64, energy:0.9, importance:0.1:0.8 (mrr and trr), schedule ((i - 1) / n at "
        "task i of n); none is plain fine-tuning."
    ),
]
SideNames = Annotated[str, typer.Option(help=f"Sides to protect: {', '.join(get_args(Sides))}.")]
Targets = Annotated[list[str] | None, typer.Option(help="Glob pattern of weights to protect; may be given repeatedly.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")]


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Wrong use ends in one line and exit code 2, a run that diverged in one and 1; a fault keeps its traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1 if isinstance(error, FloatingPointError) else 2) from error


@app.command()
def train(
    model: Model,
    tasks: Annotated[list[Path], typer.Argument(help="Task folders, or folders of task folders, in training order.")],
    output: Annotated[Path, typer.Option(help="New folder for the model, run.json, predictions.jsonl and the report.")],
    protect: Protect = "0.5",
    sides: SideNames = TrainConfig.sides,
    targets: Targets = None,
    others: Annotated[str, typer.Option(help=f"Weights without a basis: {', '.join(OTHERS)}.")] = TrainConfig.others,
    order: Annotated[str | None, typer.Option(help="Names of the tasks to take, in order: a,b,c.")] = None,
    name: Annotated[str | None, typer.Option(help="What the report calls this run.")] = None,
    lr: float = TrainConfig.lr,
    epochs: Annotated[float, typer.Option(help="Per task.")] = TrainConfig.epochs,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps per task, in place of epochs.")] = None,
    batch_size: int = TrainConfig.batch_size,
    gradient_accumulation_steps: int = TrainConfig.gradient_accumulation_steps,
    max_length: Annotated[int, typer.Option(help="Tokens of prompt and answer together.")] = TrainConfig.max_length,
    weight_decay: float = TrainConfig.weight_decay,
    lr_scheduler_type: Annotated[str, typer.Option(help="Per task.")] = TrainConfig.lr_scheduler_type,
    warmup_steps: Annotated[float, typer.Option(help="Steps, or below 1 a share of them.")] = TrainConfig.warmup_steps,
    max_grad_norm: Annotated[float, typer.Option(help="0 does not clip.")] = TrainConfig.max_grad_norm,
    dtype: Annotated[str, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}.")] = TrainConfig.dtype,
    bf16: Annotated[bool, typer.Option("--bf16", help="bfloat16 autocast over float32 weights.")] = False,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing")] = False,
    eval_items: Annotated[int | None, typer.Option(help="Test rows per task, always the same ones.")] = None,
    eval_batch_size: int = TrainConfig.eval_batch_size,
    dev_items: Annotated[
        int | None, typer.Option(help="Measure on this many held-out training rows per task, not on the test rows.")
    ] = None,
    zero_shot: Annotated[
        Path | None, typer.Option(help="Earlier run of the same model and items whose zero-shot answers to take over.")
    ] = None,
    seed: int = TrainConfig.seed,
    cpu: Annotated[bool, typer.Option("--cpu", help="Leave the GPU alone.")] = False,
    trust_remote_code: RemoteCode = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Learn TASKS one after the other, measure on all of them after each, and write a report."""
    from .report import write_report
    from .result import RunResult
    from .trainer import train as run

    with _one_line_errors():
        config = TrainConfig(
            model=model,
            tasks=tasks,
            output=output,
            protect=parse_protect(protect),
            sides=sides,
            targets=targets,
            others=others,
            order=None if order is None else [part.strip() for part in order.split(",")],
            name=name,
            lr=lr,
            epochs=epochs,
            max_steps=max_steps,
            batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            max_length=max_length,
            weight_decay=weight_decay,
            lr_scheduler_type=lr_scheduler_type,
            warmup_steps=warmup_steps,
            max_grad_norm=max_grad_norm,
            dtype=dtype,
            bf16=bf16,
            gradient_checkpointing=gradient_checkpointing,
            eval_items=eval_items,
            eval_batch_size=eval_batch_size,
            dev_items=dev_items,
            seed=seed,
            cpu=cpu,
            trust_remote_code=trust_remote_code,
        )
        result = run(config, zero_shot=None if zero_shot is None else RunResult.load(zero_shot), quiet=quiet)
        typer.echo(write_report([result], output))


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
    trust_remote_code: RemoteCode = False,
) -> None:
    """Show what of MODEL would be protected: layer, shape, rank, energy held."""
    from ..subspaces import Subspaces
    from .modeling import open_model

    with _one_line_errors():
        share = parse_protect(protect)
        if share is None:
            raise ValueError("protect: got none, there is nothing to inspect")
        if isinstance(share, str | Importance):
            raise ValueError(f"protect: got {protect}, which depends on tasks; wanted a share, or such as schedule:2:5")
        opened, _ = open_model(model, trust_remote_code=trust_remote_code)
        typer.echo(Subspaces.from_model(opened, protect=share, sides=check_sides(sides), targets=targets).summary())


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

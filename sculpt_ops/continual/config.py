"""The settings of one continual fine-tuning run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..layer import check_sides
from ..optim.options import DecayTo, State
from ..optim.precision import Master
from ..ranks import Energy, Fraction, Importance, Rank, RankPolicy, Schedule, as_policy
from .tasks import Task

# What to protect in a sequence of tasks: "schedule" is `Schedule(i, n)` at task i of n, None nothing.
Protect = float | RankPolicy | Importance | Literal["schedule"] | None

OTHERS = ("train", "freeze")
DTYPES = ("float32", "bfloat16", "float16")
STATES: tuple[State, ...] = get_args(State)
MASTERS: tuple[Master, ...] = get_args(Master)
DECAY_TO: tuple[DecayTo, ...] = get_args(DecayTo)
PARALLEL = ("fsdp", "ddp")
MOMENT_DTYPES = ("float32", "bfloat16")
CHOICES: dict[str, Sequence[str | None]] = {
    "others": OTHERS,
    "dtype": DTYPES,
    "state": STATES,
    "master": MASTERS,
    "moment_dtype": (None, *MOMENT_DTYPES),
    "basis_dtype": DTYPES,
    "decay_to": DECAY_TO,
    "parallel": (None, *PARALLEL),
}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `train`. Field names that `transformers.TrainingArguments` also has mean the same there.

    model: folder (or hub name) that `from_pretrained` opens, decoder-only or encoder-decoder.
    tasks: in training order; each entry a `Task`, a task folder, or a folder of task folders (taken by name).
    output: folder to make; it gets model/, run.json and predictions.jsonl.
    protect: share of the singular directions to protect: a float, `Rank`, `Energy`, `Importance` (measured on training
        rows of the task before, at the first task on its own) or "schedule", `Schedule(i, n)` at task i of n; None is
        plain fine-tuning with the same optimizer.
    sides, targets, others: as in `Subspaces.from_model`; without effect where protect is None.
    basis_dtype: the bases are stored in; without effect where protect is None.
    state: as in `AdamW`; without effect where protect is None.
    master, moment_dtype, decay_to: as in `AdamW`; a master other than "none" needs dtype="bfloat16". The low bits of
        master="split" last for one task: the next starts from the bfloat16 weights.
    fuse_backward: step every weight as soon as its gradient is there (`fuse_into_backward`): the gradients never exist
        together. Needs max_grad_norm=0, and state="subspace" where gradients are accumulated.
    order: task names in the order wanted, a selection of those in `tasks`; None takes them as they come.
    name: what the report calls this run; None makes one up from protect and sides.
    epochs, max_steps: per task; max_steps, where given, wins.
    batch_size: rows per forward pass of one process; times gradient_accumulation_steps times processes rows per
        optimizer step. Of an epoch's last step the missing rows are taken from its start.
    max_length: tokens of prompt and answer together (encoder-decoder: of the prompt); a longer prompt loses its middle.
    warmup_steps: steps, or below 1 a share of the task's steps.
    max_grad_norm: 0 does not clip. Protected gradients are projected before they are clipped.
    dtype: of the weights. bf16: autocast over float32 weights.
    eval_items: test rows per task, a selection that is the same for every run; None is all of them.
    dev_items: hold this many training rows per task out and measure on them in place of the test rows, which are then
        not looked at: for choosing a learning rate.
    leak_every: measure the leak every so many optimizer steps and after the last; None is about ten times a task, 0
        only after the last step.
    seed: of data order and dropout.
    cpu: leave a GPU that is there alone.
    parallel: how the processes that torchrun started share the work: "fsdp" shards weights, gradients, bases and
        moments (FSDP2), "ddp" has them whole on each. None is "fsdp", or what accelerate launch was configured for.
    ddp_timeout: seconds that a process waits for the others before it gives up.
    save_every: keep the whole state in output/checkpoint at the start of each task and every so many optimizer steps;
        0 only at the start of each task, None never.
    resume: go on from the last state in `output`, from the start if there is none; torchrun's restarts always do.
    """

    model: str | Path
    tasks: Sequence[Task | str | Path]
    output: str | Path
    protect: Protect = 0.5
    sides: str = "both"
    targets: str | Sequence[str] | None = None
    others: str = "train"
    basis_dtype: str = "float32"
    state: str = "full"
    master: str = "none"
    moment_dtype: str | None = None
    decay_to: str = "zero"
    fuse_backward: bool = False
    order: Sequence[str] | None = None
    name: str | None = None
    lr: float = 1e-5
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    max_length: int = 512
    weight_decay: float = 0.0
    lr_scheduler_type: str = "constant"
    warmup_steps: float = 0
    max_grad_norm: float = 1.0
    dtype: str = "float32"
    bf16: bool = False
    gradient_checkpointing: bool = False
    eval_items: int | None = None
    eval_batch_size: int = 16
    dev_items: int | None = None
    leak_every: int | None = None
    seed: int = 0
    cpu: bool = False
    trust_remote_code: bool = False
    parallel: str | None = None
    ddp_timeout: int = 300
    save_every: int | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        check_sides(self.sides)
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wanted one of {', '.join(map(str, allowed))}")
        for name in (
            "lr",
            "epochs",
            "batch_size",
            "gradient_accumulation_steps",
            "max_length",
            "eval_batch_size",
            "ddp_timeout",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted more than 0")
        for name in ("max_steps", "eval_items", "dev_items"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted 1 or more, or None")
        for name in ("weight_decay", "warmup_steps", "max_grad_norm", "leak_every", "save_every"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted 0 or more")
        if self.protect is not None and self.protect != "schedule":
            as_policy(self.protect)
        self._check_combinations()
        if not self.tasks:
            raise ValueError("tasks: got none, wanted at least one task or task folder")

    def _check_combinations(self) -> None:
        if self.master != "none" and self.dtype != "bfloat16":
            raise ValueError(f"master: got {self.master!r} with dtype {self.dtype!r}, wanted dtype bfloat16")
        if self.protect is not None and self.state == "subspace" and self.sides == "block":
            raise ValueError(
                "state: got 'subspace' with sides 'block', whose free space has no coordinates; wanted 'full'"
            )
        if not self.fuse_backward:
            return
        if self.max_grad_norm > 0:
            raise ValueError(
                f"fuse_backward: got True with max_grad_norm {self.max_grad_norm}, whose norm needs all gradients "
                "together; wanted max_grad_norm 0"
            )
        if self.gradient_accumulation_steps > 1 and self.state != "subspace":
            raise ValueError(
                f"fuse_backward: got True with gradient_accumulation_steps {self.gradient_accumulation_steps} and "
                f"state {self.state!r}; wanted 1 step or state 'subspace'"
            )

    @property
    def method(self) -> str:
        """What the report calls the run."""
        if self.name is not None:
            return self.name
        return "plain" if self.protect is None else f"protect {format_protect(self.protect)}, {self.sides}"

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON can hold them; tasks by name or path, protect as `parse_protect` reads it."""
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        settings["tasks"] = [task.name if isinstance(task, Task) else str(task) for task in self.tasks]
        settings["protect"] = format_protect(self.protect)
        settings["name"] = self.method
        for name in ("model", "output"):
            settings[name] = str(settings[name])
        if self.protect is None:
            settings.update(sides=None, targets=None, others=None, basis_dtype=None, state=None)
        for name in ("targets", "order"):
            if settings[name] is not None and not isinstance(settings[name], str):
                settings[name] = list(settings[name])
        return settings


def parse_protect(text: str) -> Protect:
    """Read a protected share: "0.5", "rank:64", "energy:0.9", "importance" or "importance:0.1:0.8", "none".

    "schedule" follows the run's tasks, "schedule:2:5" stands for task 2 of 5 throughout.
    """
    kind, *numbers = text.split(":")
    try:
        match kind, numbers:
            case "none", []:
                return None
            case "schedule", []:
                return "schedule"
            case "schedule", [task, n_tasks]:
                return Schedule(int(task), int(n_tasks))
            case "rank", [rank]:
                return Rank(int(rank))
            case "energy", [share]:
                return Energy(float(share))
            case "importance", [] | [_, _]:
                return Importance(*map(float, numbers))
        return float(text)
    except ValueError as error:
        raise ValueError(
            f"protect: got {text!r}, wanted a share as 0.5, or rank:64, energy:0.9, importance:0.1:0.8, schedule, none"
        ) from error


def format_protect(protect: Protect) -> str:
    """The inverse of `parse_protect`."""
    match protect:
        case None:
            return "none"
        case str():
            return protect
        case float() | Fraction():
            return f"{protect if isinstance(protect, float) else protect.share:g}"
    values: list[float] = [getattr(protect, field.name) for field in fields(protect)] if is_dataclass(protect) else []
    return ":".join([type(protect).__name__.lower(), *(f"{value:g}" for value in values)])

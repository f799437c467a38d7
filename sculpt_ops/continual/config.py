"""The settings of one continual fine-tuning run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from ..layer import Sides, check_sides
from ..optim.options import DecayTo, State
from ..optim.precision import Master
from ..ranks import as_policy
from ..remember import RememberInputs
from .benchmark import SEQUENCES
from .defaults import AUTO, left_open
from .policies import Protect, format_protect, parse_protect, parse_remember
from .tasks import Task

__all__ = ["Protect", "TrainConfig", "format_protect", "parse_protect", "parse_remember"]

OTHERS = ("train", "freeze")
# Of remember_text, in the place of a file.
GENERATED = "generated"
DTYPES = ("float32", "bfloat16", "float16")
STATES: tuple[State, ...] = get_args(State)
MASTERS: tuple[Master, ...] = get_args(Master)
DECAY_TO: tuple[DecayTo, ...] = get_args(DecayTo)
PARALLEL = ("fsdp", "ddp")
MOMENT_DTYPES = ("float32", "bfloat16")
EVAL_ROWS = ("all", "seen", "learned")
METHODS = (
    *("sculpt", "random", "first", "plain", "interpolate", "lora", "o-lora", "peft-osf", "replay", "ewc"),
    *("multitask", "per-task"),
)
# That derive subspaces before each task, that have any, and that train PEFT's adapters on the same weights.
DERIVING_METHODS = ("sculpt", "random")
SUBSPACE_METHODS = (*DERIVING_METHODS, "first")
ADAPTER_METHODS = ("lora", "o-lora", "peft-osf")


def about(
    help: str,
    *,
    choices: Sequence[str] | None = None,
    above: float | None = None,
    least: float | None = None,
    methods: Sequence[str] = METHODS,
) -> dict[str, Any]:
    """A field's metadata: what the command line says about it, the values it may have beside None, where it may be
    that (one of `choices`, more than `above`, `least` or more), and the methods that have a use for it."""
    return {"help": help, "choices": choices, "above": above, "least": least, "methods": methods}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `train`; every field's metadata says what it means, as `sculpt train --help` shows it.

    Field names that `transformers.TrainingArguments` also has mean the same there. ValueError, with the field's name,
    for values that are out of range or exclude each other.

    model: decoder-only or encoder-decoder.
    tasks: in training order; each entry a `Task`, a task folder, or a folder of task folders (taken by name).
    method: "plain" is the same optimizer without projection, as "sculpt" is with protect None.
    protect, remember, others, lr: `AUTO` ("auto") takes what did best for the method, and stands here as that
        afterwards; see `defaults.left_open`.
    protect: a float, `Rank`, `Energy`, `Importance` (measured on training rows of the task before, at the first task on
        its own) or "schedule", `Schedule(i, n)` at task i of n; None is plain fine-tuning with the same optimizer. Of
        "peft-osf" a float.
    sides, targets, others, basis_dtype, state: as in `Subspaces.from_model` and `AdamW`; without effect where nothing
        is protected, but for the targets of adapters. master, moment_dtype, decay_to: as in `AdamW`. The low bits of
        master="split" last for one task: the next starts from the bfloat16 weights.
    fuse_backward: as `fuse_into_backward`: the gradients never exist together. Needs max_grad_norm=0, and
        state="subspace" where gradients are accumulated.
    max_steps: wins over epochs. batch_size: times gradient_accumulation_steps times processes rows per optimizer step;
        of an epoch's last step the missing rows are taken from its start.
    max_length: of an encoder-decoder, of the prompt alone; a longer prompt loses its middle.
    max_grad_norm: protected gradients are projected before they are clipped.
    eval_items, dev_items: a selection that is the same for every run; with dev_items the test rows are not looked at.
    parallel: None is "fsdp", or what accelerate launch was configured for.
    save_every: 0 keeps the state between two tasks, None nothing. resume: torchrun's restarts always do. From
        a folder alone `settings.make_config` makes the settings of its run.
    """

    model: str | Path = field(metadata=about("Model folder (or hub name) that from_pretrained opens."))
    tasks: Sequence[Task | str | Path] = field(
        metadata=about("Task folders, or folders of task folders, in training order.")
    )
    output: str | Path = field(metadata=about("New folder for the model, run.json, predictions.jsonl and the report."))
    protect: Protect = field(
        default=AUTO,
        metadata=about(
            "Of the singular directions of the weights: a share such as 0.5, or rank:64, energy:0.9, "
            "importance:0.1:0.8 (mrr and trr), schedule ((i - 1) / n at task i of n); none is plain fine-tuning. "
            "Default: only what is remembered is protected.",
            methods=(*SUBSPACE_METHODS, "peft-osf"),
        ),
    )
    remember: str | None = field(
        default=AUTO,
        metadata=about(
            "Protect what earlier tasks have changed: rank:0.12 (a share, or a number, of each change's singular "
            "directions), inputs:0.95 (energy of the inputs of each layer), both joined by +, none. Default: "
            "inputs:0.95; none where --protect is given.",
            methods=DERIVING_METHODS,
        ),
    )
    remember_text: str | Path | None = field(
        default=None,
        metadata=about(
            "Text file whose inputs are protected from the first task on, for what the model can do already; "
            "generated: text that the model writes itself. With inputs remembered.",
            methods=DERIVING_METHODS,
        ),
    )
    sides: str = field(
        default="both", metadata=about("Sides to protect.", choices=get_args(Sides), methods=SUBSPACE_METHODS)
    )
    targets: str | Sequence[str] | None = field(
        default=None,
        metadata=about(
            "Glob pattern of weights to protect; may be given repeatedly.",
            methods=(*SUBSPACE_METHODS, *ADAPTER_METHODS),
        ),
    )
    others: str = field(
        default=AUTO,
        metadata=about(
            "Weights without a basis. Default: freeze; train where --protect is given.",
            choices=OTHERS,
            methods=SUBSPACE_METHODS,
        ),
    )
    basis_dtype: str = field(
        default="float32", metadata=about("Of the bases.", choices=DTYPES, methods=SUBSPACE_METHODS)
    )
    state: str = field(
        default="full",
        metadata=about(
            "Adam's moments, of the whole weight or of its free space.", choices=STATES, methods=SUBSPACE_METHODS
        ),
    )
    master: str = field(
        default="none", metadata=about("What bfloat16 weights have beside them to lose no small step.", choices=MASTERS)
    )
    moment_dtype: str | None = field(
        default=None, metadata=about("Of Adam's moments; not given, AdamW's own choice.", choices=MOMENT_DTYPES)
    )
    decay_to: str = field(
        default="zero", metadata=about("Where weight decay pulls, to nothing or to a task's start.", choices=DECAY_TO)
    )
    fuse_backward: bool = field(
        default=False, metadata=about("Step each weight during the backward pass; not with clipping.")
    )
    method: str = field(
        default="sculpt",
        metadata=about(
            "What is done against forgetting: sculpt protects subspaces, random others of equal rank, first those of "
            "the first weights; plain does nothing; multitask and per-task are bounds.",
            choices=METHODS,
        ),
    )
    lora_rank: int = field(
        default=8, metadata=about("Of the adapters of lora and o-lora.", above=0, methods=("lora", "o-lora"))
    )
    lora_alpha: int = field(
        default=32, metadata=about("Over the rank, what their product counts.", above=0, methods=("lora", "o-lora"))
    )
    olora_lambda: float = field(
        default=0.5, metadata=about("Weight of o-lora's orthogonality.", least=0, methods=("o-lora",))
    )
    ewc_lambda: float = field(default=1e5, metadata=about("Weight of ewc's penalty.", least=0, methods=("ewc",)))
    ewc_rows: int = field(
        default=64, metadata=about("Rows of each task that ewc's Fisher is taken from.", above=0, methods=("ewc",))
    )
    replay_share: float = field(
        default=0.05, metadata=about("Of each earlier task's rows, in replay.", above=0, methods=("replay",))
    )
    interpolation: float = field(
        default=0.5,
        metadata=about("Share of each task's change that interpolate keeps.", above=0, methods=("interpolate",)),
    )
    order: Sequence[str] | None = field(default=None, metadata=about("Names of the tasks to take, in order: a,b,c."))
    sequence: str | None = field(
        default=None,
        metadata=about(
            "Published order of the tasks in TASKS; those that are missing are named.", choices=tuple(SEQUENCES)
        ),
    )
    name: str | None = field(default=None, metadata=about("What the report calls this run."))
    lr: float = field(
        default=AUTO,
        metadata=about(
            "Learning rate; not given, what did best for the method on a small model: 1e-4, with --protect and plain "
            "2e-5. Larger models want less.",
            above=0,
        ),
    )
    epochs: float = field(default=1.0, metadata=about("Per task.", above=0))
    task_epochs: Sequence[float] | None = field(
        default=None, metadata=about("Of each task, in order, in place of epochs: 5,3,7.")
    )
    max_steps: int | None = field(
        default=None, metadata=about("Optimizer steps per task, in place of epochs.", least=1)
    )
    batch_size: int = field(default=8, metadata=about("Rows per forward pass of one process.", above=0))
    gradient_accumulation_steps: int = field(default=1, metadata=about("Forward passes per optimizer step.", above=0))
    max_length: int = field(default=512, metadata=about("Tokens of prompt and answer together.", above=0))
    chat_template: bool = field(
        default=False, metadata=about("Put every prompt into the tokenizer's chat template, as a user's turn.")
    )
    group_by_length: bool = field(default=False, metadata=about("Rows of similar length share a batch."))
    weight_decay: float = field(default=0.0, metadata=about("Of matrices; biases and norms have none.", least=0))
    lr_scheduler_type: str = field(default="constant", metadata=about("Per task."))
    warmup_steps: float = field(default=0, metadata=about("Steps, or below 1 a share of them.", least=0))
    max_grad_norm: float = field(default=1.0, metadata=about("0 does not clip.", least=0))
    dtype: str = field(default="float32", metadata=about("Of the weights.", choices=DTYPES))
    bf16: bool = field(default=False, metadata=about("bfloat16 autocast over float32 weights."))
    gradient_checkpointing: bool = field(
        default=False, metadata=about("Compute activations again in the backward pass.")
    )
    eval_items: int | None = field(default=None, metadata=about("Test rows per task; not given, all.", least=1))
    eval_rows: str = field(
        default="all",
        metadata=about(
            "Measure after each task on all of them, on those seen so far, or on the one just learned; after the last "
            "on all.",
            choices=EVAL_ROWS,
        ),
    )
    eval_batch_size: int = field(default=16, metadata=about("Prompts that are answered together.", above=0))
    eval_options: bool = field(
        default=True, metadata=about("Of tasks with options, find the likeliest option too, by log-probability.")
    )
    ability: Sequence[str | Path] | None = field(
        default=None,
        metadata=about(
            "Files that the model is measured on before the first task and after the last: text for its perplexity, "
            ".jsonl of multiple-choice questions (question, options, answer); may be given repeatedly."
        ),
    )
    ability_items: int | None = field(default=None, metadata=about("Questions of each such file.", least=1))
    dev_items: int | None = field(
        default=None,
        metadata=about("Measure on this many held-out training rows per task, not on the test rows.", least=1),
    )
    leak_every: int | None = field(
        default=None,
        metadata=about(
            "Measure the leak every so many steps, 0 only after the last; not given, about ten times.", least=0
        ),
    )
    report_to: str = field(
        default="none", metadata=about("Where Trainer logs to as well: tensorboard, wandb, ... (a,b for several).")
    )
    seed: int = field(default=0, metadata=about("Of data order and dropout.", least=0))
    cpu: bool = field(default=False, metadata=about("Leave the GPU alone."))
    trust_remote_code: bool = field(default=False, metadata=about("Run model code that comes with the checkpoint."))
    parallel: str | None = field(
        default=None, metadata=about("How processes under torchrun share the work.", choices=PARALLEL)
    )
    ddp_timeout: int = field(default=300, metadata=about("Seconds to wait for other processes.", above=0))
    save_every: int | None = field(
        default=0,
        metadata=about("Optimizer steps from one checkpoint to the next; 0 only between tasks, none never.", least=0),
    )
    resume: bool = field(
        default=False,
        metadata=about("Go on with the run in the output, with the settings that are kept there; flags win over them."),
    )

    def __post_init__(self) -> None:
        for name, value in left_open(self).items():
            object.__setattr__(self, name, value)
        if isinstance(self.tasks, str | Path | Task):
            object.__setattr__(self, "tasks", (self.tasks,))
        check_sides(self.sides)
        given: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            _check(entry, value)
            # "train" is also what `others` is left as where there are no bases.
            if value != entry.default and (entry.name, value) != ("others", "train"):
                given[entry.name] = value
        check_used(self.method, given)
        if self.protect is not None and self.protect != "schedule":
            as_policy(self.protect)
        self._check_combinations()
        if not self.tasks:
            raise ValueError("tasks: got none, wanted at least one task or task folder")

    def epochs_of(self, index: int) -> float:
        """Of the `index`-th task."""
        return self.epochs if self.task_epochs is None else self.task_epochs[index]

    def measured_after(self, row: int, count: int) -> range:
        """Indices of the tasks, of `count`, that are measured after `row` of them: before the first and after the last
        all."""
        if row in (0, count) or self.eval_rows == "all":
            return range(count)
        return range(row) if self.eval_rows == "seen" else range(row - 1, row)

    def _check_combinations(self) -> None:
        if self.seed >= 2**31:
            raise ValueError(f"seed: got {self.seed}, wanted less than 2^31")
        if self.sequence is not None and (self.order is not None or len(self.tasks) != 1):
            other = f"order {','.join(self.order)}" if self.order is not None else f"{len(self.tasks)} tasks"
            raise ValueError(f"sequence: got {self.sequence!r} with {other}, wanted one folder of tasks and no order")
        if self.task_epochs is not None and not all(epochs > 0 for epochs in self.task_epochs):
            raise ValueError(f"task_epochs: got {list(self.task_epochs)}, wanted more than 0 for each task")
        if self.master != "none" and self.dtype != "bfloat16":
            raise ValueError(f"master: got {self.master!r} with dtype {self.dtype!r}, wanted dtype bfloat16")
        if self.method == "peft-osf" and not (isinstance(self.protect, float) and 0.0 < self.protect < 1.0):
            raise ValueError(
                f"protect: got {format_protect(self.protect)} with method 'peft-osf', wanted a share between 0 and 1"
            )
        if self.replay_share > 1.0 or self.interpolation > 1.0:
            name = "replay_share" if self.replay_share > 1.0 else "interpolation"
            raise ValueError(f"{name}: got {getattr(self, name)}, wanted a share in (0, 1]")
        if self.protects and self.state == "subspace" and self.sides == "block":
            raise ValueError(
                "state: got 'subspace' with sides 'block', whose free space has no coordinates; wanted 'full'"
            )
        if self.remember is not None:
            self._check_remember(self.remember)
        elif self.protects and isinstance(self.protect, float) and self.protect == 0.0:
            raise ValueError(
                "protect: got 0 with remember none, which protects nothing; wanted remember inputs:0.95 with it, or "
                "method plain; given neither, both are so"
            )
        if self.remember_text is not None and not self.remembers_inputs:
            raise ValueError(
                f"remember_text: got {str(self.remember_text)!r} with remember {self.remember or 'none'}, wanted one "
                "with inputs"
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

    def _check_remember(self, remember: str) -> None:
        parse_remember(remember)
        if self.protect is None:
            raise ValueError(
                f"remember: got {remember!r} with protect none, wanted protect 0 for what is remembered alone"
            )
        if self.sides == "block":
            raise ValueError(f"remember: got {remember!r} with sides 'block', wanted 'both', 'left' or 'right'")

    @property
    def protects(self) -> bool:
        """Whether there are protected subspaces."""
        return self.method in SUBSPACE_METHODS and self.protect is not None

    @property
    def adam_dtype(self) -> str | None:
        """Of Adam's moments, None for `AdamW`'s choice. In float16 the squares of gradients and eps would be 0, and the
        first step would be infinite."""
        return "float32" if self.moment_dtype is None and self.dtype == "float16" else self.moment_dtype

    @property
    def remembers_inputs(self) -> bool:
        """Whether the inputs of earlier tasks are protected."""
        return any(isinstance(each, RememberInputs) for each in parse_remember(self.remember))

    @property
    def title(self) -> str:
        """What the report calls the run."""
        if self.name is not None:
            return self.name
        if not self.protects:
            return "plain" if self.method in SUBSPACE_METHODS else self.method
        remembered = "" if self.remember is None else f", remember {self.remember}"
        remembered += "" if self.remember_text is None else f" and {Path(self.remember_text).name}"
        method = "" if self.method == "sculpt" else f"{self.method}, "
        return f"{method}protect {format_protect(self.protect)}, {self.sides}{remembered}"

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON can hold them; tasks by name or path, protect as `parse_protect` reads it."""
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        settings["tasks"] = [task.name if isinstance(task, Task) else str(task) for task in self.tasks]
        settings["protect"] = format_protect(self.protect)
        settings["name"] = self.title
        for name in ("model", "output", "remember_text"):
            settings[name] = None if settings[name] is None else str(settings[name])
        if not self.protects:
            settings.update(sides=None, others=None, basis_dtype=None, state=None)
            settings["protect"] = settings["protect"] if self.method == "peft-osf" else "none"
            settings["targets"] = settings["targets"] if self.method in ("lora", "o-lora", "peft-osf") else None
        if self.ability is not None:
            settings["ability"] = [Path(source).name for source in self.ability]
        for name in ("targets", "order", "task_epochs"):
            if settings[name] is not None:
                settings[name] = [settings[name]] if isinstance(settings[name], str) else list(settings[name])
        return settings


def check_used(method: str, given: Mapping[str, Any]) -> None:
    """ValueError for the first of the settings `given`, by name, that `method` has no use for; None and `AUTO` ask for
    nothing."""
    for entry in fields(TrainConfig):
        value = given.get(entry.name)
        methods = entry.metadata["methods"]
        if value is not None and value != AUTO and method not in methods:
            shown = format_protect(value) if entry.name == "protect" else repr(value)
            raise ValueError(
                f"{entry.name}: got {shown} with method {method!r}, which has no use for it; leave it out, or take "
                f"another method ({', '.join(methods)})"
            )


def _check(entry: Field[Any], value: Any) -> None:
    # Annotations are text here.
    optional = "None" in str(entry.type)
    if value is None and optional:
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{entry.name}: got {value}, wanted a finite number")
    choices, above, least = (entry.metadata.get(limit) for limit in ("choices", "above", "least"))
    if choices is not None and value not in choices:
        wanted = (None, *choices) if optional else choices
        raise ValueError(f"{entry.name}: got {value!r}, wanted one of {', '.join(map(str, wanted))}")
    if above is not None and not value > above:
        raise ValueError(f"{entry.name}: got {value}, wanted more than {above}")
    if least is not None and not value >= least:
        raise ValueError(f"{entry.name}: got {value}, wanted {least} or more{', or None' if optional else ''}")

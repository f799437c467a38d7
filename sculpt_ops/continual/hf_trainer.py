"""`transformers.Trainer` with the projected optimizer, and the callback that times and reports its steps."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from ..binding import unwrap_optimizer
from ..dtensor import is_fsdp
from ..optim import AdamW, fuse_into_backward
from ..optim.backward import FusedBackward
from ..subspaces import Subspaces
from .config import TrainConfig
from .distributed import World
from .encoding import IGNORED
from .leak_trace import LeakTrace
from .methods import Method
from .sampler import LengthGrouped
from .shards import load_training, save_training

CLOCK_FILE = "clock.json"
SCHEDULER_FILE = "scheduler.pt"
STATE_FILE = "trainer_state.json"


def training_arguments(config: TrainConfig, folder: str, task: int, steps: int = 1) -> TrainingArguments:
    """`config` as `TrainingArguments` for the `task`-th task, of `steps` optimizer steps. Nothing is saved; reported
    is where config.report_to says, under `folder`."""
    cuda = torch.cuda.is_available() and not config.cpu
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        num_train_epochs=config.epochs_of(task),
        max_steps=-1 if config.max_steps is None else config.max_steps,
        learning_rate=config.lr,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.bf16,
        seed=config.seed + task,
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        report_to=_reports(config),
        save_strategy="no",
        eval_strategy="no",
        push_to_hub=False,
        # 20 losses however long the task is. Of a share of the steps Trainer says on resuming that it has changed.
        logging_steps=max(math.ceil(0.05 * steps), 1),
        # The filter replaces a loss of nan by the mean before it, which hides a run that diverged.
        logging_nan_inf_filter=False,
        disable_tqdm=True,
    )
    # More than one visible GPU would mean DataParallel, which copies the weights anew in every forward pass.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _reports(config: TrainConfig) -> list[str]:
    return [name.strip() for name in config.report_to.split(",") if name.strip() not in ("", "none")]


def check_reports(config: TrainConfig) -> None:
    """ValueError for a report that transformers does not know, or whose package is not there."""
    try:
        for callback in get_reporting_integration_callbacks(_reports(config)):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise ValueError(f"report_to: got {config.report_to!r}: {error}") from error


def check_schedule(config: TrainConfig) -> None:
    """ValueError for a schedule that transformers does not know, or that wants more than its name."""
    try:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        get_scheduler(config.lr_scheduler_type, optimizer, num_warmup_steps=0, num_training_steps=2)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"lr_scheduler_type: got {config.lr_scheduler_type!r}, wanted one that takes no more than its name, such "
            f"as constant, linear or cosine ({error})"
        ) from error


def optimizer_options(config: TrainConfig) -> dict[str, Any]:
    """Of `config`, the keyword arguments of `AdamW` that `TrainingArguments` has no place for."""
    return {
        "state": config.state,
        "master": config.master,
        "moment_dtype": None if config.adam_dtype is None else getattr(torch, config.adam_dtype),
        "decay_to": config.decay_to,
    }


class SubspaceTrainer(Trainer):
    """Trains with `sculpt_ops.AdamW`; subspaces None is the same optimizer without projection.

    options: further keyword arguments of `AdamW`. fuse_backward: step in the backward pass (`fuse_into_backward`).
    save: called with the step and a function that writes this rank's part of the state into a folder, from which
        `train(resume_from_checkpoint=folder)` goes on; None saves nothing. clock: whose figures are part of the state.
    penalty: of a model, a tensor that is added to the loss of every optimizer step, or None. lengths: of the training
        rows, to have those of similar length in one batch; None shuffles them all.

    A model that `fully_shard` has sharded is trained as it is. Gradients are reduced in every pass of an accumulated
    step: kept whole until the last one, they would take as much memory as the weights that were sharded to save it.
    """

    def __init__(
        self,
        *args: Any,
        subspaces: Subspaces | None = None,
        options: Mapping[str, Any] | None = None,
        fuse_backward: bool = False,
        save: Callable[[int, Callable[[Path], None]], None] | None = None,
        clock: StepClock | None = None,
        penalty: Callable[[torch.nn.Module], torch.Tensor | None] = lambda model: None,
        lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        # accelerate marks what it has prepared, and would leave the next task's model without autocast.
        self.model.__dict__.pop("_is_accelerate_prepared", None)
        if is_fsdp(self.model):
            # For evaluation, as accelerate has it: autocast, but not DDP around the sharded model.
            self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.subspaces = subspaces
        self.save_state = save
        self.clock = clock
        self.penalty = penalty
        self.lengths = lengths
        self.options = dict(options or {})
        self.fuse_backward = fuse_backward
        self._fused: FusedBackward | None = None
        if self.options.get("state") == "subspace":
            self.add_callback(CompressGradients)

    def _move_model_to_device(self, model: torch.nn.Module, device: torch.device) -> None:
        # Sharded parameters are there already, and to() would put others in the place of those that have a basis.
        if not is_fsdp(model):
            super()._move_model_to_device(model, device)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGrouped(self.lengths, rows, self.args.seed)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        model = self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(model))
        named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        groups = [
            {"params": [pair for pair in named if pair[0] in decayed], "weight_decay": self.args.weight_decay},
            {"params": [pair for pair in named if pair[0] not in decayed], "weight_decay": 0.0},
        ]
        self.optimizer = AdamW(
            [group for group in groups if group["params"]],
            lr=self.args.learning_rate,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
            subspaces=self.subspaces,
            seed=self.args.seed,
            **self.options,
        )
        if self.fuse_backward:
            steps = self.args.gradient_accumulation_steps
            self._fused = fuse_into_backward(model, self.optimizer, accumulation_steps=steps)
        return self.optimizer

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss as a share of the whole optimizer step's, in which every token counts the same.

        Encoder-decoder models take any keyword argument and so seem to divide by the tokens of the step, but return the
        mean over the pass: the sum over accumulated passes and processes would grow with their number.
        """
        if num_items_in_batch is None or not self.model.config.is_encoder_decoder:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        else:
            tokens = inputs["labels"].ne(IGNORED).sum()
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            # Gradients are averaged over the processes.
            loss = loss * (tokens / num_items_in_batch * self.accelerator.num_processes)
        if model.training and (penalty := self.penalty(self.model)) is not None:
            # Trainer itself divides what is no share of the step by the passes in it.
            divided = num_items_in_batch is None or not self.model_accepts_loss_kwargs
            loss = loss + (penalty if divided else penalty / self.current_gradient_accumulation_steps)
        return (loss, outputs) if return_outputs else loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            # Hooks of the weights, which are the next task's too.
            if self._fused is not None:
                self._fused.remove()

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        """Clip by the optimizer's own norm, which does not count gradient that is thrown away."""
        return cast(AdamW, unwrap_optimizer(self.optimizer)).clip_grad_norm_(self.args.max_grad_norm)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor | None:
        # Without clipping Trainer would clip to infinity for a norm to log: one more pass over all gradients, of what
        # is not yet projected.
        return grad_norm

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        if self.save_state is not None:
            self.save_state(self.state.global_step, self._write)

    def _write(self, folder: Path) -> None:
        """This rank's part; what is the same on all ranks is the first one's."""
        save_training(folder, self.model, unwrap_optimizer(self.optimizer))
        self._save_rng_state(str(folder))
        if self.args.process_index == 0:
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_FILE)
            self.state.save_to_json(str(folder / STATE_FILE))
            if self.clock is not None:
                (folder / CLOCK_FILE).write_text(json.dumps(self.clock.figures()), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Weights are loaded together with the optimizer's state, which is not there yet."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        optimizer = unwrap_optimizer(self.optimizer)
        load_training(folder, self.model, optimizer)
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_FILE, weights_only=True))
        for group, lr in zip(optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = lr
        if self.clock is not None:
            self.clock.restore(json.loads((folder / CLOCK_FILE).read_text(encoding="utf-8")))


class CompressGradients(TrainerCallback):
    """Between the passes of one accumulated step, gradients are kept in free coordinates only."""

    def on_substep_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        cast(AdamW, unwrap_optimizer(optimizer)).compress_gradients()


class SaveEvery(TrainerCallback):
    """Has the state saved every so many steps.

    Not after a task's last step: Trainer takes one step too many when it resumes there. Losses are logged with it:
    Trainer starts their mean anew when it resumes.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 and state.global_step < state.max_steps:
            control.should_save = control.should_log = True


class MethodSteps(TrainerCallback):
    """What a method does right before and after every optimizer step."""

    def __init__(self, method: Method) -> None:
        self.method = method

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        self.method.before_step(unwrap_optimizer(optimizer))

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        self.method.after_step(unwrap_optimizer(optimizer))


class StepClock(TrainerCallback):
    """Seconds from the end of one optimizer step to the end of the next, losses, progress, and the leak.

    The leak is measured between two steps and is part of neither. On a GPU work is queued: single intervals say little,
    their median over a run is the step's time. earlier: seconds of training before the run was resumed.
    """

    def __init__(self, task: str, advance: Callable[[int], None], trace: LeakTrace, world: World | None = None) -> None:
        self.task = task
        self.advance = advance
        self.trace = trace
        self.world = world
        self.seconds: list[float] = []
        self.losses: list[tuple[int, float]] = []
        self.earlier = 0.0
        self._start = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds of training, those before the run was resumed included."""
        return self.earlier + time.perf_counter() - self._start

    def figures(self) -> dict[str, Any]:
        """What `restore` takes to go on counting."""
        return {
            "seconds": self.seconds,
            "losses": self.losses,
            "elapsed": self.elapsed,
            "leak_points": self.trace.points,
            "leak_seconds": self.trace.seconds,
        }

    def restore(self, figures: Mapping[str, Any]) -> None:
        self.seconds = list(figures["seconds"])
        self.losses = [(step, loss) for step, loss in figures["losses"]]
        self.earlier = figures["elapsed"]
        self.trace.points = [(step, median, largest) for step, median, largest in figures["leak_points"]]
        self.trace.seconds = figures["leak_seconds"]
        self.advance(len(self.seconds))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self.advance(1)
        self.trace.on_step(state.global_step)
        self._last = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._last = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        # train_loss is the mean over the whole task, logged at its end.
        for name, loss in (logs or {}).items():
            if name == "train_loss" and self.world is not None:
                # The other losses are means over the ranks; of this one each has its own.
                loss = sum(self.world.share("the loss", loss))
            if name in ("loss", "train_loss") and not math.isfinite(loss):
                raise FloatingPointError(
                    f"task {self.task}: the loss is {loss} by step {state.global_step}; try a smaller lr"
                )
            if name == "loss":
                self.losses.append((state.global_step, loss))

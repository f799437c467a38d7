"""`transformers.Trainer` with the projected optimizer, and the callback that times and reports its steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..binding import unwrap_optimizer
from ..optim import AdamW, fuse_into_backward
from ..optim.backward import FusedBackward
from ..subspaces import Subspaces
from .config import TrainConfig
from .leak_trace import LeakTrace


def training_arguments(config: TrainConfig, folder: str, task: int) -> TrainingArguments:
    """`config` as `TrainingArguments` for the `task`-th task. Nothing is saved, reported or logged elsewhere."""
    cuda = torch.cuda.is_available() and not config.cpu
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        num_train_epochs=config.epochs,
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
        report_to="none",
        save_strategy="no",
        eval_strategy="no",
        push_to_hub=False,
        # A share of the task's steps: 20 losses however long it is.
        logging_steps=0.05,
        # The filter replaces a loss of nan by the mean before it, which hides a run that diverged.
        logging_nan_inf_filter=False,
        disable_tqdm=True,
    )
    # More than one visible GPU would mean DataParallel, which copies the weights anew in every forward pass.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def optimizer_options(config: TrainConfig) -> dict[str, Any]:
    """Of `config`, the keyword arguments of `AdamW` that `TrainingArguments` has no place for."""
    return {
        "state": config.state,
        "master": config.master,
        "moment_dtype": None if config.moment_dtype is None else getattr(torch, config.moment_dtype),
        "decay_to": config.decay_to,
    }


class SubspaceTrainer(Trainer):
    """Trains with `sculpt_ops.AdamW`; subspaces None is the same optimizer without projection.

    options: further keyword arguments of `AdamW`. fuse_backward: step in the backward pass (`fuse_into_backward`).
    """

    def __init__(
        self,
        *args: Any,
        subspaces: Subspaces | None = None,
        options: Mapping[str, Any] | None = None,
        fuse_backward: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.subspaces = subspaces
        self.options = dict(options or {})
        self.fuse_backward = fuse_backward
        self._fused: FusedBackward | None = None
        if self.options.get("state") == "subspace":
            self.add_callback(CompressGradients)

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


class StepClock(TrainerCallback):
    """Seconds from the end of one optimizer step to the end of the next, losses, progress, and the leak.

    The leak is measured between two steps and is part of neither. On a GPU work is queued: single intervals say little,
    their median over a run is the step's time.
    """

    def __init__(self, task: str, advance: Callable[[int], None], trace: LeakTrace) -> None:
        self.task = task
        self.advance = advance
        self.trace = trace
        self.seconds: list[float] = []
        self.losses: list[tuple[int, float]] = []

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
            if name in ("loss", "train_loss") and not math.isfinite(loss):
                raise FloatingPointError(
                    f"task {self.task}: the loss is {loss} by step {state.global_step}; try a smaller lr"
                )
            if name == "loss":
                self.losses.append((state.global_step, loss))

"""`transformers.Trainer` with the projected optimizer, and the callback that times and reports its steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..optim import AdamW
from ..subspaces import Subspaces
from .config import TrainConfig


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


class SubspaceTrainer(Trainer):
    """Trains with `sculpt_ops.AdamW`; subspaces None is the same optimizer without projection."""

    def __init__(self, *args: Any, subspaces: Subspaces | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.subspaces = subspaces

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
            # Clipping has projected the gradients already.
            project="update" if self.args.max_grad_norm > 0 else "both",
        )
        return self.optimizer

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        """Project, then clip: the norm is not to count gradient that is thrown away."""
        if self.subspaces is not None:
            self.subspaces.project_gradients()
        return super()._clip_grad_norm(model)


class StepClock(TrainerCallback):
    """Seconds from the end of one optimizer step to the end of the next, losses, and progress.

    On a GPU work is queued: single intervals say little, their median over a run is the step's time.
    """

    def __init__(self, task: str, advance: Callable[[int], None]) -> None:
        self.task = task
        self.advance = advance
        self.seconds: list[float] = []
        self.losses: list[tuple[int, float]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        self.advance(1)

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

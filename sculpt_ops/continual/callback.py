"""For a `transformers.Trainer`, or one of TRL's, of one's own: the optimizer, and the leak in its logs."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..optim import AdamW
from ..subspaces import Subspaces

__all__ = ["LeakCallback", "optimizer_for_trainer"]


def optimizer_for_trainer(
    subspaces: Subspaces | None, args: TrainingArguments, **options: Any
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes to train with `sculpt_ops.AdamW`.

    subspaces: of the model as it is trained, on the device it is trained on; not one that FSDP replaces parameters of.
    args: learning rate, betas, eps and the seed come from these. options: further keyword arguments of `AdamW`.

    Trainer clips gradients before they are projected: the norm then counts what is thrown away. With
    args.max_grad_norm=0 it does not clip.
    """
    settings = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "seed": args.seed,
        "subspaces": subspaces,
    }
    return AdamW, settings | options


class LeakCallback(TrainerCallback):
    """Logs the leak of `subspaces` with the loss: `leak`, the median over the protected weights of `LayerLeak.total`,
    and `leak_max`, the largest.

    They are in trainer.state.log_history and in what is printed. Reporting callbacks (TensorBoard, ...) run before
    those that a Trainer is given: `add_to` puts this one in front of them.
    """

    def __init__(self, subspaces: Subspaces) -> None:
        self.subspaces = subspaces
        self._protected = [name for name, layer in subspaces.items() if layer.protects]

    def add_to(self, trainer: Trainer) -> LeakCallback:
        """In place of `trainer.add_callback`; returns self."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or not self._protected:
            return
        leaks = self.subspaces.leak()
        shares = [leaks[name].total for name in self._protected]
        figures = {"leak": statistics.median(shares), "leak_max": max(shares)}
        logs.update(figures)
        # A copy of the logs, made before the callbacks are called.
        state.log_history[-1].update(figures)

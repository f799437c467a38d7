"""The optimizer's step inside the backward pass: full gradients of all parameters never exist together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..binding import unwrap_optimizer
from .adamw import AdamW

__all__ = ["FusedBackward", "fuse_into_backward"]


class FusedBackward:
    """What `fuse_into_backward` registered; `remove()` ends it."""

    def __init__(self, optimizer: AdamW, parameters: Sequence[Tensor], accumulation_steps: int) -> None:
        self._optimizer = optimizer
        self._every = accumulation_steps
        self._handles: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(self._take) for parameter in parameters
        ]
        self._handles.append(optimizer.register_step_post_hook(self._count_anew))
        optimizer._in_backward = True
        # GradScaler then hands its scale to `step`, which refuses it; otherwise it would fail on missing gradients with
        # a bare assertion.
        self._took_scale = getattr(optimizer, "_step_supports_amp_scaling", False)
        optimizer._step_supports_amp_scaling = True

    def remove(self) -> None:
        """Step in `optimizer.step()` again. Compressed gradients that wait go into the next step."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._optimizer._in_backward = False
        self._optimizer._step_supports_amp_scaling = self._took_scale

    @torch.no_grad()
    def _take(self, parameter: Tensor) -> None:
        counts = self._optimizer._waiting.passes
        passes = counts.get(parameter, 0) + 1
        counts[parameter] = passes % self._every
        if passes == self._every:
            self._optimizer._step(parameter)
            parameter.grad = None
        else:
            self._optimizer._compress([parameter])

    def _count_anew(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._optimizer._waiting.passes.clear()


def fuse_into_backward(model: nn.Module, optimizer: Any, *, accumulation_steps: int = 1) -> FusedBackward:
    """Step each parameter of `model` as soon as its gradient is complete, and free the gradient.

    optimizer: a `sculpt_ops.AdamW`, or a wrapper that keeps one as `.optimizer`. Go on calling `step()` after the
        backward pass: it steps what is left over (an incomplete accumulation at the end of an epoch), runs step hooks,
        `Subspaces.guard` among them, and refuses a GradScaler. Learning rates are read during the backward pass: let
        the scheduler step after `step()`, as usual.
    accumulation_steps: backward passes to a step. Gradients of parameters with a basis wait in free coordinates
        (state="subspace" is needed for it), others in `.grad`.

    Activation checkpointing must be the non-reentrant one: the other completes the gradient of a shared parameter in
    parts. Clipping by the norm of all gradients is impossible here: `clip_grad_norm_` of the optimizer refuses, and
    torch's finds no gradients and returns 0.

    Returns a handle whose `remove()` ends it. Raises TypeError for another optimizer and for a model in
    DistributedDataParallel, ValueError for `accumulation_steps` below 1 or above 1 with state="full", and RuntimeError
    if it was fused already or holds gradients.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError(
            "model: got a DistributedDataParallel, which adds up gradients over the ranks after they have been stepped "
            "with; shard the model with fully_shard instead"
        )
    inner = unwrap_optimizer(optimizer)
    if not isinstance(inner, AdamW):
        raise TypeError(f"optimizer must be a sculpt_ops.AdamW or wrap one, got {type(inner).__name__}")
    if accumulation_steps < 1:
        raise ValueError(f"accumulation_steps must be 1 or more, got {accumulation_steps}")
    if accumulation_steps > 1 and not inner._options.in_coordinates:
        raise ValueError(
            f"accumulation_steps must be 1 with state='full', whose gradients have the size of the weights; got "
            f"{accumulation_steps}"
        )
    if inner._in_backward:
        raise RuntimeError("the optimizer steps in the backward pass already; remove() the earlier handle first")
    held = set(inner._parameters())
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter in held]
    if not parameters:
        raise ValueError("the optimizer holds no parameter of the model that requires grad")
    if any(parameter.grad is not None for parameter in parameters):
        raise RuntimeError("gradients are there already; call step() or zero_grad() first")
    return FusedBackward(inner, parameters, accumulation_steps)

"""AdamW's elementwise work on a list of tensors, as far as it comes before the projection of the step. Private op.

The arithmetic is in ``csrc/common/adam.h``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .checks import refuse_gradients
from .library import AFTER_AUTOGRAD, LIBRARY

__all__ = ["adam_"]

_ADAM_ = torch.ops.sculpt._adam_.default


def adam_(
    steps: Sequence[Tensor],
    grads: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    counts: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    lows: Sequence[Tensor | None],
    starts: Sequence[Tensor | None],
    lr: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
) -> None:
    """Count the step, take the moments on, and write AdamW's step (Loshchilov and Hutter 2019, algorithm 2).

    ``counts += 1``; ``steps = -lr (m / (1 - beta1^count)) / (sqrt(v / (1 - beta2^count)) + eps) - lr weight_decay W``
    with m, v the new moments and W the weight, or its distance from the start. Nothing is added to a weight. Computed
    in float32; ``lr`` and ``counts`` are read where they are, so that a CUDA graph follows them.

    Args:
        steps, firsts, seconds: float32; written. One of each for every gradient, contiguous, of its shape.
        grads: float32 or bfloat16.
        counts: one float32 number each: steps taken so far; written.
        weights: float32 or bfloat16; None has no decay.
        lows: int16 beside bfloat16 weights, see :func:`sculpt_ops.ops.rounding.join_halves`; or None.
        starts: of the weight's dtype, what is subtracted from it; or None.
        lr: one number, float32 or float64.

    What is written shares no memory with anything else. In grad mode no gradient or weight may require grad.

    Raises:
        ValueError, TypeError, RuntimeError: naming the argument, what was given and what was wanted; nothing has been
            written.
    """
    hyperparameters = {"beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
    _ADAM_(steps, grads, firsts, seconds, counts, weights, lows, starts, lr, **hyperparameters)


def _check(
    steps: Sequence[Tensor],
    grads: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    counts: Sequence[Tensor],
    *others: Sequence[Tensor | None],
) -> None:
    """Counts and shapes; the device's kernel checks the rest."""
    named = {"steps": steps, "firsts": firsts, "seconds": seconds, "counts": counts}
    named.update(zip(("weights", "lows", "starts"), others, strict=True))  # type: ignore[arg-type]
    for name, tensors in named.items():
        if len(tensors) != len(grads):
            raise ValueError(
                f"_adam_: {name}: given {len(tensors)} entries, wanted {len(grads)}, one for each of grads"
            )
        for i, (tensor, grad) in enumerate(zip(tensors, grads, strict=True)):
            if tensor is not None and name != "counts" and tensor.shape != grad.shape:
                raise ValueError(
                    f"_adam_: {name}: given shape {tuple(tensor.shape)} in entry {i}, wanted {tuple(grad.shape)}"
                )


@torch.library.register_fake("sculpt::_adam_")
def _adam_fake_(*args: Any, **_: Any) -> None:
    _check(*args[:8])


def _adam_autograd_(keyset: Any, *args: Any, **hyperparameters: Any) -> None:
    steps, grads, firsts, seconds, counts, weights, *_ = args
    _check(*args[:8])
    for name, tensors in (("steps", steps), ("grads", grads), ("weights", weights)):
        for tensor in tensors:
            refuse_gradients("_adam_", **{name: tensor})
    _ADAM_.redispatch(keyset & AFTER_AUTOGRAD, *args, **hyperparameters)
    torch.autograd.graph.increment_version((*steps, *firsts, *seconds, *counts))


LIBRARY.impl("_adam_", _adam_autograd_, "Autograd", with_keyset=True)
LIBRARY.impl("_adam_", reference.adam_, "CUDA")

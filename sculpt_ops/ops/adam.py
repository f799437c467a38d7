"""AdamW's elementwise work on a list of tensors, as far as it comes before the projection of the step. Private op.

The arithmetic is in ``csrc/common/adam.h``. On a GPU ``csrc/cuda/adam.cu`` does it where it was built, and the twin in
:mod:`sculpt_ops.reference` elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..triton_kernels.tables import is_capturing
from .checks import dtype_name, refuse_gradients
from .heuristics import gpu_of
from .library import AFTER_AUTOGRAD, LIBRARY
from .variants import cuda_missing

__all__ = ["adam_", "in_one_pass"]

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
    in float32; ``lr`` and ``counts`` are read where they are: a CUDA graph follows them if they are on the device.

    Args:
        steps, firsts, seconds: float32 or bfloat16, rounded to nearest, both moments of an entry alike; written. One
            of each for every gradient, contiguous, of its shape.
        grads: float32 or bfloat16.
        counts: one float32 number each: steps taken so far; written. On the device of the gradients, or on the CPU
            except while a CUDA graph is captured, which would repeat one and the same step.
        weights: float32 or bfloat16; None has no decay.
        lows: int16 beside bfloat16 weights, see :func:`sculpt_ops.ops.rounding.join_halves`; or None.
        starts: of the weight's dtype, what is subtracted from it; or None.
        lr: one number, float32 or float64, on the device of the gradients or on the CPU.

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
    """Numbers of entries and shapes; the device's kernel checks the rest."""
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


_WIDE = (torch.float32,)
_NARROW = (torch.float32, torch.bfloat16)
# By place in the argument list: what each holds, whether it is written.
_LISTS = (
    ("steps", _NARROW, True),
    ("grads", _NARROW, False),
    ("firsts", _NARROW, True),
    ("seconds", _NARROW, True),
    ("counts", _WIDE, True),
    ("weights", _NARROW, False),
    ("lows", (torch.int16,), False),
    ("starts", _NARROW, False),
)


def _check_all(lists: Sequence[Sequence[Tensor | None]], lr: Tensor) -> None:
    """Everything that csrc/common/adam_checks.h and csrc/cuda/adam_op.cpp refuse. Reads addresses: eager only."""
    _check(*lists)  # type: ignore[arg-type]
    if lr.numel() != 1 or lr.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"_adam_: lr: given shape {tuple(lr.shape)} and dtype {dtype_name(lr.dtype)}, wanted one number of dtype "
            "float32 or float64"
        )
    grads, firsts, seconds, counts, weights, lows, starts = lists[1:]
    if not grads:
        return
    assert grads[0] is not None
    device = grads[0].device
    if lr.device != device and not lr.is_cpu:
        raise ValueError(f"_adam_: lr: given device {lr.device}, wanted the device of grads, {device}, or the CPU")
    for i, (weight, low, start) in enumerate(zip(weights, lows, starts, strict=True)):
        if weight is None and (low is not None or start is not None):
            raise ValueError(f"_adam_: weights: given None in entry {i}, wanted one where lows or starts has one")
    uses = []
    for (name, dtypes, written), tensors in zip(_LISTS, lists, strict=True):
        for i, tensor in enumerate(tensors):
            if tensor is None:
                continue
            if tensor.dtype not in dtypes:
                wanted = " or ".join(map(dtype_name, dtypes))
                raise TypeError(f"_adam_: {name}: given dtype {dtype_name(tensor.dtype)} in entry {i}, wanted {wanted}")
            if tensor.device != device and not (name == "counts" and tensor.is_cpu):
                wanted = f"the device of the first of grads, {device}{', or the CPU' if name == 'counts' else ''}"
                raise ValueError(f"_adam_: {name}: given device {tensor.device} in entry {i}, wanted {wanted}")
            if not tensor.is_contiguous():
                raise ValueError(
                    f"_adam_: {name}: given strides {tensor.stride()} in entry {i}, wanted contiguous memory"
                )
            if size := tensor.numel():
                begin = tensor.data_ptr()
                uses.append((begin, begin + size * tensor.element_size(), name, written))
    for i, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
        if first is not None and second is not None and first.dtype is not second.dtype:
            raise TypeError(
                f"_adam_: seconds: given dtype {dtype_name(second.dtype)} in entry {i}, wanted the dtype of firsts, "
                f"{dtype_name(first.dtype)}"
            )
    for i, (count, weight, low, start) in enumerate(zip(counts, weights, lows, starts, strict=True)):
        if count is not None and count.numel() != 1:
            raise ValueError(
                f"_adam_: counts: given shape {tuple(count.shape)} in entry {i}, wanted one float32 number each"
            )
        if low is not None and weight is not None and weight.dtype is not torch.bfloat16:
            raise TypeError(
                f"_adam_: lows: given beside a weight of dtype {dtype_name(weight.dtype)} in entry {i}, wanted int16 "
                "beside bfloat16 weights"
            )
        if start is not None and weight is not None and start.dtype is not weight.dtype:
            raise TypeError(
                f"_adam_: starts: given dtype {dtype_name(start.dtype)} in entry {i}, wanted the dtype of weights, "
                f"{dtype_name(weight.dtype)}"
            )
    # Everything that is written, against everything: two entries of one element would be stepped twice.
    uses.sort()
    for at, (_, end, name, written) in enumerate(uses, start=1):
        while at < len(uses) and uses[at][0] < end:
            _, _, other, other_written = uses[at]
            if written or other_written:
                raise ValueError(f"_adam_: {name}: given memory shared with {other}, wanted memory of its own")
            at += 1
    if any(count is not None and count.is_cpu for count in counts) and is_capturing(device):
        raise RuntimeError(
            "_adam_: counts: given on the CPU while a CUDA graph is captured, which would repeat one and the same "
            "step; wanted on the device of grads (capturable=True)"
        )


@cache
def _kernel_runs(index: int) -> bool:
    """Whether the CUDA C++ kernel is there and has code for the device."""
    if cuda_missing() is not None or gpu_of(index).capability < 80:
        return False
    return bool(torch.ops.sculpt._cuda_adam_runs(index))


def in_one_pass(device: torch.device) -> bool:
    """Whether :func:`adam_` makes one pass over memory on `device`; elsewhere it is slower than torch's operations."""
    return device.type == "cpu" or (device.type == "cuda" and _kernel_runs(device.index))


def adam_cuda_(*args: Any, **hyperparameters: Any) -> None:
    # Here and not in the kernel: what it throws ended the process on torch 2.11.
    *lists, lr = args
    _check_all(lists, lr)
    grads = lists[1]
    if not grads:
        return
    if in_one_pass(grads[0].device):
        torch.ops.sculpt._cuda_adam_(*args, **hyperparameters)
    else:
        reference.adam_(*args, **hyperparameters)


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
LIBRARY.impl("_adam_", adam_cuda_, "CUDA")

"""Master weights of bfloat16 parameters: a float32 number in two halves, and stochastic rounding. Private ops.

A float32 number is its nearest bfloat16, a tie away from zero, plus the int16 that its bits have more (or less, where
the bfloat16 was rounded up): ``bits = (high << 16) + low``. So 16 bits beside a bfloat16 weight make a float32 master
weight to the bit. The arithmetic is in ``csrc/common/rounding.h``; the CUDA kernels are Triton's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .checks import check_apart, check_written, dtype_name, refuse_gradients
from .cuda import triton_missing
from .library import AFTER_AUTOGRAD, LIBRARY

__all__ = ["add_split_", "join_halves", "round_stochastic_", "split_"]

_JOIN = torch.ops.sculpt._join.default
_SPLIT_ = torch.ops.sculpt._split_.default
_ADD_SPLIT_ = torch.ops.sculpt._add_split_.default
_ROUND_STOCHASTIC_ = torch.ops.sculpt._round_stochastic_.default


def join_halves(high: Tensor, low: Tensor) -> Tensor:
    """The float32 number of two halves, a new contiguous tensor of their shape.

    Args:
        high: bfloat16, any shape and strides.
        low: int16, high's shape.

    In grad mode no argument may require grad.

    Raises:
        ValueError, TypeError, RuntimeError: naming the argument, what was given and what was wanted.
    """
    out: Tensor = _JOIN(high, low)
    return out


def split_(value: Tensor, high: Tensor, low: Tensor) -> None:
    """Write the halves of ``value``; :func:`join_halves` gives it back to the bit, ±0, ±inf and subnormals included.

    ``high`` becomes ±inf for a finite value that rounds to it, and is still joined exactly. A NaN stays one in
    ``high`` and joined, quiet and with the upper 7 bits of its payload.

    Args:
        value: float32, any shape and strides.
        high: bfloat16, value's shape.
        low: int16, value's shape.

    ``high`` and ``low`` hold every element once and share no memory with another argument. In grad mode none may
    require grad.

    Raises:
        ValueError, TypeError, RuntimeError: naming the argument, what was given and what was wanted; nothing has been
            written.
    """
    _SPLIT_(value, high, low)


def add_split_(high: Tensor, low: Tensor, step: Tensor) -> None:
    """Add ``step`` to the float32 number of two halves, in float32 and one pass over memory: 12 bytes an element.

    Args:
        high, low: as in :func:`split_`.
        step: float32, high's shape.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`split_`.
    """
    _ADD_SPLIT_(high, low, step)


def round_stochastic_(out: Tensor, value: Tensor, *, seed: int, offset: int = 0) -> Tensor:
    """Write ``value`` rounded to one of its two neighbours in bfloat16, up with the chance of the fraction dropped.

    Unbiased below the largest bfloat16, 3.39e38, in magnitude; from there on a finite value is truncated to it, so none
    becomes infinite. A value that bfloat16 holds never changes; NaN and infinities stay.

    Element i, in row-major order, takes 16 bits of Philox4x32-10 with the two halves of ``seed`` as key and counter
    (j mod 2^32, j // 2^32, 0, 1) for ``j = (offset + i) // 8``: half ``(offset + i) % 8`` of the four words, low halves
    first. The result depends on nothing else: not on strides, threads or device.

    Args:
        out: bfloat16, any shape and strides; every element stored once, no memory shared with ``value``.
        value: float32, out's shape.
        seed: any signed 64-bit integer.
        offset: place of the first element in the sequence of random bits, 0 to 2^62: that of a shard's first row.

    In grad mode no argument may require grad. Returns ``out``.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`split_`.
    """
    _ROUND_STOCHASTIC_(out, value, seed=seed, offset=offset)
    return out


def _check(op: str, name: str, tensor: Tensor, dtype: torch.dtype, like_name: str, like: Tensor) -> None:
    if tensor.dtype is not dtype:
        raise TypeError(f"{op}: {name}: given dtype {dtype_name(tensor.dtype)}, wanted {dtype_name(dtype)}")
    if tensor.shape != like.shape:
        raise ValueError(
            f"{op}: {name}: given shape {tuple(tensor.shape)}, wanted {like_name}'s shape {tuple(like.shape)}"
        )
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name}: given device {tensor.device}, wanted {like_name}'s device {like.device}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{op}: {name}: given layout {tensor.layout}, wanted a dense (strided) tensor")


def _check_halves(op: str, high: Tensor, low: Tensor, **value: Tensor) -> None:
    _check(op, "high", high, torch.bfloat16, "high", high)
    _check(op, "low", low, torch.int16, "high", high)
    for name, tensor in value.items():
        _check(op, name, tensor, torch.float32, "high", high)


def _check_rounding(out: Tensor, value: Tensor, offset: int) -> None:
    op = "_round_stochastic_"
    _check(op, "out", out, torch.bfloat16, "out", out)
    _check(op, "value", value, torch.float32, "out", out)
    if not 0 <= offset <= 2**62:
        raise ValueError(f"{op}: offset: given {offset}, wanted 0 to 2^62")


def _check_written(op: str, written: dict[str, Tensor], **read: Tensor) -> None:
    """Memory that can be written. Reads addresses: the device's kernel does it, not the fake."""
    others = dict(written)
    for name, tensor in written.items():
        del others[name]
        check_written(op, name, tensor)
        check_apart(op, name, tensor, **others, **read)


def join_cuda(high: Tensor, low: Tensor) -> Tensor:
    _check_halves("_join", high, low)
    return reference.join_halves(high, low)


def split_cuda_(value: Tensor, high: Tensor, low: Tensor) -> None:
    _check_halves("_split_", high, low, value=value)
    _check_written("_split_", {"high": high, "low": low}, value=value)
    reference.split_(value, high, low)


def add_split_cuda_(high: Tensor, low: Tensor, step: Tensor) -> None:
    _check_halves("_add_split_", high, low, step=step)
    _check_written("_add_split_", {"high": high, "low": low}, step=step)
    if triton_missing():
        return reference.add_split_(high, low, step)
    from ..triton_kernels.rounding import add_split

    work = high.contiguous(), low.contiguous()
    add_split(*work, step.contiguous())
    for half, written in zip((high, low), work, strict=True):
        if written is not half:
            half.copy_(written)


def round_stochastic_cuda_(out: Tensor, value: Tensor, *, seed: int, offset: int = 0) -> None:
    _check_rounding(out, value, offset)
    _check_written("_round_stochastic_", {"out": out}, value=value)
    if triton_missing():
        reference.round_stochastic_(out, value, seed=seed, offset=offset)
        return
    from ..triton_kernels.rounding import round_stochastic

    work = out.contiguous()
    round_stochastic(work, value.contiguous(), seed, offset)
    if work is not out:
        out.copy_(work)


LIBRARY.impl("_join", join_cuda, "CUDA")
LIBRARY.impl("_split_", split_cuda_, "CUDA")
LIBRARY.impl("_add_split_", add_split_cuda_, "CUDA")
LIBRARY.impl("_round_stochastic_", round_stochastic_cuda_, "CUDA")


@torch.library.register_fake("sculpt::_join")
def _join_fake(high: Tensor, low: Tensor) -> Tensor:
    _check_halves("_join", high, low)
    return high.new_empty(high.shape, dtype=torch.float32)


@torch.library.register_fake("sculpt::_split_")
def _split_fake_(value: Tensor, high: Tensor, low: Tensor) -> None:
    _check_halves("_split_", high, low, value=value)


@torch.library.register_fake("sculpt::_add_split_")
def _add_split_fake_(high: Tensor, low: Tensor, step: Tensor) -> None:
    _check_halves("_add_split_", high, low, step=step)


@torch.library.register_fake("sculpt::_round_stochastic_")
def _round_stochastic_fake_(out: Tensor, value: Tensor, *, seed: int, offset: int = 0) -> None:
    _check_rounding(out, value, offset)


def _join_autograd(keyset: Any, high: Tensor, low: Tensor) -> Tensor:
    _check_halves("_join", high, low)
    refuse_gradients("_join", high=high)
    out: Tensor = _JOIN.redispatch(keyset & AFTER_AUTOGRAD, high, low)
    return out


def _split_autograd_(keyset: Any, value: Tensor, high: Tensor, low: Tensor) -> None:
    _check_halves("_split_", high, low, value=value)
    refuse_gradients("_split_", value=value, high=high)
    _SPLIT_.redispatch(keyset & AFTER_AUTOGRAD, value, high, low)
    torch.autograd.graph.increment_version((high, low))


def _add_split_autograd_(keyset: Any, high: Tensor, low: Tensor, step: Tensor) -> None:
    _check_halves("_add_split_", high, low, step=step)
    refuse_gradients("_add_split_", high=high, step=step)
    _ADD_SPLIT_.redispatch(keyset & AFTER_AUTOGRAD, high, low, step)
    torch.autograd.graph.increment_version((high, low))


def _round_stochastic_autograd_(keyset: Any, out: Tensor, value: Tensor, *, seed: int, offset: int = 0) -> None:
    _check_rounding(out, value, offset)
    refuse_gradients("_round_stochastic_", out=out, value=value)
    _ROUND_STOCHASTIC_.redispatch(keyset & AFTER_AUTOGRAD, out, value, seed=seed, offset=offset)
    torch.autograd.graph.increment_version(out)


LIBRARY.impl("_join", _join_autograd, "Autograd", with_keyset=True)
LIBRARY.impl("_split_", _split_autograd_, "Autograd", with_keyset=True)
LIBRARY.impl("_add_split_", _add_split_autograd_, "Autograd", with_keyset=True)
LIBRARY.impl("_round_stochastic_", _round_stochastic_autograd_, "Autograd", with_keyset=True)

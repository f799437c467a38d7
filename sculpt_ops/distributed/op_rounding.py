"""Elementwise ops on DTensors: each rank its own part, and the random bits of one rank."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .op_layout import Layout, common_mesh, local_of, wrap

__all__ = ["add_split_", "join", "round_stochastic_", "split_"]

# Numbers drawn at once for a column shard: 16 MB in float32.
_PIECE = 2**22
_JOIN = torch.ops.sculpt._join.default
_SPLIT_ = torch.ops.sculpt._split_.default
_ADD_SPLIT_ = torch.ops.sculpt._add_split_.default
_ROUND_STOCHASTIC_ = torch.ops.sculpt._round_stochastic_.default


def join(high: Tensor, low: Tensor) -> Tensor:
    joined = _JOIN(*_alike("_join", high=high, low=low))
    assert isinstance(high, DTensor)
    return wrap(joined, high.device_mesh, high.placements, high.shape)


def split_(value: Tensor, high: Tensor, low: Tensor) -> None:
    _SPLIT_(*_alike("_split_", value=value, high=high, low=low))


def add_split_(high: Tensor, low: Tensor, step: Tensor) -> None:
    _ADD_SPLIT_(*_alike("_add_split_", high=high, low=low, step=step))


def round_stochastic_(out: Tensor, value: Tensor, *, seed: int, offset: int = 0) -> None:
    rounded, exact = _alike("_round_stochastic_", out=out, value=value)
    if not rounded.numel():
        return
    assert isinstance(out, DTensor)
    spans = Layout.of("_round_stochastic_", "out", out).spans
    if not any(span.dims for span in spans[1:]):
        start = spans[0].start * math.prod(out.shape[1:]) if spans else 0
        _ROUND_STOCHASTIC_(rounded, exact, seed=seed, offset=offset + start)
        return
    if len(spans) != 2:
        raise ValueError(
            f"_round_stochastic_: out: given placements {out.placements} of shape {tuple(out.shape)}, wanted the first "
            "dimension split, or a matrix"
        )
    # The bits of a column shard lie apart: a few whole rows at a time are drawn, and all but its columns thrown away.
    rows, columns = spans
    step = max(_PIECE // columns.size, 1)
    for i in range(0, rows.length, step):
        part = exact[i : i + step]
        whole = part.new_zeros(len(part), columns.size)
        own = whole.narrow(1, columns.start, columns.length)
        own.copy_(part)
        drawn = torch.empty_like(whole, dtype=rounded.dtype)
        _ROUND_STOCHASTIC_(drawn, whole, seed=seed, offset=offset + (rows.start + i) * columns.size)
        rounded[i : i + step].copy_(drawn.narrow(1, columns.start, columns.length))


def _alike(op: str, **tensors: Tensor) -> list[Tensor]:
    """This rank's parts. ValueError unless all tensors are placed in the same way."""
    common_mesh(op, tensors)
    (first_name, first), *others = tensors.items()
    assert isinstance(first, DTensor)
    for name, tensor in others:
        assert isinstance(tensor, DTensor)
        if tensor.placements != first.placements:
            raise ValueError(
                f"{op}: {name}: given placements {tensor.placements}, wanted those of {first_name}, {first.placements}"
            )
    return [local_of(tensor) for tensor in tensors.values()]

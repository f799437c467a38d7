"""What a step refuses before it changes anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layer import LayerSubspace
from .rows import MOMENTS

__all__ = ["check_capture", "check_dense", "check_shapes"]


def check_dense(grad: Tensor) -> None:
    """RuntimeError for a sparse gradient."""
    if grad.is_sparse:
        raise RuntimeError("AdamW does not support sparse gradients, please consider SparseAdam instead")


def check_shapes(
    parameters: Iterable[Tensor],
    states: Mapping[Tensor, Mapping[str, Any]],
    coordinates: Mapping[Tensor, LayerSubspace],
) -> None:
    """ValueError for moments of another shape than the parameter, or the free space of its layer in `coordinates`, and
    for low bits of a parameter that is no longer bfloat16."""
    # torch's fused kernel checks nothing and reads beyond the end of moments that are too small.
    for parameter in parameters:
        state, layer = states.get(parameter, {}), coordinates.get(parameter)
        wanted = tuple(parameter.shape) if layer is None else layer.free_shape
        if "low" in state and parameter.dtype is not torch.bfloat16:
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} is {parameter.dtype} now, and has low bits of bfloat16 "
                "(master='split'): keep the model's dtype, or write `master_weight` into it and make a new optimizer"
            )
        for name in MOMENTS:
            if name in state and tuple(state[name].shape) != wanted:
                raise ValueError(
                    f"the {name} of a parameter of shape {tuple(parameter.shape)} has shape "
                    f"{tuple(state[name].shape)}, wanted {wanted}: load what an optimizer with the same state= and "
                    "the same subspaces saved, and after set_subspaces"
                )


def check_capture(groups: Sequence[Mapping[str, Any]]) -> None:
    """RuntimeError where a CUDA graph would capture a step count that is kept on the CPU, and freeze it."""
    if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return
    if not all(group["capturable"] for group in groups):
        raise RuntimeError("capturing a step in a CUDA graph needs capturable=True in every parameter group")

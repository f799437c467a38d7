"""Putting the protected part of the weights back after a step of any optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .binding import check_still_bound
from .layer import LayerSubspace
from .ops import restore_

__all__ = ["guard_optimizer"]


class _Start(NamedTuple):
    """What `restore_` needs to know of a weight W0: of left^T W0, W0 right, left^T W0 right and W0 those that apply."""

    left_image: Tensor | None
    right_image: Tensor | None
    core: Tensor | None
    reference: Tensor | None

    @classmethod
    def of(cls, layer: LayerSubspace, weight: Tensor) -> _Start:
        # From the bases as stored, never from singular triplets: W V = U S holds only approximately for those, and an
        # untouched weight was seen to move by up to 7 %.
        start = weight.detach().double()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        left_image = None if layer.left is None else layer.left.double().mT @ start
        right_image = None if layer.right is None else start @ layer.right.double()
        core = None
        if layer.block and left_image is not None and layer.right is not None:
            core = (left_image @ layer.right.double()).to(dtype)
        return cls(
            left_image=None if left_image is None or layer.keep_left or layer.block else left_image.to(dtype),
            right_image=None if right_image is None or layer.keep_right or layer.block else right_image.to(dtype),
            core=core,
            reference=weight.detach().clone() if layer.keep_left or layer.keep_right else None,
        )


def guard_optimizer(optimizer: torch.optim.Optimizer, bound: Mapping[Tensor, LayerSubspace]) -> RemovableHandle:
    """Register the step hook behind `Subspaces.guard` for the parameters of `bound`, as they are now."""
    starts = {parameter: _Start.of(layer, parameter) for parameter, layer in bound.items()}

    @torch.no_grad()
    def put_back(stepped: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        check_still_bound(stepped, bound)
        for parameter, layer in bound.items():
            start = starts[parameter]
            restore_(
                parameter,
                layer.left,
                start.left_image,
                layer.right,
                start.right_image,
                core=start.core,
                reference=start.reference,
                keep_left=layer.keep_left,
                keep_right=layer.keep_right,
                block=layer.block,
            )

    return optimizer.register_step_post_hook(put_back)

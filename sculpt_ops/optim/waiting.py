"""Gradients between the backward pass and the step, and what clipping and compressing have done to them."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

from torch import Tensor

from ..dtensor import is_dtensor, version_of

__all__ = ["Waiting"]


class Waiting:
    """sums: gradients that wait for the step elsewhere than in `.grad`: in free coordinates, or whole at an owner.
    passes: of `fuse_into_backward`, the backward passes since a parameter's last step."""

    def __init__(self) -> None:
        self.sums: dict[Tensor, Tensor] = {}
        self.passes: dict[Tensor, int] = {}
        # The `.grad` that a call left, projected or zero, and its count of writes.
        self._left: dict[Tensor, tuple[weakref.ref[Tensor], int]] = {}
        self._hooked: set[Tensor] = set()

    def is_known(self, parameter: Tensor) -> bool:
        """Whether its `.grad` still is what an earlier call left."""
        reference, version = self._left.get(parameter, (None, -1))
        grad = parameter.grad
        return grad is not None and reference is not None and reference() is grad and version == version_of(grad)

    def is_taken(self, parameter: Tensor) -> bool:
        """Whether all of its gradient is in `sums`, and `.grad` zeros in its place."""
        return parameter in self.sums and self.is_known(parameter)

    def note(self, parameter: Tensor) -> None:
        """Its `.grad` is as it should be until somebody writes to it."""
        if parameter.grad is not None:
            self._left[parameter] = (weakref.ref(parameter.grad), version_of(parameter.grad))

    def leave(self, parameter: Tensor, *, zeros: bool) -> None:
        """Its gradient is in `sums` now. zeros: in `.grad`, and not None: what is added to them then counts, and who
        drops them has what waits dropped."""
        if not zeros or parameter.grad is None:
            parameter.grad = None
            self._left.pop(parameter, None)
            return
        if is_dtensor(parameter.grad):
            parameter.grad.zero_()  # FSDP2 adds to the local part, and calls no hook before
        else:
            # One number for all: a full gradient of zeros beside its coordinates would take the memory that they save.
            parameter.grad = parameter.grad.new_zeros(()).expand(parameter.shape)
            if parameter.requires_grad and parameter not in self._hooked:
                hook = parameter.register_hook(partial(_make_room, weakref.ref(self), weakref.ref(parameter)))
                weakref.finalize(self, hook.remove)  # a parameter may have an optimizer a task
                self._hooked.add(parameter)
        self.note(parameter)

    def renew(self) -> None:
        """After writes of our own to what was left."""
        for parameter in list(self._left):
            if parameter.grad is not None:
                reference, _ = self._left[parameter]
                self._left[parameter] = (reference, version_of(parameter.grad))
            else:
                del self._left[parameter]

    def drop_forgotten(self) -> None:
        """Drop what waits of gradients that are gone: `model.zero_grad()` knows nothing of it. A step that a GradScaler
        had skipped came back with the next one, and the weights were NaN."""
        for parameter in list(self.sums):
            reference, _ = self._left.get(parameter, (None, -1))
            if reference is not None and (parameter.grad is None or reference() is not parameter.grad):
                self.drop(parameter)

    def drop(self, parameter: Tensor) -> None:
        """Of one parameter."""
        self.sums.pop(parameter, None)
        self._left.pop(parameter, None)

    def clear(self) -> None:
        """Of all."""
        self.sums.clear()
        self.passes.clear()
        self._left.clear()

    def __getstate__(self) -> dict[str, Any]:
        # Of a copy nothing is known, and its parameters have no hooks.
        return {"sums": self.sums, "passes": {}, "_left": {}, "_hooked": set()}


def _make_room(waiting: weakref.ref[Waiting], parameter: weakref.ref[Tensor], grad: Tensor) -> None:
    """Before autograd adds to what `leave` left, which is one number in memory."""
    held, target = waiting(), parameter()
    if held is not None and target is not None and held.is_taken(target):
        target.grad = None
        held._left.pop(target)

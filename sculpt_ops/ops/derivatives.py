"""Autograd kernels of ops with a backward formula of their own.

``torch.library.register_autograd`` leaves two things out: a forward-mode tangent is dropped without a word, and
``torch.func`` refuses the op. Where either is asked for, these kernels compute the op by an expression of torch's own
differentiable ops, or refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .checks import has_tangent, refuse_forward_mode
from .library import AFTER_AUTOGRAD, LIBRARY, without_autocast

__all__ = ["register_backward"]


class _Context:
    """The context with `needs_input_grad` of the op's own arguments. It is not written to the context itself: two
    threads in the backward pass of one graph each put back what the other had cut."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.needs_input_grad = ctx.needs_input_grad[:-2]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def register_backward(
    op: Any,
    backward: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    *,
    expression: Callable[..., Any] | None = None,
) -> None:
    """Give ``op`` an Autograd kernel. ``backward`` and ``setup_context`` are as in
    :func:`torch.library.register_autograd`; ``expression`` takes the op's arguments, and None refuses ``torch.func``
    and forward mode. For ops without lists of tensors."""
    schema = op._schema
    positional = [argument.default_value for argument in schema.arguments if not argument.kwarg_only]
    keywords = {argument.name: argument.default_value for argument in schema.arguments if argument.kwarg_only}
    name = schema.name.partition("::")[2]

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *given: Any) -> Any:
            *inputs, keyset, flags = given
            out = op.redispatch(keyset & AFTER_AUTOGRAD, *inputs, **flags)
            if setup_context is not None:
                # The dispatcher leaves out what equals its default.
                inputs += positional[len(inputs) :]
                kept = {"keyword_only_inputs": keywords | flags} if keywords else {}
                setup_context(ctx=ctx, inputs=tuple(inputs), output=out, **kept)
            return out

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            given = next((gradient for gradient in gradients if gradient is not None), None)
            # backward() itself may run under it
            with nullcontext() if given is None else without_autocast(given):
                found = backward(_Context(ctx), *gradients)
            return (*(found if isinstance(found, tuple) else (found,)), None, None)

    def kernel(keyset: Any, *inputs: Any, **flags: Any) -> Any:
        tensors = [given for given in inputs if isinstance(given, Tensor)]
        recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        # A kernel of this key sees an active transform only while that transform differentiates.
        transformed = recorded and torch._C._are_functorch_transforms_active()
        if expression is None:
            refuse_forward_mode(name, *tensors)
            if transformed:
                raise NotImplementedError(
                    f"{name}: given a tensor under torch.func, wanted one that autograd differentiates; its twin in "
                    "sculpt_ops.reference can be transformed"
                )
        elif transformed or has_tangent(*tensors):
            return expression(*inputs, **keywords | flags)
        if recorded:
            return Backward.apply(*inputs, keyset, flags)
        return op.redispatch(keyset & AFTER_AUTOGRAD, *inputs, **flags)

    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)

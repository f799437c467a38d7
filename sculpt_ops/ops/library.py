"""Loads the C++ library and owns the handle through which Python adds kernels to its ops."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

__all__ = ["AFTER_AUTOGRAD", "LIBRARY", "explained", "transformed_without_autocast", "without_autocast"]

_spec = importlib.util.find_spec("sculpt_ops._C")
if _spec is None or _spec.origin is None:
    raise ImportError(
        "sculpt_ops was not built: no sculpt_ops/_C extension found; run `pip install --no-build-isolation .` "
        "in the source folder, with torch already installed"
    )
torch.ops.load_library(_spec.origin)

LIBRARY = torch.library.Library("sculpt", "IMPL")
# An Autograd kernel redispatches to what lies below it (functionalization, then the device) with this mask.
AFTER_AUTOGRAD: Any = torch._C._after_autograd_keyset


def without_autocast(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """For products whose dtype is promised: autocast would make it its own."""
    kind = tensor.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def transformed_without_autocast(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """`without_autocast` under a transform of torch.func, whose inner levels have it back however an op is shielded."""
    return without_autocast(tensor) if torch._C._are_functorch_transforms_active() else nullcontext()


def _shield_from_autocast() -> None:
    """The ops are to compute the same under autocast: whatever products of torch they are made of."""

    def shield(name: str, kind: str) -> None:
        op = getattr(torch.ops.sculpt, name).default

        def kernel(*given: Any, **flags: Any) -> Any:
            with torch.autocast(kind, enabled=False):
                return op(*given, **flags)

        LIBRARY.impl(name, kernel, f"Autocast{kind.upper()}")

    for full in torch._C._dispatch_get_all_op_names():
        space, _, name = full.partition("::")
        if space == "sculpt":
            for kind in ("cpu", "cuda"):
                shield(name, kind)


_shield_from_autocast()


def explained(check: Callable[[], None], op: Callable[..., Any], *given: Any, **flags: Any) -> Any:
    """What `op` gives. Where it refuses, `check` says it first, with the error that belongs to the argument: what C++
    says is a RuntimeError, and before torch 2.13 without its words. Costs nothing where nothing is wrong."""
    if torch.compiler.is_compiling():
        return op(*given, **flags)
    try:
        if torch._C._are_functorch_transforms_active() and isinstance(given[0], torch.Tensor):
            with without_autocast(given[0]):
                return op(*given, **flags)
        return op(*given, **flags)
    except RuntimeError:
        clear = _refusal(check)
        if clear is None:
            raise
    raise clear


def _refusal(check: Callable[[], None]) -> Exception | None:
    try:
        check()
    except (TypeError, ValueError) as error:
        return error
    except RuntimeError:  # of tensors without memory of their own, as in a transform of torch.func
        return None
    return None

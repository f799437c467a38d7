"""Loads the C++ library and owns the handle through which Python adds kernels to its ops."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

__all__ = ["AFTER_AUTOGRAD", "LIBRARY"]

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

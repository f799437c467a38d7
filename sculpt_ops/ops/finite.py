"""The check for NaN and Inf that the decompositions make in eager mode."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..triton_kernels.tables import is_capturing

__all__ = ["LinAlgError", "check_finite", "has_values"]

# torch.linalg does not list it in its type stubs.
LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]


def has_values(tensor: Tensor) -> bool:
    """False while tracing, under vmap, on meta tensors and during graph capture: no value can be read on the host."""
    if torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor):
        return False
    traced = torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()
    return not (traced or is_capturing(tensor.device))


def check_finite(op: str, name: str, tensor: Tensor) -> None:
    """Raise torch.linalg.LinAlgError if the tensor holds NaN or Inf; waits for the device. Silent where no value can be
    read: tracing, vmap, meta tensors, CUDA graph capture."""
    if tensor.numel() == 0 or not has_values(tensor):
        return
    with torch.no_grad():
        # The 2-norm of 4096 x 4096 takes 3 ms on two cores, the extremes 8, isfinite().all() 80. Finite values may
        # overflow it, so a bad norm is no proof.
        if torch.linalg.vector_norm(tensor).isfinite():
            return
        if not all(extreme.isfinite() for extreme in tensor.aminmax()):
            raise LinAlgError(f"{op}: {name}: given NaN or Inf, wanted finite numbers")

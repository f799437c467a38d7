"""What every launcher does first: check the operands, then find the device and its arithmetic."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from .panels import Device, device_of

__all__ = ["INTERPRET", "batch_of", "batch_stride", "check_operands", "device_for", "on_device", "precision_for"]

# Read when the kernels are decorated, so it cannot change later in the process.
INTERPRET: bool = triton.knobs.runtime.interpret


def batch_of(grad: Tensor) -> int:
    return grad.shape[0] if grad.dim() == 3 else 1


def batch_stride(tensor: Tensor) -> int:
    """Stride of the batch dimension; 0 repeats a 2-d tensor for every item."""
    return tensor.stride(0) if tensor.dim() == 3 else 0


def device_for(tensor: Tensor) -> Device:
    return device_of(tensor.device.index if tensor.is_cuda else None)


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whichever the tensors are on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def precision_for(tensor: Tensor) -> str:
    """How float32 products are computed: three TF32 products on CUDA tensor cores, which HIP does not offer."""
    return "ieee" if INTERPRET or device_for(tensor).is_hip else "tf32x3"


def check_operands(op: str, grad: Tensor, out: Tensor, **bases: Tensor) -> None:
    """Raise ValueError unless `out` is like `grad` and each basis (named `left` or `right`) fits its side of it."""
    shape = tuple(grad.shape)
    if grad.dim() not in (2, 3):
        raise ValueError(f"{op}: grad: given shape {shape}, wanted (m, n) or (batch, m, n)")
    if not (grad.is_cuda or INTERPRET):
        raise ValueError(f"{op}: grad: given device {grad.device}, wanted a CUDA or HIP device")
    if out.shape != grad.shape or out.dtype != grad.dtype or out.device != grad.device:
        given = f"{tuple(out.shape)} {out.dtype} on {out.device}"
        raise ValueError(f"{op}: out: given {given}, wanted grad's {shape} {grad.dtype} on {grad.device}")
    for name, basis in bases.items():
        size = shape[-1 if name == "right" else -2]
        fits = basis.dim() == 2 or (basis.dim() == 3 and basis.shape[:-2] == grad.shape[:-2])
        if not fits or basis.shape[-2] != size:
            wanted = f"({size}, rank)" + (f" or ({shape[0]}, {size}, rank)" if grad.dim() == 3 else "")
            raise ValueError(
                f"{op}: {name}: given shape {tuple(basis.shape)}, wanted {wanted} for a grad of shape {shape}"
            )
        if basis.device != grad.device:
            raise ValueError(f"{op}: {name}: given device {basis.device}, wanted grad's, {grad.device}")
    check_memory(op, grad, out)


def check_memory(op: str, grad: Tensor, out: Tensor) -> None:
    """Raise ValueError if writing `out` could change a part of `grad` that another program still reads."""
    if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(f"{op}: out: given strides {out.stride()}, wanted every element at its own address")
    if out is grad or out.untyped_storage().data_ptr() != grad.untyped_storage().data_ptr():
        return
    if out.storage_offset() == grad.storage_offset() and out.stride() == grad.stride():
        return
    (grad_first, grad_last), (out_first, out_last) = span(grad), span(out)
    if grad_first <= out_last and out_first <= grad_last:
        raise ValueError(f"{op}: out: given a view that overlaps grad, wanted grad itself or memory apart from it")


def span(tensor: Tensor) -> tuple[int, int]:
    """First and last element of `tensor` in its storage."""
    first = int(tensor.storage_offset())
    return first, first + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))

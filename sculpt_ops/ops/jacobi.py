"""SVD of a batch of small square float32 matrices by one-sided Jacobi rotations. Private op.

The small factor of ``rsvd``, for many layers at once: torch's library SVD on CUDA takes such matrices one after the
other, waits for the device, and cannot be captured in a CUDA graph. The arithmetic is in ``csrc/common/jacobi.h``.
Where the CUDA C++ kernels were not built, or not for the GPU, CUDA tensors take the library's SVD.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import _host, reference
from .checks import dtype_name, refuse_gradients
from .finite import check_finite, has_values
from .library import AFTER_AUTOGRAD, LIBRARY
from .variants import cuda_missing

__all__ = ["MAX_SIZE", "jacobi_on_gpu", "jacobi_svd"]

MAX_SIZE = int(_host.thresholds["jacobi_max_size"])
_JACOBI_SVD = torch.ops.sculpt._jacobi_svd.default


def jacobi_svd(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All singular triplets: ``input = U diag(S) Vᵀ``.

    A pivoted QR factorization, then rotations on the columns of Rᵀ until every two are orthogonal (Golub and Van Loan,
    "Matrix computations", 4th edition, 8.6.3; Drmač and Veselić, SIAM J. Matrix Anal. Appl. 29, 2008, part I). Singular
    values are right to some roundings of the largest, and small ones to some roundings of themselves where the matrix
    is well conditioned but for a scaling of its columns (Demmel and Veselić, the same 13, 1992), as a triangular
    factor of graded columns is.

    Args:
        input: (..., q, q), float32, any strides, q at most 160.

    Returns:
        U (..., q, q), S (..., q), descending, V (..., q, q), not transposed; float32, contiguous. U and V are
        orthonormal, for zero singular values too: such columns of V are completed from unit vectors, lowest index first
        where several fit, those of U come from the QR factorization. What is below 9e-16 of the largest entry is a zero
        singular value. Same input, same device: the same bits; signs are as they come.

    Not differentiable: in grad mode ``input`` must not require grad.

    Raises:
        ValueError, TypeError, RuntimeError: naming the argument, what was given and what was wanted.
        torch.linalg.LinAlgError: the input holds NaN or Inf; checked in eager mode only. Elsewhere the results of such
            a matrix are NaN.
    """
    triplets: tuple[Tensor, Tensor, Tensor]
    try:
        triplets = _JACOBI_SVD(input)
    except RuntimeError:  # the library's SVD of such a matrix
        check_finite("_jacobi_svd", "input", input)
        raise
    if has_values(input) and not triplets[1].isfinite().all():
        check_finite("_jacobi_svd", "input", input)
    return triplets


@cache
def _has_code(index: int | None) -> bool:
    """Whether the CUDA C++ kernel, where it is there, was built for GPU `index`; None is a tensor on no GPU."""
    return index is None or bool(torch.ops.sculpt._cuda_jacobi_runs(index))


def jacobi_on_gpu(dtype: torch.dtype, q: int, device: torch.device) -> bool:
    """Whether the SVD of q x q factors of this dtype on a GPU is the kernel's, which a CUDA graph can hold."""
    return dtype is torch.float32 and q <= MAX_SIZE and cuda_missing() is None and _has_code(device.index)


def _check(input: Tensor) -> None:
    if input.dtype is not torch.float32:
        raise TypeError(f"_jacobi_svd: input: given dtype {dtype_name(input.dtype)}, wanted float32")
    if input.layout is not torch.strided:
        raise TypeError(f"_jacobi_svd: input: given layout {input.layout}, wanted a dense (strided) tensor")
    if input.dim() < 2 or input.shape[-1] != input.shape[-2] or input.shape[-1] > MAX_SIZE:
        raise ValueError(
            f"_jacobi_svd: input: given shape {tuple(input.shape)}, wanted square matrices (..., q, q) with q at most "
            f"{MAX_SIZE}"
        )


def _jacobi_svd_cuda(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check(input)
    if not jacobi_on_gpu(input.dtype, input.shape[-1], input.device):
        return reference.jacobi_svd(input)
    U, S, V = torch.ops.sculpt._cuda_jacobi_svd(input)
    return U, S, V


@torch.library.register_fake("sculpt::_jacobi_svd")
def _jacobi_svd_fake(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check(input)
    return input.new_empty(input.shape), input.new_empty(input.shape[:-1]), input.new_empty(input.shape)


def _jacobi_svd_autograd(keyset: Any, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check(input)
    refuse_gradients("_jacobi_svd", input=input)
    U, S, V = _JACOBI_SVD.redispatch(keyset & AFTER_AUTOGRAD, input)
    return U, S, V


LIBRARY.impl("_jacobi_svd", _jacobi_svd_cuda, "CUDA")
LIBRARY.impl("_jacobi_svd", _jacobi_svd_autograd, "Autograd", with_keyset=True)

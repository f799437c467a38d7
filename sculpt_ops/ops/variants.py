"""One projection on a GPU: library products, Triton or CUDA C++, as ``csrc/common/heuristics.h`` chooses or
``SCULPT_BACKEND`` asks.

Written against tensors of any device, so that the library path is tested on the CPU and the Triton path in the
interpreter.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .cuda_limits import why_not_cuda
from .heuristics import Backend, choose, forced_backend, gpu_of, triton_missing
from .library_products import project_cublas

__all__ = [
    "backend_of",
    "check_forced",
    "check_metric_backend",
    "cuda_missing",
    "project_cuda",
    "project_into",
    "project_triton",
    "why_not_cuda",
]


def _flat(tensor: Tensor) -> Tensor | None:
    """As the Triton launchers take it: at most one batch dimension, sharing memory; None if the strides forbid it."""
    if tensor.dim() <= 3:
        return tensor
    try:
        return tensor.view(-1, *tensor.shape[-2:])
    except RuntimeError:
        return None


_NO_VIEW = "given batch dimensions that no view can merge"


def _why_not_triton(
    grad: Tensor, left: Tensor | None, right: Tensor | None, keep_left: bool, keep_right: bool, block: bool
) -> str | None:
    missing = triton_missing()
    if missing:
        return missing
    from ..triton_kernels.project_block import why_not_block
    from ..triton_kernels.project_both import why_not_both
    from ..triton_kernels.project_left import why_not_left
    from ..triton_kernels.project_right import why_not_right

    if _flat(grad) is None:
        return _NO_VIEW
    m, n = grad.shape[-2:]
    dtype = grad.dtype
    if left is not None and right is not None and not (keep_left or keep_right):
        why_not = why_not_block if block else why_not_both
        why: str | None = why_not(m, n, left.shape[-1], right.shape[-1], dtype, left.dtype, right.dtype)
        if why is None or block:
            return why
    reasons: tuple[str | None, str | None] = (
        None if left is None else why_not_left(m, n, left.shape[-1], dtype, left.dtype),
        None if right is None else why_not_right(m, n, right.shape[-1], dtype, right.dtype),
    )
    return reasons[0] or reasons[1]


def project_triton(
    grad: Tensor, left: Tensor | None, right: Tensor | None, out: Tensor, keep_left: bool, keep_right: bool, block: bool
) -> str | None:
    """Run the Triton kernels; a string says why they cannot, and then nothing has been written."""
    why = _why_not_triton(grad, left, right, keep_left, keep_right, block)
    if why is not None:
        return why
    from ..triton_kernels.project_block import project_block
    from ..triton_kernels.project_both import project_both, why_not_both
    from ..triton_kernels.project_left import project_left
    from ..triton_kernels.project_right import project_right

    flat, flat_out = _flat(grad), _flat(out)
    if flat is None or flat_out is None:
        return _NO_VIEW
    batch = grad.shape[:-2]
    bases = []
    for basis in (left, right):
        if basis is not None and basis.dim() > 2:
            basis = basis.expand(*batch, *basis.shape[-2:]).reshape(-1, *basis.shape[-2:])
        bases.append(basis)
    left, right = bases
    if left is not None and right is not None and not (keep_left or keep_right):
        if block:
            project_block(flat, left, right, flat_out)
            return None
        ranks = left.shape[-1], right.shape[-1]
        if why_not_both(*grad.shape[-2:], *ranks, grad.dtype, left.dtype, right.dtype) is None:
            project_both(flat, left, right, flat_out)
            return None
    source = flat
    if left is not None:
        project_left(source, left, flat_out, keep=keep_left)
        source = flat_out
    if right is not None:
        project_right(source, right, flat_out, keep=keep_right)
    return None


@cache
def cuda_missing() -> str | None:
    """Loads the CUDA C++ kernels; why they are not there, or None."""
    if torch.version.cuda is None:
        return "given a torch without CUDA, wanted a CUDA build"
    spec = find_spec("sculpt_ops._cuda")
    if spec is None or spec.origin is None:
        return "sculpt_ops._cuda was not built; build with nvcc in reach"
    torch.ops.load_library(spec.origin)
    return None


def project_cuda(
    grad: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    out: Tensor,
    keep_left: bool,
    keep_right: bool,
    block: bool,
    left_metric: Tensor | None = None,
    right_metric: Tensor | None = None,
) -> str | None:
    """Run the CUDA C++ kernels; a string says why they cannot, and then nothing has been written."""
    metrics = left_metric, right_metric
    why = cuda_missing() or why_not_cuda(out, left, right, keep_left, keep_right, block, *metrics)
    if why is not None:
        return why
    if out is not grad:
        out.copy_(grad)
    torch.ops.sculpt._cuda_project_(out, left, right, *metrics, keep_left=keep_left, keep_right=keep_right, block=block)
    return None


def _asked(matrix: Tensor, left: Tensor | None, right: Tensor | None) -> str:
    """Shapes, dtypes and ranks, as an error names them."""
    bases = [
        f"{name} {tuple(basis.shape)} {basis.dtype}"
        for name, basis in (("left", left), ("right", right))
        if basis is not None
    ]
    return f"grad {tuple(matrix.shape)} {matrix.dtype}, {', '.join(bases)}"


def backend_of(grad: Tensor, left: Tensor | None, right: Tensor | None, block: bool, matrices: int = 1) -> Backend:
    """What the heuristics choose for this matrix, one of so many of a list; at least one basis is there."""
    dtypes = [basis.dtype for basis in (left, right) if basis is not None]
    return choose(
        grad.shape[-2],
        grad.shape[-1],
        None if left is None else left.shape[-1],
        None if right is None else right.shape[-1],
        grad.dtype,
        torch.float32 if torch.float32 in dtypes else dtypes[0],
        batch=matrices * grad.shape[:-2].numel(),
        gpu=gpu_of(grad.device.index if grad.is_cuda else None),
        triton=triton_missing() is None,
        cuda=grad.dim() == 2 and cuda_missing() is None,  # of batches it has nothing, Triton has
        block=block,
    )


def check_metric_backend(op: str, forced: Backend | None) -> None:
    """RuntimeError where a variant is asked for that takes no metric."""
    if forced == "triton":
        raise RuntimeError(
            f"{op}: SCULPT_BACKEND: given '{forced}', but it takes no left_metric and no right_metric, wanted 'cublas' "
            "or 'cuda'"
        )


def _cannot_run(op: str, forced: Backend, why: str, grad: Tensor, left: Tensor | None, right: Tensor | None) -> str:
    return f"{op}: SCULPT_BACKEND: given '{forced}', but it cannot run {_asked(grad, left, right)}: {why}"


def check_forced(
    op: str,
    forced: Backend,
    grad: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    keep_left: bool,
    keep_right: bool,
    block: bool,
    left_metric: Tensor | None = None,
    right_metric: Tensor | None = None,
) -> None:
    """RuntimeError where the variant that is asked for cannot project this matrix in place."""
    why = None
    if forced == "triton":
        why = _why_not_triton(grad, left, right, keep_left, keep_right, block)
    elif forced == "cuda":
        metrics = left_metric, right_metric
        why = cuda_missing() or why_not_cuda(grad, left, right, keep_left, keep_right, block, *metrics)
    if why is not None:
        raise RuntimeError(_cannot_run(op, forced, why, grad, left, right))


def project_into(
    grad: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    out: Tensor,
    keep_left: bool,
    keep_right: bool,
    block: bool,
    op: str = "project",
    left_metric: Tensor | None = None,
    right_metric: Tensor | None = None,
) -> None:
    """``out`` (which may be ``grad``) becomes the projection of ``grad``, by the variant that the heuristics choose;
    with a metric library products, unless CUDA C++ is asked for."""
    if left is None and right is None:
        if out is not grad:
            out.copy_(grad)
        return
    if grad.numel() == 0:
        return
    forced = forced_backend()
    if left_metric is not None or right_metric is not None:
        check_metric_backend(op, forced)
        backend: Backend = forced or "cublas"
    else:
        backend = forced or backend_of(grad, left, right, block)
    if backend != "cublas":
        given = grad, left, right, out, keep_left, keep_right, block
        why = project_triton(*given) if backend == "triton" else project_cuda(*given, left_metric, right_metric)
        if why is None:
            return
        if forced is not None:
            raise RuntimeError(_cannot_run(op, forced, why, grad, left, right))
    project_cublas(grad, left, right, out, keep_left, keep_right, block, left_metric, right_metric)

"""Plain torch twins of every op, for any floating dtype: what tests and benchmarks compare the kernels with.

A half-precision matrix with an fp32 basis is computed in fp32 and rounded once; otherwise the arithmetic is that of the
matrix's own dtype. Nothing here is fast and nothing here validates: the ops in :mod:`sculpt_ops.ops` do both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .philox import normals, philox
from .philox import rademacher as signs

__all__ = [
    "adam_",
    "add_split_",
    "corrected_parts",
    "foreach_project_",
    "jacobi_svd",
    "join_halves",
    "orthonormalize",
    "project",
    "project_",
    "restore_",
    "round_stochastic_",
    "rsvd",
    "sketch",
    "split_",
    "split_parts",
    "test_matrix",
]


def _one_side(matrix: Tensor, basis: Tensor | None, metric: Tensor | None, *, keep: bool, right: bool) -> Tensor:
    if basis is None:
        return matrix
    coefficients = matrix @ basis if right else basis.mT @ matrix
    if metric is not None:
        coefficients = coefficients @ metric if right else metric @ coefficients
    inside = coefficients @ basis.mT if right else basis @ coefficients
    return inside if keep else matrix - inside


def project(
    grad: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
    *,
    keep_left: bool = False,
    keep_right: bool = False,
    block: bool = False,
    left_metric: Tensor | None = None,
    right_metric: Tensor | None = None,
) -> Tensor:
    """``(I - L Lᵀ) grad (I - R Rᵀ)``; see :func:`sculpt_ops.project` for shapes, flags, metrics and sources."""
    dtype = grad.dtype
    for thin in (left, right, left_metric, right_metric):
        if thin is not None:
            dtype = torch.promote_types(dtype, thin.dtype)
    matrix = grad.to(dtype)
    left, right, left_metric, right_metric = (
        None if thin is None else thin.to(dtype) for thin in (left, right, left_metric, right_metric)
    )
    if block:
        inside = _one_side(matrix, left, left_metric, keep=True, right=False)
        return (matrix - _one_side(inside, right, right_metric, keep=True, right=True)).to(grad.dtype)
    matrix = _one_side(matrix, left, left_metric, keep=keep_left, right=False)
    matrix = _one_side(matrix, right, right_metric, keep=keep_right, right=True)
    return matrix.to(grad.dtype, copy=matrix is grad)


def project_(
    grad: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
    *,
    keep_left: bool = False,
    keep_right: bool = False,
    block: bool = False,
    left_metric: Tensor | None = None,
    right_metric: Tensor | None = None,
) -> Tensor:
    """In-place :func:`project`; returns ``grad``."""
    flags = {"keep_left": keep_left, "keep_right": keep_right, "block": block}
    return grad.copy_(project(grad, left, right, **flags, left_metric=left_metric, right_metric=right_metric))


def foreach_project_(
    grads: Sequence[Tensor],
    lefts: Sequence[Tensor | None],
    rights: Sequence[Tensor | None],
    *,
    keep_lefts: Sequence[bool] = (),
    keep_rights: Sequence[bool] = (),
    block: bool = False,
    left_metrics: Sequence[Tensor | None] = (),
    right_metrics: Sequence[Tensor | None] = (),
) -> None:
    """:func:`project_` on every entry; empty lists mean ``False`` and ``None`` throughout."""
    for i, (grad, left, right) in enumerate(zip(grads, lefts, rights, strict=True)):
        project_(
            grad,
            left,
            right,
            keep_left=keep_lefts[i] if keep_lefts else False,
            keep_right=keep_rights[i] if keep_rights else False,
            block=block,
            left_metric=left_metrics[i] if left_metrics else None,
            right_metric=right_metrics[i] if right_metrics else None,
        )


def restore_(
    weight: Tensor,
    left: Tensor | None,
    left_image: Tensor | None,
    right: Tensor | None,
    right_image: Tensor | None,
    *,
    core: Tensor | None = None,
    reference: Tensor | None = None,
    keep_left: bool = False,
    keep_right: bool = False,
    block: bool = False,
) -> Tensor:
    """Put the protected part of ``weight`` back; see :func:`sculpt_ops.restore_`. Returns ``weight``."""
    dtype = weight.dtype
    for basis in (left, right):
        if basis is not None:
            dtype = torch.promote_types(dtype, basis.dtype)
    cast = [None if t is None else t.to(dtype) for t in (left, left_image, right, right_image, core, reference)]
    left, left_image, right, right_image, core, reference = cast
    matrix = weight.to(dtype)
    if block:
        assert left is not None
        assert right is not None
        assert core is not None
        return weight.copy_(matrix - left @ (left.mT @ matrix @ right - core) @ right.mT)
    if left is not None:
        if keep_left:
            assert reference is not None
            matrix = reference + left @ (left.mT @ (matrix - reference))
        else:
            assert left_image is not None
            matrix = matrix - left @ (left.mT @ matrix - left_image)
    if right is not None:
        if keep_right:
            assert reference is not None
            matrix = reference + (matrix - reference) @ right @ right.mT
        else:
            assert right_image is not None
            matrix = matrix - (matrix @ right - right_image) @ right.mT
    return weight.copy_(matrix)


def test_matrix(
    input: Tensor,
    q: int,
    *,
    seed: int,
    transpose: bool = False,
    rademacher: bool = False,
    row: int = 0,
    column: int = 0,
) -> Tensor:
    """Ω of the range finder, equal to the bit to :func:`sculpt_ops.ops.test_matrix`, which says how it is drawn."""
    rows, device = input.shape[-2 if transpose else -1], input.device
    first, skip = column // 4, column % 4
    counter = (
        torch.arange(row, row + rows, device=device)[:, None],
        torch.arange(first, first + (skip + q + 3) // 4, device=device),
        torch.arange(input.shape[:-2].numel(), device=device)[:, None, None],
        torch.zeros((), dtype=torch.int64, device=device),
    )
    words = philox(counter, seed)
    entries = torch.stack((signs if rademacher else normals)(words), -1).flatten(-2)[..., skip : skip + q]
    entries = entries.to(torch.float32 if input.dtype is torch.float64 else input.dtype)
    return entries.to(torch.promote_types(input.dtype, torch.float32)).reshape(*input.shape[:-2], rows, q)


def sketch(
    input: Tensor,
    q: int,
    *,
    seed: int,
    transpose: bool = False,
    rademacher: bool = False,
    row: int = 0,
    column: int = 0,
) -> Tensor:
    """``input @ Ω`` or ``inputᵀ @ Ω``, in fp32 for a half-precision input; see :func:`sculpt_ops.sketch`."""
    omega = test_matrix(input, q, seed=seed, transpose=transpose, rademacher=rademacher, row=row, column=column)
    return (input.mT if transpose else input).to(omega.dtype) @ omega


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def orthonormalize(input: Tensor) -> Tensor:
    """The Q of Householder QR, signs such that the diagonal of R is positive; see :func:`sculpt_ops.orthonormalize`."""
    Q, R = torch.linalg.qr(_at_least_float32(input))
    return torch.where(R.diagonal(dim1=-2, dim2=-1).unsqueeze(-2) < 0, -Q, Q)


def rsvd(
    matrix: Tensor,
    rank: int,
    *,
    oversample: int = 16,
    n_iter: int = 2,
    seed: int = 0,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Halko, Martinsson and Tropp, algorithms 4.4 and 5.1, sketched from the right; see :func:`sculpt_ops.rsvd`."""
    width = min(rank + oversample, *matrix.shape[-2:])
    omega = test_matrix(matrix, width, seed=seed)
    if start is not None:
        omega = torch.cat((start[..., :width], omega[..., start.shape[-1] :]), dim=-1)
    matrix = _at_least_float32(matrix)
    basis = orthonormalize(matrix @ omega)
    for _ in range(n_iter):
        basis = orthonormalize(matrix @ orthonormalize(matrix.mT @ basis))
    # matrix ≈ basis (basisᵀ matrix); the triangular factor of the wide part keeps the digits of small singular values.
    wide, triangle = torch.linalg.qr(matrix.mT @ basis)
    left, S, right = torch.linalg.svd(triangle.mT, full_matrices=False)
    U, V = (basis @ left)[..., :rank], (wide @ right.mT)[..., :rank]
    sign = U.gather(-2, U.abs().argmax(dim=-2, keepdim=True)).sgn()
    return U * sign, S[..., :rank].contiguous(), V * sign


def jacobi_svd(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The library's SVD, V not transposed; see :func:`sculpt_ops.ops.jacobi.jacobi_svd`."""
    U, S, Vh = torch.linalg.svd(input)
    return U.contiguous(), S, Vh.mT.contiguous()


def join_halves(high: Tensor, low: Tensor) -> Tensor:
    """float32 of bits ``(high << 16) + low``; see :func:`sculpt_ops.ops.rounding.join_halves`."""
    bits = (high.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)
    return bits.view(torch.float32).contiguous()


def split_(value: Tensor, high: Tensor, low: Tensor) -> None:
    """Write the halves of ``value``; see :func:`sculpt_ops.ops.rounding.split_`."""
    bits, nan = value.view(torch.int32), value.isnan()
    rounded = torch.where(nan, bits >> 16 | 0x40, (bits + 0x8000) >> 16)
    high.view(torch.int16).copy_(_wrap_int16(rounded))
    low.copy_(_wrap_int16(bits.masked_fill(nan, 0)))


def _wrap_int16(bits: Tensor) -> Tensor:
    """The low 16 bits; a conversion that overflows is not defined on every device."""
    return ((bits << 16) >> 16).to(torch.int16)


def add_split_(high: Tensor, low: Tensor, step: Tensor) -> None:
    """Add ``step`` to the number of two halves; see :func:`sculpt_ops.ops.rounding.add_split_`."""
    split_(join_halves(high, low) + step, high, low)


def split_parts(out: Tensor, source: Tensor, low: int, second: tuple[Tensor, Tensor] | None = None) -> None:
    """Write bfloat16 parts of thin factors; see :func:`sculpt_ops.triton_kernels.split_parts.split_parts`."""
    pairs = [(out, source)] if second is None else [(out, source), second]
    for parts, x in pairs:
        rank = parts.shape[1] // 3
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if x.shape[1] != rank:
            x = x[:, :rank] + x[:, rank:]
        thirds = [parts[:, third * rank : (third + 1) * rank] for third in (0, 3 - low, low)]
        high = thirds[0].copy_(x)
        thirds[1].copy_(high)
        thirds[2].copy_((x - high).nan_to_num_(0, 0, 0))


def corrected_parts(out: Tensor, source: Tensor | None, basis: Tensor, core: Tensor) -> None:
    """Write parts of C - X K; see :func:`sculpt_ops.triton_kernels.split_parts.corrected_parts`."""
    rank, depth = out.shape[1] // 3, basis.shape[1]
    inside = core[:depth, :rank] + (core[depth:, :rank] + core[:depth, rank:])
    x = basis.to(core.dtype) @ inside
    split_parts(out, x if source is None else source[:, :rank] + source[:, rank:] - x, 2)


def round_stochastic_(out: Tensor, value: Tensor, *, seed: int, offset: int = 0) -> Tensor:
    """Round ``value`` to bfloat16 by Philox's bits; see :func:`sculpt_ops.ops.rounding.round_stochastic_`."""
    group = torch.arange(offset // 8, (offset + value.numel() + 7) // 8, device=value.device)
    zero = torch.zeros_like(group)
    words = philox((group & 0xFFFFFFFF, group >> 32, zero, zero + 1), seed)
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1).flatten()
    noise = halves[offset % 8 :][: value.numel()].view(value.shape).to(torch.int32)
    bits = value.view(torch.int32)
    truncated = torch.where(value.isnan(), bits >> 16 | 0x40, bits >> 16)
    rounded = torch.where(bits & 0x7FFFFFFF < 0x7F7F0000, (bits + noise) >> 16, truncated)
    out.view(torch.int16).copy_(rounded)
    return out


def adam_(
    steps: Sequence[Tensor],
    grads: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    counts: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    lows: Sequence[Tensor | None],
    starts: Sequence[Tensor | None],
    lr: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
) -> None:
    """AdamW's moments and steps; see :func:`sculpt_ops.ops.adam.adam_`."""
    for step, grad, first, second, count, weight, low, start in zip(
        steps, grads, firsts, seconds, counts, weights, lows, starts, strict=True
    ):
        count += 1
        wide = -grad.float() if maximize else grad.float()
        # In float64: 1 - 0.999 in float32 is off by 2^-14.
        rate = (lr.double() / (1 - beta1 ** count.double())).float()
        root = (1 - beta2 ** count.double()).sqrt().float()
        mean, square = first.float(), second.float()
        mean.add_((wide - mean) * (1 - beta1))
        square.copy_(square * beta2 + wide * (1 - beta2) * wide)
        # Through float64: torch's own float32 root is off in the last bit for one number in six.
        taken = -(mean * rate) / (square.double().sqrt().float() / root + eps)
        first.copy_(mean)
        second.copy_(square)
        if weight is not None and weight_decay:
            value = weight.float() if low is None else join_halves(weight, low)
            taken.sub_((value if start is None else value - start.float()) * (lr.double() * weight_decay).float())
        step.copy_(taken)

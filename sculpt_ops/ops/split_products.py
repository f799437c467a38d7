"""A bfloat16 matrix with float32 bases in library products on bfloat16 tensor cores.

The matrix is exact in bfloat16. A thin factor x is two parts, its rounding and what that took: x = h + l to 2^-17.
Those of a basis lie beside each other as [h, l, h]: the first two thirds give Lᵀ G in one product, as two halves whose
sum is the coefficients C. Their parts lie as [h, h, l], and L C = h h + l h + h l is one product more. That is 2 + 3
products of rank r, where a float32 copy of the matrix takes 2 without tensor cores and three more passes over memory:
on an H200 at rank 64 that copy took five times as long as a bfloat16 basis (208 us and 38 us, 4096 x 4096).

Between products stands one launch of a Triton kernel (`triton_kernels/split_parts.py`): four launches a side, with
the parts of the basis first and those of the coefficients after the first product; seven for two sides, at once or one
after the other; six for two bases of which one is kept, or in the block form, while ranks are small.

The bfloat16 rounding of the coefficient, which the plain expression with a bfloat16 basis makes, would leave 6e-4 of
the protected part; with two parts less than 2e-5 of the matrix is left before the result itself is rounded.

In the code below the near basis meets the matrix first, and turned says that it is the right one: everything is that of
a left basis and the transposed matrix. Thin factors are (length, rank), whichever way they lie in memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .heuristics import left_first, stacked, triton_missing

__all__ = [
    "can_split",
    "coefficients_of",
    "parts_of",
    "product_in_parts",
    "project_split",
    "project_to_float32",
    "splitting_pays",
    "through_thin_order",
    "wide_mm",
    "write_projection",
]

# Most r + s of two sides at once. On an H200, 4096 x 11008 and 11008 x 4096, that took 0.94 to 0.97 of the sides' own
# times at 128, and 1.08 to 1.10 at 256 (bench/results/nvidia-h200-2026-11-26.json).
AT_ONCE = 128
# Least r + s of float32 matrices. Their products have no tensor cores (51 TFLOP/s on an H200, bfloat16 790); below some
# 160 three products of parts would take longer, where splitting the matrix is most of the work.
SPLIT_FLOAT32 = 256
# Largest rank of a correction in one kernel, which reads the core and the basis again for every tile; not measured.
CORRECTED = 128


def can_split(grad: Tensor, left: Tensor | None, right: Tensor | None) -> bool:
    """One bfloat16 matrix, at least one float32 basis. Not float16, whose coefficients could overflow."""
    bases = [basis for basis in (left, right) if basis is not None]
    return (
        grad.dtype == torch.bfloat16
        and any(basis.dtype == torch.float32 for basis in bases)
        and all(tensor.dim() == 2 for tensor in (grad, *bases))
    )


def splitting_pays(matrix: Tensor, rank: int) -> bool:
    """One float32 matrix with float32 bases of so many columns together: on a GPU faster in parts than in products of
    float32."""
    return matrix.dim() == 2 and matrix.dtype == torch.float32 and rank >= SPLIT_FLOAT32


@cache
def _triton_parts() -> Any:
    """The module of the kernels; None where there is no Triton."""
    if triton_missing():
        return None
    from ..triton_kernels import split_parts

    return split_parts


def _kernels(tensor: Tensor) -> Any:
    """What has `split_parts` and `corrected_parts` for this tensor's device: the kernels or their twins."""
    return (_triton_parts() if tensor.is_cuda else None) or reference


def _corrects(grad: Tensor, r: int, s: int) -> bool:
    """Whether a correction of coefficients is one kernel: its twin's product may be TF32 on a GPU."""
    return max(r, s) <= CORRECTED and not (grad.is_cuda and _triton_parts() is None)


def wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """a b of bfloat16 in float32."""
    if a.is_cuda and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def parts_of(factor: Tensor, low: int) -> Tensor:
    """[h, l, h] of a float32 factor for low = 1, [h, h, l] for 2: (length, 3 rank) of (length, rank)."""
    parts = factor.new_empty(factor.shape[0], 3 * factor.shape[1], dtype=torch.bfloat16)
    _kernels(factor).split_parts(parts, factor, low)
    return parts


def product_in_parts(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ of float32 matrices, to 2^-16 of it: three products of bfloat16 as one of three times the depth."""
    return wide_mm(parts_of(a, 1), parts_of(b, 2).mT)


def _bases(near: Tensor, far: Tensor) -> list[Tensor]:
    """[h, l, h] of each, in one launch."""
    parts = [basis.new_empty(basis.shape[0], 3 * basis.shape[1], dtype=torch.bfloat16) for basis in (near, far)]
    _kernels(near).split_parts(parts[0], near, 1, (parts[1], far))
    return parts


def through_thin_order(
    grad: Tensor, left: Tensor, right: Tensor, keep_left: bool, keep_right: bool, block: bool
) -> tuple[bool, bool]:
    """Of two sides of which one is kept, or of a block: whether the right basis is the near one, and whether what the
    far one spans of the coefficients takes their place."""
    both = block or (keep_left and keep_right)
    first = left_first(grad.shape[0], grad.shape[1], left.shape[1], right.shape[1]) if both else keep_left
    return not first, both


def _room(grad: Tensor, rank: int, turned: bool) -> Tensor:
    """For the parts of rank / 3 coefficients of a near basis: (n, rank), (m, rank) of a turned one."""
    m, n = grad.shape
    return grad.new_empty(m, rank) if turned else grad.new_empty(rank, n).mT


def coefficients_of(grad: Tensor, basis: Tensor, turned: bool) -> Tensor:
    """Gᵀ X of a bfloat16 basis, (n, rank) float32; of a turned one G X, (m, rank)."""
    return wide_mm(grad, basis) if turned else wide_mm(basis.mT, grad).mT


def _coefficients(grad: Tensor, basis: Tensor, rank: int, turned: bool, rest: Tensor | None = None) -> Tensor:
    """Two halves, whose sum is the coefficients, of [h, l] of a basis: twice the rank wide. rest: of a float32 matrix
    what its rounding, grad, took."""
    halves = coefficients_of(grad, basis[:, : 2 * rank], turned)
    if rest is not None:
        halves[:, :rank] += coefficients_of(rest, basis[:, :rank], turned)
    return halves


def write_projection(grad: Tensor, near: Tensor, coefficients: Tensor, out: Tensor, turned: bool, keeps: bool) -> None:
    """out = grad - X Cᵀ, or X Cᵀ alone where it keeps."""
    tall, wide = (coefficients, near.mT) if turned else (near, coefficients.mT)
    if not keeps:
        torch.addmm(grad, tall, wide, alpha=-1, out=out)
    elif out.is_contiguous():
        torch.mm(tall, wide, out=out)
    else:
        out.copy_(torch.mm(tall, wide))


def _one_side(grad: Tensor, basis: Tensor, out: Tensor, turned: bool, keeps: bool) -> None:
    """One side, of a basis in parts."""
    rank = basis.shape[1] // 3
    halves = _coefficients(grad, basis, rank, turned)
    coefficients = _room(grad, 3 * rank, turned)
    _kernels(grad).split_parts(coefficients, halves, 2)
    write_projection(grad, basis, coefficients, out, turned, keeps)


def _at_once(grad: Tensor, near: Tensor, far: Tensor, out: Tensor, turned: bool) -> None:
    """Both sides removed: G - [X, B - X (Xᵀ B)] [Xᵀ G; Yᵀ] with B = G Y.

    X is the shorter basis and B as short, the thin factor that is cleared of what both contain.
    """
    r, s = near.shape[1], far.shape[1]
    kernels = _kernels(grad)
    tall = grad.new_empty(near.shape[0], 3 * (r + s))
    wide = _room(grad, 3 * (r + s), turned)
    of_near, of_far = wide[:, : 3 * r], wide[:, 3 * r :]
    kernels.split_parts(tall[:, : 3 * r], near, 1, (of_far, far))
    kernels.split_parts(of_near, _coefficients(grad, tall, r, turned), 2)
    halves = _coefficients(grad, of_far, s, not turned)
    core = wide_mm(of_near[:, r:].mT, of_far[:, : 2 * s])
    kernels.corrected_parts(tall[:, 3 * r :], halves, near, core)
    write_projection(grad, tall, wide, out, turned, False)


def _through_thin(
    grad: Tensor, near: Tensor, far: Tensor, out: Tensor, turned: bool, spanned: bool, keeps: bool
) -> None:
    """The near side and, applied to its coefficients alone, the far one.

    spanned: what the far basis spans of the coefficients, not the rest. keeps: that and not what it leaves of grad.
    """
    r, s = near.shape[1], far.shape[1]
    kernels = _kernels(grad)
    X, Y = _bases(near, far)
    halves = _coefficients(grad, X, r, turned)
    coefficients = _room(grad, 3 * r, turned)
    kernels.split_parts(coefficients, halves, 2)
    pair = coefficients[:, r:]
    if _corrects(grad, r, s):
        core = wide_mm(Y[:, : 2 * s].mT, pair)
        kernels.corrected_parts(coefficients, None if spanned else halves, far, core)
    else:
        # h h + h l and l h of the core: l l would be a fourth product.
        core = wide_mm(pair.mT, Y[:, :s])
        core = core[:r] + core[r:] + wide_mm(coefficients[:, :r].mT, Y[:, s : 2 * s])
        kernels.split_parts(parts := grad.new_empty(r, 3 * s), core, 2)
        inside = wide_mm(Y, parts.mT) if turned else wide_mm(parts, Y.mT).mT
        kernels.split_parts(coefficients, inside if spanned else halves[:, :r] + halves[:, r:] - inside, 2)
    write_projection(grad, X, coefficients, out, turned, keeps)


def project_to_float32(
    grad: Tensor, left: Tensor | None, right: Tensor | None, above: int = 0, before: int = 0
) -> Tensor:
    """The projection, sides removed, in float32 to 2^-17 of the matrix: of what `can_split` takes, or all in float32.
    Without the first `above` rows and `before` columns."""
    kernels = _kernels(grad)
    matrix = grad.bfloat16()
    rest = None if matrix.dtype is grad.dtype else (grad - matrix).bfloat16()
    m, n = grad.shape
    r, s = (0 if basis is None else basis.shape[1] for basis in (left, right))
    # Beside each other [h, l, h] of the left basis and [h, h, l] of the right image, below it the other way round.
    A, B = (grad.new_empty(size, 3 * (r + s), dtype=torch.bfloat16) for size in (m, n))
    L, image, coimage, R = A[:, : 3 * r], A[:, 3 * r :], B[:, : 3 * r], B[:, 3 * r :]
    bases = [pair for pair in ((L, left), (R, right)) if pair[1] is not None]
    kernels.split_parts(*bases[0], 1, *bases[1:])
    below = None if left is None else _coefficients(matrix, L, r, False, rest)
    beside = None if right is None else _coefficients(matrix, R, s, True, rest)
    del matrix, rest
    if below is None or beside is None:
        kernels.split_parts(*((image, beside) if below is None else (coimage, below)), 2)
    elif _corrects(grad, r, s):
        kernels.split_parts(coimage, below, 2)
        core = wide_mm(coimage[:, r:].mT, R[:, : 2 * s])
        kernels.corrected_parts(image, beside, left, core)
    else:
        kernels.split_parts(image, beside, 2)
        four = wide_mm(L[:, : 2 * r].mT, image[:, s:])
        core = four[:r, :s] + four[:r, s:] + four[r:, :s] + four[r:, s:]
        inside = wide_mm(R, parts_of(core, 2).mT)
        kernels.split_parts(coimage, below[:, :r] + below[:, r:] - inside, 2)
    removed = wide_mm(A[above:], B[before:].mT)
    return torch.sub(grad[above:, before:], removed, out=removed)


def project_split(
    grad: Tensor, left: Tensor | None, right: Tensor | None, out: Tensor, keep_left: bool, keep_right: bool, block: bool
) -> None:
    """Write the projection of what `can_split` takes into out, which may be grad itself."""
    m, n = grad.shape
    if left is None or right is None:
        basis, keep = (right, keep_right) if left is None else (left, keep_left)
        assert basis is not None
        _one_side(grad, parts_of(basis, 1), out, left is None, keep and not block)
        return
    r, s = left.shape[1], right.shape[1]
    if keep_left or keep_right or block:
        turned, spanned = through_thin_order(grad, left, right, keep_left, keep_right, block)
        near, far = (right, left) if turned else (left, right)
        _through_thin(grad, near, far, out, turned, spanned, keeps=not block)
    elif r + s <= AT_ONCE and _corrects(grad, r, s) and stacked(m, n, 3 * r, 3 * s, grad.dtype):
        turned = m > n
        near, far = (right, left) if turned else (left, right)
        _at_once(grad, near, far, out, turned)
    else:
        L, R = _bases(left, right)
        _one_side(grad, L, out, False, False)
        _one_side(out, R, out, True, False)

"""Projection of a matrix away from, or into, the span of orthonormal bases.

Source: "Sculpting Subspaces" (arXiv 2504.07097), section 3: the gradient of a weight matrix keeps only what lies
outside the protected singular directions. ``block=True`` is the formula printed there, both sides are what its code
does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .checks import (
    check_apart,
    check_foreach,
    check_foreach_apart,
    check_project,
    check_written,
    has_tangent,
    refuse_forward_mode,
)
from .derivatives import register_backward
from .finite import has_values
from .library import AFTER_AUTOGRAD, LIBRARY, explained

__all__ = ["foreach_project_", "project", "project_"]

_PROJECT = torch.ops.sculpt.project.default
_PROJECT_ = torch.ops.sculpt.project_.default
_FOREACH_ = torch.ops.sculpt.foreach_project_.default
_THIN = ("left", "right", "left_metric", "right_metric")


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
    """``(I - L Lᵀ) grad (I - R Rᵀ)`` as a new tensor; a side whose basis is None is left alone.

    Args:
        grad: (..., m, n), float32, float64, bfloat16 or float16; any strides.
        left: (..., m, r) with orthonormal columns, r <= m, grad's dtype (or float32 with a half-precision grad). Its
            leading dimensions broadcast to grad's.
        right: (..., n, s), likewise.
        keep_left: ``left`` spans the space to keep: ``L Lᵀ`` takes the place of ``I - L Lᵀ``. The cheaper form when the
            free space is the narrower one.
        keep_right: the same for ``right``.
        block: ``grad - L Lᵀ grad R Rᵀ``, which removes only the part that both bases see. Takes both sides and no keep
            flag.
        left_metric: (..., r, r) M, float32 (or float64, with a float64 grad): ``L M Lᵀ`` in the place of ``L Lᵀ``; None
            is the identity. With ``M = (LᵀL)⁻¹``, computed in float64, it is the exact projector onto the span of the
            columns, which need not be orthonormal then: those of a basis rounded to bf16. With a diagonal M of
            importances in [0, 1] directions are protected in part (scaled gradient projection, Saha and Roy, AAAI 2023,
            arXiv 2302.01386).
        right_metric: (..., s, s), ``R M Rᵀ`` likewise.

    Differentiable in all tensors, to any order; forward-mode derivatives and those of ``torch.func`` are computed with
    torch's own products. Without a metric the columns are trusted to be orthonormal: 5e-6 off already leaks 4e-6 of the
    gradient. A bf16 basis used as if orthonormal leaks 3e-3; give it its metric, or a float32 basis, where
    that matters. On a GPU everything with a metric is library products (CUDA C++ has metrics too, not yet run on a GPU:
    ``SCULPT_BACKEND=cuda``): prefer a float32 basis where its rank is 64 or less, which the one-pass kernel takes.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what was wanted; nothing has been written.
    """
    thin = left, right, left_metric, right_metric
    flags: dict[str, Any] = {"keep_left": keep_left, "keep_right": keep_right, "block": block}

    def check() -> None:
        check_project("project", grad, *thin, **flags)

    out: Tensor = explained(check, _PROJECT, grad, *thin, **flags)
    return out


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
    """In-place :func:`project`; returns ``grad``.

    In grad mode a leaf that requires grad is refused before anything is written, as is a basis or a metric that
    requires grad; on a non-leaf the call is differentiable in ``grad`` (in forward mode in the others too). ``grad``
    must hold every element once (no expanded tensor) and share no memory with the others.
    """
    flags: dict[str, Any] = {"keep_left": keep_left, "keep_right": keep_right, "block": block}
    thin = left, right, left_metric, right_metric

    def check() -> None:
        check_project("project_", grad, *thin, **flags)
        check_written("project_", "grad", grad)
        check_apart("project_", "grad", grad, **dict(zip(_THIN, thin, strict=True)))

    explained(check, _PROJECT_, grad, *thin, **flags)
    return grad


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
    """:func:`project_` on every entry of ``grads``: shapes, ranks, dtypes and kept sides may all differ.

    The lists have one entry a matrix; empty lists of flags and metrics mean ``False`` and ``None`` throughout. Entries
    that share memory are refused in eager mode, and so, in grad mode, is any input that requires grad.
    """
    metrics = [list(entries) if entries else None for entries in (left_metrics, right_metrics)]
    flags: dict[str, Any] = {"keep_lefts": keep_lefts, "keep_rights": keep_rights, "block": block}
    if len(grads) == 0:  # lists without a tensor reach no backend, and an empty model is not an error
        return check_foreach("foreach_project_", grads, lefts, rights, *metrics, **flags)

    def check() -> None:
        check_foreach("foreach_project_", grads, lefts, rights, *metrics, **flags)
        check_foreach_apart("foreach_project_", grads, lefts, rights, *metrics)

    explained(check, _FOREACH_, list(grads), list(lefts), list(rights), *metrics, **flags)


@torch.library.register_fake("sculpt::project")
def _project_fake(grad: Tensor, *thin: Tensor | None, **flags: Any) -> Tensor:
    check_project("project", grad, *_four(thin), **flags)
    return torch.empty_like(grad)


@torch.library.register_fake("sculpt::project_")
def _project_fake_(grad: Tensor, *thin: Tensor | None, **flags: Any) -> None:
    check_project("project_", grad, *_four(thin), **flags)


@torch.library.register_fake("sculpt::foreach_project_")
def _foreach_fake_(grads: Sequence[Tensor], *thin: Any, **flags: Any) -> None:
    check_foreach("foreach_project_", grads, *thin, **flags)


def _four(thin: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    """left, right, left_metric, right_metric (or what a caller has for each): the dispatcher leaves out trailing
    arguments that equal their default."""
    return (*thin, None, None, None, None)[:4]


def _transposed(metric: Tensor | None) -> Tensor | None:
    return None if metric is None else metric.mT


def _side_gradients(
    go: Tensor, matrix: Tensor, basis: Tensor, metric: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """d/dL and d/dM of <go, X -+ L M Lᵀ X>: minus (go (Xᵀ L) Mᵀ + X (goᵀ L) M) and minus (Lᵀ go) (Xᵀ L), plus where the
    side is kept; summed over broadcasts. Computed in the dtype of the matrix X."""
    wide = matrix.dtype
    sign = 1.0 if keep else -1.0
    go, basis_ = go.to(wide), basis.to(wide)
    seen, asked = matrix.mT @ basis_, go.mT @ basis_
    if metric is None:
        return (sign * (go @ seen + matrix @ asked)).sum_to_size(basis.shape).to(basis.dtype), None
    M = metric.to(wide)
    d_basis = sign * (go @ (seen @ M.mT) + matrix @ (asked @ M))
    d_metric = sign * (asked.mT @ seen)
    return d_basis.sum_to_size(basis.shape).to(basis.dtype), d_metric.sum_to_size(metric.shape).to(metric.dtype)


def _project_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    grad, *given = inputs
    thin = _four(given)
    # grad itself is needed by the gradients of bases and metrics only.
    needed = any(tensor is not None and tensor.requires_grad for tensor in thin)
    ctx.save_for_backward(grad if needed else None, *thin)
    ctx.flags = keyword_only_inputs


def _project_backward(ctx: Any, go: Tensor) -> tuple[Tensor | None, ...]:
    grad, left, right, left_metric, right_metric = ctx.saved_tensors
    flags = ctx.flags
    block = flags["block"]
    need_grad, *need = ctx.needs_input_grad
    need_left, need_right, need_left_metric, need_right_metric = _four(need)
    d_grad = d_left = d_right = d_left_metric = d_right_metric = None
    if need_grad:
        d_grad = _PROJECT(go, left, right, _transposed(left_metric), _transposed(right_metric), **flags)
    if grad is not None:
        # In the dtype of the plain expression: a 16-bit matrix of which the other side is removed would be rounded in
        # between, which left 1.6e-3 of the gradient of a float32 basis where the plain expression has 3e-7.
        for thin in (left, right, left_metric, right_metric):
            grad = grad if thin is None else grad.to(torch.promote_types(grad.dtype, thin.dtype))
        near, far = (basis if basis is None else basis.to(grad.dtype) for basis in (left, right))
    if need_left or need_left_metric:
        keep = block or flags["keep_right"]
        seen = grad if right is None else _PROJECT(grad, None, far, None, right_metric, keep_right=keep)
        d_left, d_left_metric = _side_gradients(go, seen, left, left_metric, flags["keep_left"])
    if need_right or need_right_metric:
        keep = block or flags["keep_left"]
        seen = grad if left is None else _PROJECT(grad, near, None, left_metric, keep_left=keep)
        of_right = go.mT, seen.mT, right, _transposed(right_metric)
        d_right, d_right_metric = _side_gradients(*of_right, flags["keep_right"])
    found = d_grad, d_left, d_right, d_left_metric, _transposed(d_right_metric)
    return found[: len(ctx.needs_input_grad)]


def _project_expression(grad: Tensor, *thin: Tensor | None, **flags: Any) -> Tensor:
    left, right, left_metric, right_metric = _four(thin)
    check_project("project", grad, left, right, left_metric, right_metric, **flags)
    return reference.project(grad, left, right, left_metric=left_metric, right_metric=right_metric, **flags)


register_backward(_PROJECT, _project_backward, _project_setup, expression=_project_expression)


def _refuse_basis_grad(op: str, **bases: Tensor | None) -> None:
    """An in-place form has no gradient for its bases and metrics; say so instead of returning a wrong one."""
    for name, basis in bases.items():
        if basis is not None and basis.requires_grad:
            raise RuntimeError(
                f"{op}: {name}: given a tensor that requires grad, wanted one that does not; the in-place form has no "
                "gradient for it: use project, or detach it"
            )


def _refuse_leaf(op: str, name: str, matrix: Tensor) -> None:
    """Autograd's own complaint about a leaf comes after the write; this one comes before."""
    base = matrix._base if matrix._is_view() else matrix
    if base is not None and base.requires_grad and base.is_leaf:
        raise RuntimeError(
            f"{op}: {name}: given a leaf (or a view of one) that requires grad, wanted a tensor that autograd does not "
            "own; project its .grad, or call under torch.no_grad()"
        )


def _project_autograd_(keyset: Any, grad: Tensor, *given: Tensor | None, **flags: Any) -> None:
    thin = _four(given)
    check_project("project_", grad, *thin, **flags)
    recorded = torch.is_grad_enabled() and grad.requires_grad
    if torch.is_grad_enabled():
        _refuse_basis_grad("project_", **dict(zip(_THIN, thin, strict=True)))
    if recorded:
        _refuse_leaf("project_", "grad", grad)
    if recorded or has_tangent(grad, *thin):
        if has_values(grad):
            # `copy_` would overwrite a basis that the backward formula has kept.
            check_written("project_", "grad", grad)
            check_apart("project_", "grad", grad, **dict(zip(_THIN, thin, strict=True)))
        # copy_ carries autograd's rules for in-place writes (views, saved versions); project carries the derivative.
        grad.copy_(_PROJECT(grad, *thin, **flags))
        return
    _PROJECT_.redispatch(keyset & AFTER_AUTOGRAD, grad, *thin, **flags)
    torch.autograd.graph.increment_version(grad)


def _foreach_autograd_(keyset: Any, grads: list[Tensor], *thin: Any, **flags: Any) -> None:
    if not (grads and grads[0].is_cuda):  # The CUDA kernel checks by itself, once a list and not once a call.
        check_foreach("foreach_project_", grads, *thin, **flags)
    lists = {name: tensors for name, tensors in zip(_THIN, thin, strict=False) if tensors is not None}
    tensors = [tensor for entries in (grads, *lists.values()) for tensor in entries]
    refuse_forward_mode("foreach_project_", *tensors)
    # Asked of all at once first: a name for each takes several times as long.
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        for name, entries in lists.items():
            _refuse_basis_grad("foreach_project_", **{f"{name}s[{i}]": entry for i, entry in enumerate(entries)})
        for i, grad in enumerate(grads):
            if grad.requires_grad:
                raise RuntimeError(
                    f"foreach_project_: grads[{i}]: given a tensor that requires grad, wanted one that does not; "
                    "detach it, or use project_ on it"
                )
    _FOREACH_.redispatch(keyset & AFTER_AUTOGRAD, grads, *thin, **flags)
    torch.autograd.graph.increment_version(grads)


LIBRARY.impl("project_", _project_autograd_, "Autograd", with_keyset=True)
LIBRARY.impl("foreach_project_", _foreach_autograd_, "Autograd", with_keyset=True)


def _vmap_basis(basis: Tensor | None, bdim: int | None, logical: int) -> Tensor | None:
    """The mapped dimension first, then ones up to ``logical`` dimensions: plain broadcasting does the rest."""
    if basis is None or bdim is None:
        return basis
    basis = basis.movedim(bdim, 0)
    return basis.reshape(basis.shape[0], *[1] * (logical + 1 - basis.dim()), *basis.shape[1:])


@torch.library.register_vmap("sculpt::project")
def _project_vmap(
    info: Any, in_dims: tuple[int | None, ...], grad: Tensor, *thin: Tensor | None, **flags: bool
) -> tuple[Tensor, int]:
    dim, *dims = in_dims
    logical = grad.dim() - (dim is not None)
    grad = grad.expand(info.batch_size, *grad.shape) if dim is None else grad.movedim(dim, 0)
    mapped = [_vmap_basis(basis, bdim, logical) for basis, bdim in zip(_four(thin), _four(dims), strict=True)]
    return _PROJECT(grad, *mapped, **flags), 0


@torch.library.register_vmap("sculpt::project_")
def _project_vmap_(
    info: Any, in_dims: tuple[int | None, ...], grad: Tensor, *thin: Tensor | None, **flags: bool
) -> tuple[None, None]:
    dim, *dims = in_dims
    if dim is None:
        raise ValueError("project_: grad: given a tensor that vmap does not map, wanted a mapped one: it is written to")
    mapped = [_vmap_basis(basis, bdim, grad.dim() - 1) for basis, bdim in zip(_four(thin), _four(dims), strict=True)]
    _PROJECT_(grad.movedim(dim, 0), *mapped, **flags)
    return None, None


@torch.library.register_vmap("sculpt::foreach_project_")
def _foreach_vmap_(
    info: Any, in_dims: tuple[Any, ...], grads: Sequence[Tensor], *thin: Sequence[Tensor | None] | None, **flags: Any
) -> tuple[None, None]:
    dims, *thin_dims = in_dims
    for i, dim in enumerate(dims):
        if dim is None:
            raise ValueError(
                f"foreach_project_: grads[{i}]: given a tensor that vmap does not map, wanted a mapped one: it is "
                "written to"
            )
    lists = [
        None
        if entries is None
        else [
            _vmap_basis(basis, bdim, grad.dim() - 1)
            for grad, basis, bdim in zip(grads, entries, bdims or [None] * len(grads), strict=True)
        ]
        for entries, bdims in zip(_four(thin), _four(thin_dims), strict=True)
    ]
    _FOREACH_([grad.movedim(dim, 0) for grad, dim in zip(grads, dims, strict=True)], *lists, **flags)
    return None, None

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

from .checks import check_foreach, check_project, refuse_forward_mode
from .library import AFTER_AUTOGRAD, LIBRARY

__all__ = ["foreach_project_", "project", "project_"]

_PROJECT = torch.ops.sculpt.project.default
_PROJECT_ = torch.ops.sculpt.project_.default
_FOREACH_ = torch.ops.sculpt.foreach_project_.default


def project(
    grad: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
    *,
    keep_left: bool = False,
    keep_right: bool = False,
    block: bool = False,
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

    Differentiable in ``grad``, ``left`` and ``right``. The columns are trusted to be orthonormal: 5e-6 off already
    leaks 4e-6 of the gradient. A bf16 basis used as if orthonormal leaks 3e-3; give a float32 basis where that matters.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what was wanted; nothing has been written.
    """
    refuse_forward_mode("project", grad, left, right)
    out: Tensor = _PROJECT(grad, left, right, keep_left=keep_left, keep_right=keep_right, block=block)
    return out


def project_(
    grad: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
    *,
    keep_left: bool = False,
    keep_right: bool = False,
    block: bool = False,
) -> Tensor:
    """In-place :func:`project`; returns ``grad``.

    In grad mode a leaf that requires grad is refused before anything is written, as is a basis that requires grad; on
    a non-leaf the call is differentiable in ``grad``. ``grad`` must hold every element once (no expanded tensor) and
    share no memory with the bases.
    """
    _PROJECT_(grad, left, right, keep_left=keep_left, keep_right=keep_right, block=block)
    return grad


def foreach_project_(
    grads: Sequence[Tensor],
    lefts: Sequence[Tensor | None],
    rights: Sequence[Tensor | None],
    *,
    keep_lefts: Sequence[bool] = (),
    keep_rights: Sequence[bool] = (),
    block: bool = False,
) -> None:
    """:func:`project_` on every entry of ``grads``: shapes, ranks, dtypes and kept sides may all differ.

    The lists have one entry a matrix; empty flag lists mean ``False`` throughout. Entries that share memory are refused
    in eager mode, and so, in grad mode, is any input that requires grad.
    """
    if not grads:  # lists without a tensor reach no backend, and an empty model is not an error
        return check_foreach("foreach_project_", grads, lefts, rights, keep_lefts, keep_rights, block)
    _FOREACH_(list(grads), list(lefts), list(rights), keep_lefts=keep_lefts, keep_rights=keep_rights, block=block)


@torch.library.register_fake("sculpt::project")
def _project_fake(
    grad: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
    *,
    keep_left: bool = False,
    keep_right: bool = False,
    block: bool = False,
) -> Tensor:
    check_project("project", grad, left, right, keep_left, keep_right, block)
    return torch.empty_like(grad)


@torch.library.register_fake("sculpt::project_")
def _project_fake_(
    grad: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
    *,
    keep_left: bool = False,
    keep_right: bool = False,
    block: bool = False,
) -> None:
    check_project("project_", grad, left, right, keep_left, keep_right, block)


@torch.library.register_fake("sculpt::foreach_project_")
def _foreach_fake_(
    grads: Sequence[Tensor],
    lefts: Sequence[Tensor | None],
    rights: Sequence[Tensor | None],
    *,
    keep_lefts: Sequence[bool] = (),
    keep_rights: Sequence[bool] = (),
    block: bool = False,
) -> None:
    check_foreach("foreach_project_", grads, lefts, rights, keep_lefts, keep_rights, block)


def _side_gradient(go: Tensor, matrix: Tensor, basis: Tensor, keep: bool) -> Tensor:
    """d/dL of <go, X -+ L Lᵀ X>: minus (go (Xᵀ L) + X (goᵀ L)), plus where the side is kept; summed over broadcasts."""
    go, matrix = go.to(basis.dtype), matrix.to(basis.dtype)
    gradient = go @ (matrix.mT @ basis) + matrix @ (go.mT @ basis)
    return (gradient if keep else -gradient).sum_to_size(basis.shape)


def _project_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    # The dispatcher leaves out trailing arguments that equal their default.
    grad, left, right = (*inputs, None, None)[:3]
    # grad itself is needed by the bases' gradients only.
    needed = any(basis is not None and basis.requires_grad for basis in (left, right))
    ctx.save_for_backward(grad if needed else None, left, right)
    ctx.flags = keyword_only_inputs


def _project_backward(ctx: Any, go: Tensor) -> tuple[Tensor | None, ...]:
    grad, left, right = ctx.saved_tensors
    flags = ctx.flags
    given = len(ctx.needs_input_grad)
    need_grad, need_left, need_right = (*ctx.needs_input_grad, False, False)[:3]
    d_grad = d_left = d_right = None
    if need_grad:  # the projection is self-adjoint in grad
        d_grad = _PROJECT(go, left, right, **flags)
    if flags["block"]:
        if need_left:
            d_left = _side_gradient(go, _PROJECT(grad, None, right, keep_right=True), left, False)
        if need_right:
            d_right = _side_gradient(go.mT, _PROJECT(grad, left, None, keep_left=True).mT, right, False)
        return (d_grad, d_left, d_right)[:given]
    if need_left:
        seen = grad if right is None else _PROJECT(grad, None, right, keep_right=flags["keep_right"])
        d_left = _side_gradient(go, seen, left, flags["keep_left"])
    if need_right:
        seen = grad if left is None else _PROJECT(grad, left, None, keep_left=flags["keep_left"])
        d_right = _side_gradient(go.mT, seen.mT, right, flags["keep_right"])
    return (d_grad, d_left, d_right)[:given]


torch.library.register_autograd("sculpt::project", _project_backward, setup_context=_project_setup)


def _refuse_basis_grad(op: str, **bases: Tensor | None) -> None:
    """An in-place form has no gradient for its bases; say so instead of returning a wrong one."""
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


def _project_autograd_(
    keyset: Any,
    grad: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
    *,
    keep_left: bool = False,
    keep_right: bool = False,
    block: bool = False,
) -> None:
    check_project("project_", grad, left, right, keep_left, keep_right, block)
    refuse_forward_mode("project_", grad, left, right)
    if torch.is_grad_enabled():
        _refuse_basis_grad("project_", left=left, right=right)
        if grad.requires_grad:
            _refuse_leaf("project_", "grad", grad)
            # copy_ carries autograd's rules for in-place writes (views, saved versions); project carries the gradient.
            grad.copy_(_PROJECT(grad, left, right, keep_left=keep_left, keep_right=keep_right, block=block))
            return
    _PROJECT_.redispatch(
        keyset & AFTER_AUTOGRAD, grad, left, right, keep_left=keep_left, keep_right=keep_right, block=block
    )
    torch.autograd.graph.increment_version(grad)


def _foreach_autograd_(
    keyset: Any,
    grads: list[Tensor],
    lefts: list[Tensor | None],
    rights: list[Tensor | None],
    *,
    keep_lefts: Sequence[bool] = (),
    keep_rights: Sequence[bool] = (),
    block: bool = False,
) -> None:
    if not (grads and grads[0].is_cuda):  # The CUDA kernel checks by itself, once a list and not once a call.
        check_foreach("foreach_project_", grads, lefts, rights, keep_lefts, keep_rights, block)
    refuse_forward_mode("foreach_project_", *grads, *lefts, *rights)
    # Asked of all at once first: a name for each takes several times as long.
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for ts in (grads, lefts, rights) for t in ts):
        for i, (grad, left, right) in enumerate(zip(grads, lefts, rights, strict=True)):
            _refuse_basis_grad("foreach_project_", **{f"lefts[{i}]": left, f"rights[{i}]": right})
            if grad.requires_grad:
                raise RuntimeError(
                    f"foreach_project_: grads[{i}]: given a tensor that requires grad, wanted one that does not; "
                    "detach it, or use project_ on it"
                )
    _FOREACH_.redispatch(
        keyset & AFTER_AUTOGRAD, grads, lefts, rights, keep_lefts=keep_lefts, keep_rights=keep_rights, block=block
    )
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
    info: Any, in_dims: tuple[int | None, ...], grad: Tensor, left: Any = None, right: Any = None, **flags: Any
) -> tuple[Tensor, int]:
    dims = (*in_dims, None, None)[:3]
    logical = grad.dim() - (dims[0] is not None)
    grad = grad.expand(info.batch_size, *grad.shape) if dims[0] is None else grad.movedim(dims[0], 0)
    left, right = _vmap_basis(left, dims[1], logical), _vmap_basis(right, dims[2], logical)
    return _PROJECT(grad, left, right, **flags), 0


@torch.library.register_vmap("sculpt::project_")
def _project_vmap_(
    info: Any, in_dims: tuple[int | None, ...], grad: Tensor, left: Any = None, right: Any = None, **flags: Any
) -> tuple[None, None]:
    dims = (*in_dims, None, None)[:3]
    if dims[0] is None:
        raise ValueError("project_: grad: given a tensor that vmap does not map, wanted a mapped one: it is written to")
    left, right = _vmap_basis(left, dims[1], grad.dim() - 1), _vmap_basis(right, dims[2], grad.dim() - 1)
    _PROJECT_(grad.movedim(dims[0], 0), left, right, **flags)
    return None, None

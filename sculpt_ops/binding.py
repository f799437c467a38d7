"""Finding the parameters of an optimizer that a set of subspaces is meant for."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .dtensor import is_dtensor
from .names import canonical_name, list_names

if TYPE_CHECKING:
    from .layer import LayerSubspace
    from .subspaces import Subspaces

__all__ = ["WeakTensors", "bind_to_optimizer", "check_fits", "check_still_bound", "unwrap_optimizer"]


class WeakTensors(dict[str, "weakref.ref[Tensor]"]):
    """Tensors by name that are not kept alive.

    A deep copy has the copies of those that were copied before it in the same call, as a model's are in
    `copy.deepcopy((model, subspaces))`; what is pickled has none. Both would otherwise stand for the originals, and the
    copy of a model would train unprotected.
    """

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> WeakTensors:
        return cls({name: weakref.ref(tensor) for name, tensor in tensors.items()})

    def __deepcopy__(self, memo: dict[int, Any]) -> WeakTensors:
        copied = {name: memo.get(id(reference())) for name, reference in self.items()}
        return WeakTensors.of({name: tensor for name, tensor in copied.items() if isinstance(tensor, Tensor)})

    def __reduce__(self) -> tuple[type[WeakTensors], tuple[()]]:
        return WeakTensors, ()


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside wrappers that keep it as `.optimizer`, like accelerate's, which take no step hook."""
    inner = optimizer
    while getattr(inner, "optimizer", None) is not None:
        inner = inner.optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer or wrap one, got {type(optimizer).__name__}")
    return inner


def bind_to_optimizer(
    subspaces: Subspaces, optimizer: torch.optim.Optimizer, *, in_place: bool = False
) -> dict[Tensor, LayerSubspace]:
    """The subspace of every parameter of `optimizer` that has one; with `in_place` that of `Subspaces.in_place`.

    Found by identity with the parameter the basis was made from, otherwise (the objects were replaced, or the subspaces
    loaded from a file) by canonical name if the optimizer was made from named parameters. Raises ValueError naming
    every basis whose parameter the optimizer lacks, and on a parameter of another shape, dtype or device.
    """
    named = {
        canonical_name(name): parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group.get("param_names", ()), group["params"], strict=False)
    }
    present = set(_parameters(optimizer))
    bound: dict[Tensor, LayerSubspace] = {}
    missing = []
    for name, layer in subspaces.items():
        parameter: Tensor | None = subspaces.parameter(name)
        if parameter is None or parameter not in present:
            parameter = named.get(name)
        if parameter is None:
            missing.append(name)
            continue
        check_fits(name, layer, parameter)
        bound[parameter] = subspaces.in_place(name) if in_place else layer
    if missing:
        hint = "" if named else "; it was made without names: pass model.named_parameters() to bind by name"
        raise ValueError(f"the optimizer lacks parameters that have a basis: {list_names(missing)}{hint}")
    return bound


def check_still_bound(optimizer: torch.optim.Optimizer, bound: Iterable[Tensor]) -> None:
    """Raise RuntimeError if the optimizer no longer holds every parameter of `bound`.

    Sharding replaces the objects, and training would go on unprotected.
    """
    present = set(_parameters(optimizer))
    lost = sum(parameter not in present for parameter in bound)
    if lost:
        raise RuntimeError(
            f"{lost} parameters with a basis are no longer in the optimizer (sharding or prepare() replaced them): "
            "bind the subspaces again, after the model and the optimizer have been prepared"
        )


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def check_fits(name: str, layer: LayerSubspace, parameter: Tensor) -> None:
    """ValueError if the basis `name` is for a parameter of another shape, dtype, device or sharding."""
    if is_dtensor(parameter) != (layer.owner is not None):
        given, wanted = ("sharded", "is not") if is_dtensor(parameter) else ("not sharded", "is")
        raise ValueError(
            f"{name} is {given}, what its basis was made for {wanted}: derive the subspaces after the model has been "
            "sharded, or call subspaces.bind(model)"
        )
    if tuple(parameter.shape) != layer.shape:
        raise ValueError(f"the basis of {name} is for shape {layer.shape}, the parameter has {tuple(parameter.shape)}")
    for stored in (layer.left_basis, layer.right_basis):
        if stored is None:
            continue
        basis = stored.columns
        if basis.device != parameter.device and (layer.owner is None or not basis.is_meta):
            raise ValueError(
                f"the basis of {name} is on {basis.device}, the parameter on {parameter.device}: "
                f"call subspaces.to({str(parameter.device)!r})"
            )
        if (basis.dtype == torch.float64) != (parameter.dtype == torch.float64):
            raise ValueError(
                f"the basis of {name} is {basis.dtype}, the parameter {parameter.dtype}: derive the subspaces from the "
                "model in the dtype it is trained in"
            )

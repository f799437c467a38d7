"""The uncentred covariance of the inputs that a model's matrices are fed, one for all that are fed the same."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .importance import kept_tokens, run_batches
from .names import list_names
from .remember import Side

if TYPE_CHECKING:
    from .distributed.agreement import Ranks

__all__ = ["input_covariances", "input_sides"]


def input_sides(model: nn.Module, found: Mapping[str, Tensor], sides: str) -> dict[str, Side]:
    """The side of every matrix that its inputs lie on. ValueError unless its modules are linear maps that say so, and
    if `sides` leaves that side free."""
    names = {id(parameter): name for name, parameter in found.items()}
    out: dict[str, Side] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            name = names.get(id(parameter))
            if name is None:
                continue
            # transformers' Conv1D, stored (in, out), is told by its name: nothing here imports that package.
            side: Side | None = "right" if isinstance(module, nn.Linear) else None
            side = "left" if side is None and type(module).__name__ == "Conv1D" else side
            if side is None or out.setdefault(name, side) != side:
                raise ValueError(
                    f"remember: RememberInputs: {name} is in a {type(module).__name__}, wanted a Linear or a Conv1D"
                )
            if sides not in ("both", side):
                raise ValueError(
                    f"remember: RememberInputs: given with sides={sides!r}, which leaves the inputs of {name} free; "
                    f"wanted 'both' or {side!r}"
                )
    return out


def input_covariances(
    model: nn.Module,
    targets: Mapping[str, Tensor],
    batches: Iterable[Mapping[str, Any] | Tensor] | None,
    sides: Mapping[str, Side],
    groups: Sequence[Ranks] = (),
) -> dict[tuple[str, ...], Tensor]:
    """The sum of x xᵀ over the inputs x of every matrix, (d, d), one for all that are fed the same tensors.

    Batches, masks and what is raised are those of `importance.layer_importance`. A batch's products are summed in
    float64, batches in float32 (float64 for float64 inputs): 4 d² bytes a distinct input. groups: of the ranks of a
    model that is replicated or sharded, each rank with batches of its own, what is summed over one group after the
    other; collective.
    """
    inputs = _Inputs({name: targets[name].shape[0 if side == "left" else 1] for name, side in sides.items()})

    def measure(among: Sequence[Ranks]) -> list[tuple[str, ...]]:
        if among:
            found = among[-1].together("from_model", lambda: measure(among[:-1]))
            if any(each != found[0] for each in found):
                raise ValueError("batches: the layers that get the same inputs are others on other ranks")
            return list(found[0])
        hooks = {id(targets[name]): inputs.hook(name) for name in sides}
        run_batches(model, batches, next(iter(targets.values())).device, hooks, inputs.begin)
        inputs.end()
        return list(inputs.checked())

    measure(groups)
    sums = inputs.checked()
    if groups:
        from .distributed.agreement import collective

        # A matrix that the first batch did not run may share its sum with another.
        sums = {names: total.clone() for names, total in sums.items()}
        for ranks in groups:
            for total in sums.values():
                with collective("from_model"):
                    torch.distributed.all_reduce(total, group=ranks.group)
    return sums


class _Inputs:
    """Sums of x xᵀ of every matrix. Which matrices are fed the same tensors is seen on the first batch; what the first
    of them then adds to the sum is not added again by the others.

    widths: d of every matrix.
    """

    def __init__(self, widths: Mapping[str, int]) -> None:
        self._widths = widths
        self._masks: list[Tensor] = []
        self._first = True
        self._serials = itertools.count()
        # Tensors seen on this batch, and what every matrix was given, call by call; of the first batch their sums too.
        self._seen: dict[tuple[int, int], tuple[weakref.ref[Tensor], int]] = {}
        self._calls: dict[str, list[int]] = {}
        self._blocks: dict[int, Tensor] = {}
        self._leaders: dict[str, str] = {}
        self._sums: dict[str, Tensor] = {}

    def begin(self, masks: list[Tensor]) -> None:
        """Before a batch, with the masks of its tokens."""
        self.end()
        self._masks = masks

    def end(self) -> None:
        """After a batch."""
        if self._first and self._calls:
            leaders: dict[tuple[int, ...], str] = {}
            for name, calls in self._calls.items():
                leader = self._leaders[name] = leaders.setdefault(tuple(calls), name)
                if leader == name:
                    first, *others = (self._blocks[serial] for serial in calls)
                    self._sums[name] = sum(others, first)
            self._first, self._blocks = False, {}
        for name, leader in self._leaders.items():
            if self._calls.get(name) != self._calls.get(leader):
                raise ValueError(f"batches: {name} and {leader} get the same inputs on the first of them, later others")
        self._seen, self._calls = {}, {}

    def hook(self, name: str) -> Callable[..., None]:
        width = self._widths[name]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x: Any = next(iter((*args, *kwargs.values())), None)
            if not isinstance(x, Tensor) or not x.is_floating_point() or x.shape[-1:] != (width,):
                raise ValueError(f"targets: the {type(module).__name__} of {name} is not called with (..., {width})")
            self._add(name, x)

        return hook

    def checked(self) -> dict[tuple[str, ...], Tensor]:
        """The sums, by the names of all matrices that they are of."""
        if idle := [name for name in self._widths if name not in self._leaders]:
            raise ValueError(
                f"batches: none of them runs the layers of {list_names(idle)}; leave these out of targets="
            )
        finite = torch.stack([total.isfinite().all() for total in self._sums.values()]).tolist() if self._sums else []
        if wild := [name for name, good in zip(self._sums, finite, strict=True) if not good]:
            raise ValueError(f"batches: the inputs of {list_names(wild)} are not finite on them")
        return {tuple(n for n in self._widths if self._leaders[n] == leader): s for leader, s in self._sums.items()}

    def _add(self, name: str, x: Tensor) -> None:
        serial = self._serial(x)
        self._calls.setdefault(name, []).append(serial)
        if self._first:
            if serial not in self._blocks:
                self._blocks[serial] = self._products(x)
        # A matrix that the first batch did not run has a sum of its own.
        elif self._leaders.setdefault(name, name) == name:
            # Not in place: a block of the first batch may be part of two sums.
            products = self._products(x)
            self._sums[name] = self._sums[name] + products if name in self._sums else products

    def _serial(self, x: Tensor) -> int:
        key = (id(x), 0 if x.is_inference() else x._version)
        reference, serial = self._seen.get(key, (None, -1))
        if reference is None or reference() is not x:
            serial = next(self._serials)
            self._seen[key] = weakref.ref(x), serial
        return serial

    def _products(self, x: Tensor) -> Tensor:
        rows = kept_tokens(x, x.shape[:-1], self._masks).reshape(-1, x.shape[-1])
        dtype = torch.promote_types(x.dtype, torch.float32)
        products: Tensor = torch.ops.sculpt._gram(rows.contiguous(), double=True)
        return products.to(dtype)

"""AdamW whose whole step, not only its gradient, stays in the free space of the weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..binding import bind_to_optimizer, check_still_bound
from ..dtensor import is_dtensor
from ..layer import LayerSubspace, project_each_
from ..subspaces import Subspaces
from .checks import check_capture, check_dense, check_shapes
from .options import DecayTo, Options, Project, State
from .outside_autocast import outside_autocast
from .precision import Master, integer_bits, read_weight, transported_bits
from .rebase import rebase_first, rebase_second
from .rows import MOMENTS, Row, adam_, step_rows
from .waiting import Waiting

__all__ = ["AdamW"]


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` that changes protected weights within their free space only.

    state="full": for a parameter with a basis its gradient is projected IN PLACE (`.grad` holds the projected one
    afterwards), the moments are updated from it, the step (Adam direction and decoupled weight decay together) is
    projected and then added. A projected gradient alone is not enough, since Adam scales element by element (arXiv
    2504.07097 as published leaks so).

    state="subspace": the gradient is taken to coordinates of the free space, (m - k, n - k) for sides="both", and the
    moments and Adam's direction are those of the coordinates: with a share p of a square matrix protected they take
    (1 - p)^2 of the memory. Adam then scales coordinate by coordinate, which is another, equally good algorithm: a step
    depends on the basis chosen in the free space. `.grad` is left as it is. Bases that span the protected space are
    replaced by reflectors in `subspaces` (`Subspaces.use_reflectors`); there is no second copy of them.

    In both, decay shrinks only the free part of W. After t steps in fp32 the protected part P of the change dW obeys
    ||P dW|| <= 1e-6 ||dW|| + 2^-24 sqrt(t) ||W||, the last term being the rounding of W itself. (On a GPU, with bases
    of 256 columns and more together, steps go in bfloat16 parts: 6e-6 in place of 1e-6.) That is for steps that vary,
    as with minibatches; where all are alike (a gradient that is zero or constant) their roundings add up to as much
    as 2^-24 t ||W||. `subspaces.guard(optimizer)` holds either to one rounding.

    Parameters without a basis get exactly torch's AdamW, unless the options below concern them too. Arguments,
    defaults, `param_groups` and `state_dict` are those of `torch.optim.AdamW`; with state="full" state dicts load
    either way. They carry no subspaces: those are saved with `Subspaces.save`. In addition:

    subspaces: bound by parameter identity, or by canonical name if `params` are named; see `set_subspaces`.
    project: "both"; for comparison "gradient" (the published method) or "update", which leave out the other projection.
        state="subspace" has no use for it.
    master: of bfloat16 weights. "none": a step is rounded to the weights, and what is below half a unit in the last
        place is lost step after step; the rounding is one-sided (8 steps at lr 1e-5: a leak of 65 % of dW) unless
        `subspaces.guard(optimizer)` holds it to one rounding. "split": 16 more bits a parameter (`low`, int16, in the
        state), with which the weight is a float32 number to the bit (`master_weight`). "stochastic": rounded up or
        down by chance, right on average, no memory; every step leaves noise of up to 2^-8 of a weight, in the protected
        space too.
    moment_dtype: torch.float32 or torch.bfloat16 (rounded stochastically). None is float32 where `master` is at work,
        and the parameter's dtype elsewhere, as in torch.
    decay_to: "zero", or "start": decay toward the weights as they were when the subspaces were set (or at the first
        step), of which the state then keeps a copy.
    seed: of stochastic rounding.

    `fused=True` and `differentiable=True` cannot be combined with any of these, stochastic rounding not with
    `capturable=True`. Raises ValueError for that, for an unknown value, for sides="block" with state="subspace", and
    for a basis whose parameter the optimizer lacks.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        subspaces: Subspaces | None = None,
        project: Project = "both",
        state: State = "full",
        master: Master = "none",
        moment_dtype: torch.dtype | None = None,
        decay_to: DecayTo = "zero",
        seed: int = 0,
    ) -> None:
        options = Options(project, state, master, moment_dtype, decay_to, seed)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._options = options
        self._bound: dict[Tensor, LayerSubspace] = {}
        self._waiting = Waiting()
        self._in_backward = False
        self._had_subspaces = False
        self.set_subspaces(subspaces)

    @outside_autocast
    @torch.no_grad()
    def set_subspaces(self, subspaces: Subspaces | None) -> None:
        """Protect with `subspaces` from the next step on, or with none.

        Moments of the full shape are kept as they are. Those in free coordinates are taken to the new ones: the first
        exactly, of the second what their squares tell (see `optim.rebase`). Where subspaces are replaced, the weights
        as they are at the next step become the start of decay_to="start".

        Raises ValueError, leaving the old binding in place, if the optimizer lacks a parameter that has a basis, or if
        its shape, device or dtype does not go with the basis; RuntimeError while compressed gradients wait for a step.
        """
        if not isinstance(subspaces, Subspaces | None):
            raise TypeError(f"subspaces must be a Subspaces or None, got {type(subspaces).__name__}")
        self._waiting.drop_forgotten()
        if self._waiting.sums:
            raise RuntimeError("set_subspaces: gradients wait in the old coordinates; call step() or zero_grad() first")
        bound = self._bind(subspaces)
        if self._options.in_coordinates and (blocks := sum(layer.block for layer in bound.values())):
            raise ValueError(
                f"state='subspace' needs sides 'both', 'left' or 'right'; {blocks} matrices have 'block', which leaves "
                "no coordinates fewer than the matrix has entries"
            )
        self._options.check_groups(self.param_groups, bool(bound))
        if self._options.in_coordinates:
            both = {**self._bound, **bound}
            check_shapes(both, self.state, self._bound)
            pairs = {parameter: (self._bound.get(parameter), bound.get(parameter)) for parameter in both}
            if any(old and new and old.owner != new.owner for old, new in pairs.values()):
                raise ValueError("the owners of parameters have changed; make a new optimizer for these subspaces")
            if subspaces is not None:
                subspaces.use_reflectors()
                bound = self._bind(subspaces)
            self._move_moments_to(self._away({p: both[p] for p, (old, _) in pairs.items() if old is None}))
            for parameter in both:
                self._rebase(self.state.get(parameter, {}), self._bound.get(parameter), bound.get(parameter))
            self._move_moments_from(self._away({p: both[p] for p, (_, new) in pairs.items() if new is None}))
        else:
            self._move_moments_from(self._away(self._bound))
            self._move_moments_to(self._away(bound))
        # Subspaces that protect nothing yet, as those of a first task, are replaced like others.
        for state in self.state.values() if self._had_subspaces else ():
            state.pop("start", None)
        self._had_subspaces = subspaces is not None
        self._bound = bound
        self._unseen = True

    def _move_moments_from(self, away: dict[Tensor, LayerSubspace]) -> None:
        """Moments of parameters that an owner has stepped, to the shards."""
        if away:
            from ..distributed.steps import moments_from_owners

            for parameter, moments in moments_from_owners(away, self.state, self._options).items():
                self.state[parameter].update(moments)

    def _move_moments_to(self, away: dict[Tensor, LayerSubspace]) -> None:
        """Moments of parameters that an owner will step, to the owner."""
        if away:
            from ..distributed.steps import moments_to_owners

            moments_to_owners(away, self.state)

    @staticmethod
    def _away(bound: dict[Tensor, LayerSubspace]) -> dict[Tensor, LayerSubspace]:
        """Those that are stepped by the owner of their layer."""
        return {parameter: layer for parameter, layer in bound.items() if layer.owner is not None}

    def _bind(self, subspaces: Subspaces | None) -> dict[Tensor, LayerSubspace]:
        in_place = not self._options.in_coordinates
        bound = {} if subspaces is None else bind_to_optimizer(subspaces, self, in_place=in_place)
        return {parameter: layer for parameter, layer in bound.items() if layer.protects}

    @staticmethod
    def _rebase(state: dict[str, Any], old: LayerSubspace | None, new: LayerSubspace | None) -> None:
        for name in MOMENTS:
            if name in state and state[name].is_meta:  # an owner has it
                after = new.free_shape if new else cast(LayerSubspace, old).shape
                state[name] = state[name].new_empty(after)
            elif name in state:
                state[name] = (rebase_first if name == "exp_avg" else rebase_second)(state[name], old, new)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure`, which may re-evaluate the model, returns."""
        if self._in_backward and getattr(self, "found_inf", None) is not None:
            raise RuntimeError(
                "fuse_into_backward cannot be combined with GradScaler: the weights have been stepped with scaled "
                "gradients; train in bfloat16, which needs no scaling"
            )
        self._options.check_groups(self.param_groups, bool(self._bound))
        check_still_bound(self, self._bound)
        check_capture(self.param_groups)
        self._warn_of_rounding()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step(None)
        return loss

    def _warn_of_rounding(self) -> None:
        """At the first step, which is where a model has its dtype at last; whoever guards has a hook."""
        if not self._unseen:
            return
        self._unseen = False
        dtypes = {parameter.dtype for parameter in self._bound}
        # A master is of bfloat16 weights alone.
        rounds = torch.float16 in dtypes or (torch.bfloat16 in dtypes and self._options.master == "none")
        if rounds and not self._optimizer_step_post_hooks:
            warnings.warn(
                "protected weights in 16 bit: each step is rounded to them, so that much of the change ends up in the "
                "protected space; pass master='split' (bfloat16), call subspaces.guard(optimizer), or train float32 "
                "weights under autocast",
                stacklevel=4,
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; drops compressed gradients too, and `fuse_into_backward` counts passes anew."""
        self._waiting.clear()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def compress_gradients(self) -> None:
        """Add the gradient of every parameter with a basis to what waits in free coordinates, and set it to None.

        For state="subspace": between the backward passes of an accumulated step, full gradients then take no memory.
        The next step uses the sum; `zero_grad` drops it. It is no part of `state_dict`; a GradScaler does not see it.
        """
        if not self._options.in_coordinates:
            raise RuntimeError("compress_gradients needs state='subspace'")
        self._compress(self._bound)

    @torch.no_grad()
    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
    ) -> Tensor:
        """Scale the gradients of all parameters so that their norm AFTER projection is at most `max_norm`.

        Returns that norm before scaling. With state="full" protected gradients are projected in place, once for the
        next step too. With state="subspace" they go into free coordinates, as with `compress_gradients`, and
        `norm_type` must be 2: only that norm is the same in all coordinates. Until the step `.grad` is zero then, as it
        is of a sharded matrix that an owner steps: what is added to it counts, and who drops it drops what waits.
        Arguments as in `torch.nn.utils.clip_grad_norm_`. RuntimeError if the optimizer steps during the backward pass.
        """
        if self._in_backward:
            raise RuntimeError("clip_grad_norm_: the norm is not known while weights are stepped in the backward pass")
        self._waiting.drop_forgotten()
        if self._options.in_coordinates:
            if norm_type != 2.0:
                raise ValueError(f"norm_type must be 2 with state='subspace', got {norm_type}")
            self._compress(self._bound, leave=True)
        else:
            self._compress(self._away(self._bound), leave=True)
            if self._options.project != "update":
                self._project_gradients(self._parameters())
        grads = [p.grad for p in self._parameters() if p.grad is not None and not self._waiting.is_taken(p)]
        held = grads + list(self._waiting.sums.values())
        norm = self._total_norm(grads, norm_type, error_if_nonfinite, foreach)
        factor = (max_norm / (norm + 1e-6)).clamp_(max=1.0)
        # One launch for many on a GPU, where they are on one: of small matrices the launches take longest.
        together = all(grad.is_cuda and grad.device == factor.device and not is_dtensor(grad) for grad in held)
        if together and held:
            torch._foreach_mul_(held, factor)
        for grad in () if together else held:
            grad.mul_(factor.to(grad.device) if not grad.is_meta else 1.0)
        self._waiting.renew()
        return norm

    def _total_norm(
        self, grads: list[Tensor], norm_type: float, error_if_nonfinite: bool, foreach: bool | None
    ) -> Tensor:
        """The norm of `grads` and of all that wait elsewhere, over all ranks that they are sharded over."""
        away = {p: grad for p, grad in self._waiting.sums.items() if self._bound[p].owner is not None}
        here = [grad for p, grad in self._waiting.sums.items() if p not in away]
        parts = []
        for sharded in (False, True):
            if chosen := [grad for grad in (*grads, *here) if is_dtensor(grad) == sharded]:
                part = torch.nn.utils.get_total_norm(chosen, norm_type, foreach=foreach)
                parts.append(part.full_tensor() if is_dtensor(part) else part)  # type: ignore[attr-defined]
        if away:
            from ..distributed.steps import norm_over_owners

            parts.append(norm_over_owners(list(away.values()), next(iter(away)), norm_type))
        norm = (
            parts[0]
            if len(parts) == 1
            else torch.linalg.vector_norm(torch.stack(parts or [torch.zeros(())]), norm_type)
        )
        if error_if_nonfinite and not norm.isfinite():
            raise RuntimeError(
                f"the norm of order {norm_type} of the gradients is non-finite: {norm}; nothing was clipped"
            )
        return norm

    @torch.no_grad()
    def master_weight(self, parameter: Tensor) -> Tensor:
        """The weight of `parameter` in float32 (float64), with the low bits of master="split"."""
        return read_weight(parameter, self.state.get(parameter, {}).get("low"))

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """As torch's. Moments of sharded parameters are DTensors, sharded likewise, wherever they are kept; collective
        then."""
        state_dict = super().state_dict()
        if away := self._away(self._bound):
            from ..distributed.steps import moments_from_owners

            places = {id(parameter): place for place, parameter in enumerate(self._parameters())}
            moments = moments_from_owners(away, self.state, self._options)
            for parameter, values in moments.items():
                index = places[id(parameter)]
                state_dict["state"][index] = {**state_dict["state"][index], **values}
        for index, state in state_dict["state"].items():
            if "low" in state:
                state_dict["state"][index] = {**state, "low": transported_bits(state["low"])}
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but moments keep the dtype that the options ask for, everything else the one it has.

        torch casts all to the weight's: of a bfloat16 weight float32 moments would be rounded and low bits destroyed.
        With state="subspace" the subspaces must be set first.
        """
        loaded: list[dict[str, Any]] = []
        # After all hooks that change what is loaded, and before those that change what was.
        hooks = [
            self.register_load_state_dict_pre_hook(lambda _, given: loaded.append(given)),
            self.register_load_state_dict_post_hook(lambda _: self._take_state(loaded[-1]), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _take_state(self, state_dict: dict[str, Any]) -> None:
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, parameter in zip(saved, self._parameters(), strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor) and name != "step":
                    dtype = self._options.moments_of(parameter) if name in MOMENTS else value.dtype
                    value = integer_bits(value) if name == "low" else value.to(dtype=dtype)
                    self.state[parameter][name] = value.to(parameter.device, copy=True)
        self._move_moments_to(self._away(self._bound))
        self._waiting.clear()

    @outside_autocast
    @torch.no_grad()
    def _step(self, selected: Tensor | None) -> None:
        """Step the parameters that have a gradient, or of them `selected` alone."""
        if selected is None:
            self._waiting.drop_forgotten()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            work = [(group, *self._split(group, first, selected)) for group, first in self._groups()]
            stepped = [p for _, plain, rows in work for p in (*plain, *(row.parameter for row in rows))]
            check_shapes(stepped, self.state, self._bound if self._options.in_coordinates else {})
            for parameter in filter(self._waiting.is_taken, stepped):
                parameter.grad = None  # zeros, whose memory the step can use
            if not self._options.in_coordinates and self._options.project != "update":
                self._project_gradients(stepped)
            for group, plain, rows in work:
                self._plain_step(group, plain)
                step_rows(self._options, group, rows)
        for parameter in stepped:
            self._waiting.drop(parameter)

    def _groups(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Every group and the place of its first parameter in the optimizer."""
        first = 0
        for group in self.param_groups:
            yield group, first
            first += len(group["params"])

    def _parameters(self) -> Iterator[Tensor]:
        return (parameter for group in self.param_groups for parameter in group["params"])

    def _split(self, group: dict[str, Any], first: int, selected: Tensor | None) -> tuple[list[Tensor], list[Row]]:
        """Parameters of `group` with a gradient: those that torch's AdamW steps, and those that need more."""
        plain: list[Tensor] = []
        rows: list[Row] = []
        for place, parameter in enumerate(group["params"], start=first):
            if selected is not None and parameter is not selected:
                continue
            grad, compressed = parameter.grad, self._waiting.sums.get(parameter)
            if grad is None and compressed is None:
                continue
            if grad is not None:
                check_dense(grad)
            layer = self._bound.get(parameter)
            if self._options.project == "gradient" and (layer is None or layer.owner is None):
                layer = None  # its gradient is projected already, the rest is torch's
            if layer is None and not self._options.concern(parameter, group["weight_decay"]):
                plain.append(parameter)
            else:
                rows.append(Row(parameter, place, self.state[parameter], layer, compressed))
        return plain, rows

    def _plain_step(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """torch's own step of `parameters`."""
        columns: list[list[Any]] = [[], [], [], [], [], []]
        has_complex = self._init_group({**group, "params": parameters}, *columns)
        outputs, grads, exp_avgs, exp_avg_sqs, largest, steps = columns
        if outputs:
            adam_(
                group,
                outputs,
                grads,
                (exp_avgs, exp_avg_sqs, largest),
                steps,
                weight_decay=group["weight_decay"],
                fused=group["fused"],
                has_complex=bool(has_complex),
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
            )

    def _project_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Project protected gradients in place, but those that still are what an earlier call left."""
        todo = []
        for parameter in parameters:
            layer, grad = self._bound.get(parameter), parameter.grad
            if layer is None or grad is None or layer.owner is not None:
                continue
            check_dense(grad)
            if not self._waiting.is_known(parameter):
                todo.append((parameter, grad, layer))
        project_each_([(grad, layer) for _, grad, layer in todo], in_parts=True)
        for parameter, _, _ in todo:
            self._waiting.note(parameter)

    @outside_autocast
    def _compress(self, parameters: Iterable[Tensor], *, leave: bool = False) -> None:
        """Into `_waiting`. leave: zeros in `.grad`."""
        away = []
        for parameter in parameters:
            layer, grad = self._bound.get(parameter), parameter.grad
            if layer is None or grad is None:
                continue
            check_dense(grad)
            if self._waiting.is_taken(parameter):
                self._waiting.leave(parameter, zeros=leave)
                continue
            if layer.owner is not None:
                away.append(Row(parameter, 0, self.state[parameter], layer, self._waiting.sums.get(parameter)))
                continue
            coordinates = layer.to_coordinates(grad)
            if parameter in self._waiting.sums:
                self._waiting.sums[parameter].add_(coordinates)
            else:
                self._waiting.sums[parameter] = coordinates
            self._waiting.leave(parameter, zeros=leave)
        if away:
            from ..distributed.steps import collect_gradients

            for row, grad in zip(away, collect_gradients(self._options, away), strict=True):
                self._waiting.sums[row.parameter] = grad
                self._waiting.leave(row.parameter, zeros=leave)

    def __getstate__(self) -> dict[str, Any]:
        # torch names what it pickles; without these a copied optimizer would train unprotected.
        own = ("_bound", "_options", "_waiting", "_had_subspaces")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Kept where a state dict is loaded, as accelerate does before the first step; a copy does not warn again, and
        # its parameters have no hooks.
        self._unseen = getattr(self, "_unseen", False)
        self._in_backward = getattr(self, "_in_backward", False)

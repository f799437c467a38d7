"""AdamW whose whole step, not only its gradient, stays in the free space of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from .binding import bind_to_optimizer, check_still_bound
from .layer import LayerSubspace, project_each_
from .subspaces import Subspaces

__all__ = ["AdamW"]

Project = Literal["both", "gradient", "update"]

# Steps of projected parameters exist outside the weights before they are applied; with Adam's own temporary and the
# decay the peak is about three times this, or one matrix where it is larger.
_BUCKET_BYTES = 64 * 2**20


class _Row(NamedTuple):
    """One parameter with its gradient and its Adam state."""

    parameter: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    step: Tensor


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` that changes protected weights within their free space only.

    For a parameter with a basis: its gradient is projected IN PLACE (`.grad` holds the projected one afterwards), the
    moments are updated from it, the step (Adam direction and decoupled weight decay together) is projected and then
    added. A projected gradient alone is not enough, since Adam scales element by element (arXiv 2504.07097 as
    published leaks so). Decay therefore shrinks only the free part of W. After t steps in fp32 the protected part P of
    the change dW obeys ||P dW|| <= 1e-6 ||dW|| + 2^-24 sqrt(t) ||W||, the last term being the rounding of W itself.

    For bfloat16 and float16 weights the step is projected in fp32 too, but its rounding into them is one-sided: what is
    below half a unit in the last place is lost step after step (100 steps at lr 1e-3 in bfloat16: a leak of 29 % of
    dW). Keep fp32 weights under autocast, or add `subspaces.guard(optimizer)`, which holds the sum to one rounding, at
    most 2^-8 ||W|| and 2^-11 ||W||.

    Parameters without a basis get exactly torch's AdamW. Arguments, defaults, `param_groups` and `state_dict` are
    those of `torch.optim.AdamW`; state dicts load either way, and carry no subspaces: those are saved with
    `Subspaces.save`. In addition:

    subspaces: bound by parameter identity, or by canonical name if `params` are named; see `set_subspaces`.
    project: "both"; for comparison "gradient" (the published method) or "update", which leave out the other projection.
    state: "full", moments of the parameter's shape.

    `fused=True` and `differentiable=True` cannot be combined with subspaces. Raises ValueError for that, for an unknown
    `project` or `state`, and for a basis whose parameter the optimizer lacks.
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
        state: Literal["full"] = "full",
    ) -> None:
        if project not in get_args(Project):
            raise ValueError(f"project must be one of {', '.join(get_args(Project))}; got {project!r}")
        if state != "full":
            planned = " (moments in free-space coordinates are planned)" if state == "subspace" else ""
            raise ValueError(f"state must be 'full', got {state!r}{planned}")
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
        self._project: Project = project
        self._bound: dict[Tensor, LayerSubspace] = {}
        self.set_subspaces(subspaces)

    def set_subspaces(self, subspaces: Subspaces | None) -> None:
        """Protect with `subspaces` from the next step on, or with none. The moments are kept as they are.

        Raises ValueError, leaving the old binding in place, if the optimizer lacks a parameter that has a basis, or if
        its shape, device or dtype does not go with the basis.
        """
        if not isinstance(subspaces, Subspaces | None):
            raise TypeError(f"subspaces must be a Subspaces or None, got {type(subspaces).__name__}")
        bound = {} if subspaces is None else bind_to_optimizer(subspaces, self)
        bound = {parameter: layer for parameter, layer in bound.items() if layer.rank}
        self._refuse_unsupported(bound)
        self._bound = bound

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure`, which may re-evaluate the model, returns."""
        self._refuse_unsupported(self._bound)
        check_still_bound(self, self._bound)
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if capturing and not all(group["capturable"] for group in self.param_groups):
            # The step count, kept on the CPU, would be frozen into the graph.
            raise RuntimeError("capturing a step in a CUDA graph needs capturable=True in every parameter group")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            if any(p.grad is not None and p.grad.is_sparse for group in self.param_groups for p in group["params"]):
                raise RuntimeError("AdamW does not support sparse gradients, please consider SparseAdam instead")
            work = [(group, *self._rows(group)) for group in self.param_groups]
            if self._project != "update":
                everything = (row for _, rows, _ in work for row in rows if row.parameter in self._bound)
                project_each_((row.grad, self._bound[row.parameter]) for row in everything)
            stepped = {} if self._project == "gradient" else self._bound
            for group, rows, has_complex in work:
                plain = [row for row in rows if row.parameter not in stepped]
                self._adam(group, plain, [row.parameter for row in plain], group["weight_decay"], has_complex)
                for bucket in _buckets([row for row in rows if row.parameter in stepped]):
                    self._projected_step(group, bucket)
        return loss

    def _rows(self, group: dict[str, Any]) -> tuple[list[_Row], bool]:
        """The parameters of `group` that have a gradient, state made where missing; and whether one is complex."""
        columns: list[list[Any]] = [[], [], [], [], [], []]
        has_complex = self._init_group(group, *columns)
        if not group["amsgrad"]:
            columns[4] = [None] * len(columns[0])
        return [_Row(*row) for row in zip(*columns, strict=True)], bool(has_complex)

    def _adam(
        self, group: dict[str, Any], rows: list[_Row], outputs: list[Tensor], weight_decay: float, has_complex: bool
    ) -> None:
        """torch's own AdamW on `rows`, the step subtracted from `outputs`."""
        if not rows:
            return
        beta1, beta2 = group["betas"]
        adamw(
            outputs,
            [row.grad for row in rows],
            [row.exp_avg for row in rows],
            [row.exp_avg_sq for row in rows],
            [row.max_exp_avg_sq for row in rows if row.max_exp_avg_sq is not None],
            [row.step for row in rows],
            foreach=group["foreach"],
            capturable=group["capturable"],
            differentiable=group["differentiable"],
            fused=group["fused"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            has_complex=has_complex,
            amsgrad=group["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=weight_decay,
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def _projected_step(self, group: dict[str, Any], rows: list[_Row]) -> None:
        parameters = [row.parameter for row in rows]
        directions = [torch.zeros_like(parameter) for parameter in parameters]
        self._adam(group, rows, directions, weight_decay=0.0, has_complex=False)
        # A half-precision step would put the rounding of its projection, 3e-3 of it, back into the protected space.
        steps = [direction.to(torch.promote_types(direction.dtype, torch.float32)) for direction in directions]
        del directions
        if group["weight_decay"]:
            decay = group["lr"] * group["weight_decay"]
            for step, parameter in zip(steps, parameters, strict=True):
                scale = decay.squeeze().to(step.device) if isinstance(decay, Tensor) else decay
                step.sub_(parameter.to(step.dtype) * scale)
        project_each_((step, self._bound[parameter]) for step, parameter in zip(steps, parameters, strict=True))
        for step, parameter in zip(steps, parameters, strict=True):
            parameter.add_(step)

    def _refuse_unsupported(self, bound: dict[Tensor, LayerSubspace]) -> None:
        if bound:
            for option in ("fused", "differentiable"):
                if any(group[option] for group in self.param_groups):
                    raise ValueError(
                        f"{option}=True cannot be combined with subspaces; set {option}=False in every group"
                    )

    def __getstate__(self) -> dict[str, Any]:
        # torch names what it pickles; without these a copied optimizer would train unprotected.
        return super().__getstate__() | {"_bound": self._bound, "_project": self._project}


def _buckets(rows: list[_Row]) -> Iterator[list[_Row]]:
    bucket: list[_Row] = []
    size = 0
    for row in rows:
        nbytes = row.parameter.numel() * max(row.parameter.element_size(), 4)
        if bucket and size + nbytes > _BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(row)
        size += nbytes
    if bucket:
        yield bucket

"""One step of AdamW for parameters that torch's own does not serve: projected, in coordinates, with more digits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..buckets import in_buckets
from ..dtensor import is_dtensor
from ..layer import LayerSubspace, from_coordinates_each, project_each_
from ..ops.adam import adam_ as step_adam_
from ..ops.adam import in_one_pass
from .options import Options
from .precision import add_to_weight_, has_master, read_weight, rounding_seed, wide, write_moment_

__all__ = [
    "BUCKET_BYTES",
    "MOMENTS",
    "SHARDED_BUCKETS",
    "Decayed",
    "Row",
    "adam_",
    "apply_step",
    "apply_steps",
    "coordinates_of",
    "decayed",
    "make_steps",
    "start_row",
    "step_rows",
]

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

# Steps exist outside the weights before they are applied; with gradients in float32 and the decay the peak is about
# three times this, or one matrix where it is larger.
BUCKET_BYTES = 64 * 2**20
_COPIES = 3
SHARDED_BUCKETS = 4

_SERVED = (torch.float32, torch.bfloat16, torch.int16)
_MOMENTS_SERVED = (torch.float32, torch.bfloat16)


class Row(NamedTuple):
    """A parameter to step.

    place: of the parameter in the optimizer. layer: its subspace, None without one.
    compressed: an earlier gradient in free coordinates, to which `parameter.grad` is added.
    """

    parameter: Tensor
    place: int
    state: dict[str, Any]
    layer: LayerSubspace | None
    compressed: Tensor | None


class Decayed(NamedTuple):
    """What weight decay goes by: a weight, with its low bits where it has them, less where it started."""

    weight: Tensor
    low: Tensor | None = None
    start: Tensor | None = None

    def read(self) -> Tensor:
        weight = read_weight(self.weight, self.low)
        return weight if self.start is None else weight - self.start


def adam_(
    group: Mapping[str, Any],
    outputs: list[Tensor],
    grads: list[Tensor],
    moments: Sequence[list[Tensor]],
    steps: list[Tensor],
    *,
    weight_decay: float,
    fused: bool | None,
    has_complex: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """torch's AdamW with the hyperparameters of `group`, its step added to `outputs`. `moments`: of all rows the first,
    the second, and with amsgrad the largest."""
    beta1, beta2 = group["betas"]
    exp_avgs, exp_avg_sqs, *largest = moments
    adamw(
        outputs,
        grads,
        exp_avgs,
        exp_avg_sqs,
        largest[0] if largest else [],
        steps,
        foreach=group["foreach"],
        capturable=group["capturable"],
        differentiable=group["differentiable"],
        fused=fused,
        grad_scale=grad_scale,
        found_inf=found_inf,
        has_complex=has_complex,
        amsgrad=group["amsgrad"],
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=weight_decay,
        eps=group["eps"],
        maximize=group["maximize"],
    )


def step_rows(options: Options, group: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Step `rows`, whose gradients are projected already where they are to be, a bucket at a time."""
    away = [row for row in rows if row.layer is not None and row.layer.owner is not None]
    if away:
        from ..distributed.steps import step_at_owners

        step_at_owners(options, group, away)
    here = [row for row in rows if row.layer is None or row.layer.owner is None]
    whole = [row for row in here if not is_dtensor(row.parameter)]
    sharded = [row for row in here if is_dtensor(row.parameter)]
    # What the largest takes alone others may take together.
    limit = max([BUCKET_BYTES, *map(_step_bytes, whole)])
    together = in_buckets(whole, lambda row: _share_of_bucket(options, group, row), limit)
    for bucket in (*together, *_sharded_buckets(sharded)):
        if options.in_coordinates:
            # There and back: bases in 16 bit would be made float32 twice.
            bucket = [row._replace(layer=row.layer.in_full()) if row.layer else row for row in bucket]
        grads = [_gradient(options, row) for row in bucket]
        steps = make_steps(options, group, bucket, grads, lambda row: decayed(options, row), _steps_in_bfloat16)
        apply_steps(options, bucket, steps)


def make_steps(
    options: Options,
    group: Mapping[str, Any],
    rows: list[Row],
    grads: list[Tensor],
    decays: Callable[[Row], Decayed],
    narrow: Callable[[Options, Row], bool] = lambda options, row: False,
) -> list[Tensor]:
    """The steps of `rows`, of the shapes of their parameters, with the moments taken on.

    grads: what Adam is fed (`coordinates_of` the gradients). decays: of a row what its weight decay goes by, asked only
    if there is any. narrow: whether a row's step is projected, or leaves the coordinates, in bfloat16; others do in
    float32 (float64).
    """
    held = [_moments(options, group, row, grad) for row, grad in zip(rows, grads, strict=True)]
    computed = held
    columns = [list(column) for column in zip(*held, strict=True)]
    own = [decays(row) if group["weight_decay"] and not _decays_apart(options, row) else None for row in rows]
    counts = [row.state["step"] for row in rows]
    at_once = not options.stochastic_moments and _serves(group, grads, columns, counts, own)
    if not at_once:
        computed = [[m.to(wide(grad.dtype)) for m in moments] for moments, grad in zip(held, grads, strict=True)]
        columns = [list(column) for column in zip(*computed, strict=True)]
        at_once = _serves(group, grads, columns, counts, own)
    if at_once:
        halves = [not options.in_coordinates and narrow(options, row) for row in rows]
        dtypes = [torch.bfloat16 if half else torch.float32 for half in halves]
        directions = _one_pass(group, grads, columns, counts, own, dtypes)
    else:
        grads[:] = [grad.to(wide(grad.dtype)) for grad in grads]
        directions = [torch.zeros_like(grad) for grad in grads]
        # On CPUs the fused kernel makes one pass where the others make eight.
        fused = group["foreach"] is None and all(grad.device.type == "cpu" for grad in grads)
        if rows:
            adam_(group, directions, grads, columns, counts, weight_decay=0.0, fused=fused or None)
    grads.clear()
    for row, moments, values in zip(rows, held, computed, strict=True):
        for slot, (moment, value) in enumerate(zip(moments, values, strict=True)):
            if value is not moment:
                write_moment_(moment, value, _seed(options, row, slot) if options.stochastic_moments else None)
    del computed, columns
    if group["weight_decay"]:
        decay = group["lr"] * group["weight_decay"]
        for row, direction, entry in zip(rows, directions, own, strict=True):
            if at_once and entry is not None:
                continue
            scale = decay.squeeze().to(direction.device) if isinstance(decay, Tensor) else decay
            direction.sub_(coordinates_of(options, row, (entry or decays(row)).read()) * scale)
    if not options.in_coordinates:
        if options.project != "gradient":
            protected = [(d, row.layer) for row, d in zip(rows, directions, strict=True) if row.layer is not None]
            project_each_(protected, in_parts=True)
        return directions
    inside = [
        (index, (directions[index], row.layer, torch.bfloat16 if narrow(options, row) else None))
        for index, row in enumerate(rows)
        if row.layer is not None
    ]
    outside = from_coordinates_each([entry for _, entry in inside])
    for (index, _), step in zip(inside, outside, strict=True):
        directions[index] = step
    return directions


def _steps_in_bfloat16(options: Options, row: Row) -> bool:
    """Whether the step is that of a bfloat16 weight without further bits and is projected on a GPU, where products of
    float32 matrices have no tensor cores. It is rounded before it is projected, and with the weight after that: both
    are 2^-9 of the step, where the weight's own rounding is as much of the weight."""
    layer = row.layer
    # Out of coordinates it goes by products with a stored free basis, in the dtype of both.
    if layer is None or (options.in_coordinates and (layer.keep_left or layer.keep_right)):
        return False
    return (
        options.project != "gradient"
        and row.parameter.is_cuda
        and row.parameter.dtype is torch.bfloat16
        and row.state.get("low") is None
    )


def _decays_apart(options: Options, row: Row) -> bool:
    """Whether the direction is in coordinates and what decays is not."""
    return options.in_coordinates and row.layer is not None


def _serves(
    group: Mapping[str, Any],
    grads: Sequence[Tensor],
    columns: Sequence[list[Tensor]],
    counts: Sequence[Tensor],
    decays: Sequence[Decayed | None],
) -> bool:
    """Whether `_one_pass` does: on CPUs, and on a GPU where the kernel is there, with moments in float32 or rounded to
    the nearest bfloat16. torch's AdamW does the rest."""
    if len(columns) != 2 or group["foreach"] is not None or group["differentiable"]:
        return False
    device = grads[0].device
    if not in_one_pass(device):
        return False
    if device.type != "cpu":
        # Read on the host they would wait for the device, and be frozen into a CUDA graph.
        if any(isinstance(beta, Tensor) and not beta.is_cpu for beta in group["betas"]):
            return False
        # As checkpoints of other settings leave them: torch's AdamW converts.
        rate = [group["lr"]] if isinstance(group["lr"], Tensor) else []
        if not all(number.is_cpu or number.device == device for number in (*rate, *counts)):
            return False
        if not all(count.dtype == torch.float32 for count in counts):
            return False
    others = [tensor for entry in decays if entry is not None for tensor in entry if tensor is not None]
    pairs = zip(*columns, strict=True)
    return all(first.dtype == second.dtype and first.dtype in _MOMENTS_SERVED for first, second in pairs) and all(
        tensor.device == device and not is_dtensor(tensor) and tensor.is_contiguous() and tensor.dtype in _SERVED
        for tensor in (*grads, *columns[0], *columns[1], *others)
    )


def _one_pass(
    group: Mapping[str, Any],
    grads: Sequence[Tensor],
    columns: Sequence[list[Tensor]],
    counts: Sequence[Tensor],
    decays: Sequence[Decayed | None],
    dtypes: Sequence[torch.dtype],
) -> list[Tensor]:
    """The steps without a projection, less what decays, in `dtypes`."""
    directions = [torch.empty_like(grad, dtype=dtype) for grad, dtype in zip(grads, dtypes, strict=True)]
    beta1, beta2 = group["betas"]
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        # Not on a default device: a copy to it would wait, and break a capture.
        lr = torch.tensor(lr, dtype=torch.float64, device="cpu")
    elif lr.is_cpu or lr.dtype not in (torch.float32, torch.float64):
        lr = lr.to(torch.float64)
    step_adam_(
        directions,
        grads,
        columns[0],
        columns[1],
        counts,
        [None if entry is None else entry.weight for entry in decays],
        [None if entry is None else entry.low for entry in decays],
        [None if entry is None else entry.start for entry in decays],
        lr,
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        maximize=group["maximize"],
    )
    return directions


def apply_steps(options: Options, rows: Sequence[Row], steps: Sequence[Tensor]) -> None:
    """`apply_step` of each; where nothing but a sum is to be made, on a GPU in few launches."""
    weights, sums = [], []
    for row, step in zip(rows, steps, strict=True):
        plain = row.parameter.dtype is step.dtype and row.state.get("low") is None and not is_dtensor(row.parameter)
        if plain and not _rounds_by_chance(options, row):
            weights.append(row.parameter)
            sums.append(step)
        else:
            apply_step(options, row, step)
    if weights:
        torch._foreach_add_(weights, sums)


def _rounds_by_chance(options: Options, row: Row) -> bool:
    return options.master == "stochastic" and has_master(row.parameter, options.master)


def apply_step(options: Options, row: Row, step: Tensor) -> None:
    """Add `step` to the parameter, to as many digits as it has."""
    stochastic = _rounds_by_chance(options, row)
    seed = _seed(options, row, len(MOMENTS)) if stochastic else None
    add_to_weight_(row.parameter, step, row.state.get("low"), seed)


def start_row(options: Options, group: Mapping[str, Any], row: Row) -> None:
    """Make what is kept of the row's parameter besides its moments, if this is its first step."""
    state, parameter = row.state, row.parameter
    if "step" not in state:
        device = parameter.device if group["capturable"] else None
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
    if options.master == "split" and has_master(parameter, options.master) and "low" not in state:
        state["low"] = torch.zeros_like(parameter, dtype=torch.int16)
    if options.decay_to == "start" and group["weight_decay"] and "start" not in state:
        state["start"] = parameter.detach().clone()


def coordinates_of(options: Options, row: Row, matrix: Tensor) -> Tensor:
    """A matrix of the parameter's shape as the moments are: in coordinates where there are any."""
    return row.layer.to_coordinates(matrix) if options.in_coordinates and row.layer is not None else matrix


def decayed(options: Options, row: Row) -> Decayed:
    start = row.state["start"] if options.decay_to == "start" else None
    return Decayed(row.parameter.detach(), row.state.get("low"), start)


def _gradient(options: Options, row: Row) -> Tensor:
    """What Adam is fed: the gradient, or its coordinates."""
    grad = row.parameter.grad
    if grad is None:
        assert row.compressed is not None
        return row.compressed
    if row.layer is None or not options.in_coordinates:
        return grad
    coordinates = row.layer.to_coordinates(grad)
    return coordinates if row.compressed is None else coordinates.add_(row.compressed)


def _moments(options: Options, group: Mapping[str, Any], row: Row, like: Tensor) -> list[Tensor]:
    """The row's moments, of the shape and placement of `like`, made with everything else it keeps if this is its first
    step."""
    start_row(options, group, row)
    names = MOMENTS if group["amsgrad"] else MOMENTS[:2]
    for name in names:
        if name not in row.state:
            dtype = options.moments_of(row.parameter)
            row.state[name] = torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)
    return [row.state[name] for name in names]


def _seed(options: Options, row: Row, slot: int) -> int:
    return rounding_seed(options.seed, row.state["step"], row.place, slot)


def _share_of_bucket(options: Options, group: Mapping[str, Any], row: Row) -> int:
    """Bytes of one copy, where the row's step takes `_COPIES`. Made in one pass on a GPU the step is all there is: as
    many more go together, since for lists of one matrix the host takes longer than the GPU (224 matrices of LLaMA-2
    7B at rank 64 took 129 ms a step on an H200, in lists 2.7 times as long 85: docs/kernels.md)."""
    parameter = row.parameter
    if (
        options.in_coordinates
        or options.stochastic_moments
        or group["amsgrad"]
        or group["foreach"] is not None
        or parameter.dtype not in _MOMENTS_SERVED
        or not (parameter.is_cuda and in_one_pass(parameter.device))
    ):
        return _step_bytes(row)
    split = options.master == "split" and has_master(parameter, options.master)
    narrow = not split and _steps_in_bfloat16(options, row)
    return -(-parameter.numel() * (2 if narrow else 4) // _COPIES)


def _step_bytes(row: Row) -> int:
    return row.parameter.numel() * max(row.parameter.element_size(), 4)


def _sharded_buckets(rows: Sequence[Row]) -> list[list[Row]]:
    """The same on all ranks, and at most `SHARDED_BUCKETS`: the projections of each take a collective or two."""
    if not rows:
        return []
    size = cast(Any, rows[0].parameter).device_mesh.size()
    sizes = [_step_bytes(row) for row in rows]
    total, before = sum(sizes), 0
    count = min(max(-(-total // (size * BUCKET_BYTES)), 1), SHARDED_BUCKETS)
    buckets: list[list[Row]] = [[] for _ in range(count)]
    for row, nbytes in zip(rows, sizes, strict=True):
        buckets[count * before // total].append(row)
        before += nbytes
    return [bucket for bucket in buckets if bucket]

"""What a way to train keeps on the device, counted from the shapes of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ...basis import Basis, Form
from ...layer import LayerSubspace, Sides
from ...leak import sketch_shape
from ...optim.options import Options
from ...optim.rows import BUCKET_BYTES
from .trace import Trace

__all__ = ["Footprint", "footprint", "protected_layer"]


@dataclass(frozen=True)
class Footprint:
    """Bytes.

    gradients: of all trained parameters together. activations: the most that a forward and backward pass holds beside
        weights and gradients, logits included. buffers: of the optimizer's step.
    peak: the most at any time, with the states of a first step made. peak_in_backward: the same if every parameter is
        stepped as soon as its gradient is complete (`fuse_into_backward`), None where that cannot be done.
    """

    weights: int
    bases: int
    gradients: int
    states: int
    activations: int
    buffers: int
    peak: int
    peak_in_backward: int | None


def protected_layer(
    shape: tuple[int, int], rank: int, sides: Sides, basis_dtype: torch.dtype | None, coordinates: bool
) -> LayerSubspace:
    """`LayerSubspace.from_top_subspace` without values: what is stored of a matrix of `shape`, as fake tensors.
    `coordinates`: as after `Subspaces.use_reflectors`."""
    narrow = basis_dtype is not None and basis_dtype.itemsize == 2

    def basis(length: int) -> Basis:
        free = sides != "block" and length - rank < rank
        columns = length - rank if free else rank
        form: Form = "free" if free else "reflector" if narrow or coordinates else "protected"
        correction = torch.empty(columns, columns, dtype=torch.float16) if narrow else None
        return Basis(torch.empty(length, columns, dtype=basis_dtype), form, correction)

    m, n = shape
    # Bases on the meta device are another rank's and count as nothing.
    with FakeTensorMode():
        left, right = (None if sides == "right" else basis(m)), (None if sides == "left" else basis(n))
    return LayerSubspace(shape, rank, 1.0, left, right, sides == "block")


def footprint(
    parameters: Mapping[str, Tensor],
    layers: Mapping[str, LayerSubspace],
    trace: Trace,
    options: Options | None,
    frozen_bases: int = 0,
) -> Footprint:
    """Of the model with `parameters` (values are not looked at) trained as `trace` saw it.

    layers: of the protected ones. options: of `sculpt_ops.AdamW`; None is `torch.optim.AdamW(fused=True)`, which needs
    no buffers. frozen_bases: bytes of `parameters` that count as bases.
    """
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    weights = sum(parameter.nbytes for parameter in parameters.values()) - frozen_bases
    bases = frozen_bases + sum(layer.nbytes + _sketch_bytes(layer) for layer in layers.values())
    states = sum(_state_bytes(p, layers.get(name), options or Options()) for name, p in trained.items())
    kept = weights + bases + states
    buffers, in_backward = 0, None
    if options is not None:
        torchs = {name: p for name, p in trained.items() if not _is_ours(p, layers.get(name), options)}
        own = {name: _buffer_bytes(p) for name, p in trained.items() if name not in torchs}
        # torch keeps the roots of all second moments on a GPU, on a CPU twice those of one parameter.
        roots = [parameter.numel() * max(parameter.element_size(), 4) for parameter in torchs.values()]
        bucket = max(min(3 * BUCKET_BYTES, sum(own.values())), max(own.values(), default=0))
        buffers = max(sum(roots), 2 * max(roots, default=0), bucket)
        stepping = (alive + own.get(name, 2 * parameters[name].nbytes) for name, alive in trace.arrivals)
        in_backward = kept + max(trace.activations, *stepping)
    return Footprint(
        weights=weights,
        bases=bases,
        gradients=trace.gradients,
        states=states,
        activations=trace.activations,
        buffers=buffers,
        peak=kept + max(trace.peak, trace.gradients + buffers),
        peak_in_backward=in_backward,
    )


def _is_ours(parameter: Tensor, layer: LayerSubspace | None, options: Options) -> bool:
    """Whether `optim.rows` steps it, and not torch."""
    return (layer is not None and layer.rank > 0) or options.concern(parameter, weight_decay=0.0)


def _state_bytes(parameter: Tensor, layer: LayerSubspace | None, options: Options) -> int:
    compressed = options.in_coordinates and layer is not None and layer.rank > 0
    size = torch.Size(layer.free_shape).numel() if compressed and layer is not None else parameter.numel()
    low = 2 if options.master == "split" and parameter.dtype is torch.bfloat16 else 0
    return 2 * size * options.moments_of(parameter).itemsize + low * parameter.numel()


def _buffer_bytes(parameter: Tensor) -> int:
    """The gradient in float32, the step, and one more: the decay, the matrix that is projected, or Adam's root."""
    return 3 * parameter.numel() * max(parameter.element_size(), 4)


def _sketch_bytes(layer: LayerSubspace) -> int:
    """As `leak.sketch_weight` makes them, in float64."""
    return 8 * torch.Size(sketch_shape(layer)).numel()

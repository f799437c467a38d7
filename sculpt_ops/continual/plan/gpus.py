"""How much a GPU holds, and the least time that a training step takes on it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...layer import LayerSubspace
from ...optim.options import Options

__all__ = ["GPUS", "Gpu", "Work", "find_gpu", "projection_work", "update_work"]


@dataclass(frozen=True)
class Gpu:
    """memory: bytes. bandwidth: bytes a second. products: dense bfloat16 operations a second. source: of the two rates;
    what a GPU sustains is less than its data sheet says."""

    name: str
    memory: int
    bandwidth: float
    products: float
    source: str = "data sheet"

    def seconds(self, work: Iterable[Work]) -> float:
        """Of pieces of work one after the other, each as fast as memory and products allow."""
        return sum(max(one.moved / self.bandwidth, one.operations / self.products) for one in work)


@dataclass(frozen=True)
class Work:
    """moved: bytes to and from memory, each once. operations: a multiplication and an addition are two."""

    moved: float
    operations: float = 0.0


GB = 10**9
H100 = Gpu("H100", 80 * GB, 3.0e12, 790e12, "assumed: what copies and bfloat16 products sustain on an H100 SXM")
GPUS = {
    gpu.name.lower(): gpu
    for gpu in (
        H100,
        Gpu("H200", 141 * GB, 4.8e12, 989e12),
        Gpu("B200", 180 * GB, 8.0e12, 2250e12),
        Gpu("A100", 80 * GB, 2.04e12, 312e12),
        Gpu("A100-40GB", 40 * GB, 1.56e12, 312e12),
        Gpu("L40S", 48 * GB, 0.864e12, 362e12),
        Gpu("L4", 24 * GB, 0.3e12, 121e12),
        Gpu("RTX4090", 24 * GB, 1.01e12, 165e12),
        Gpu("MI300X", 192 * GB, 5.3e12, 1307e12),
    )
}


def find_gpu(text: str) -> Gpu:
    """A GPU of `GPUS` by name, or one of a size such as "80GB" or "24GiB" with the rates of an H100. ValueError
    otherwise."""
    known = GPUS.get(text.strip().lower().replace(" ", ""))
    if known is not None:
        return known
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB)", text.strip(), re.IGNORECASE)
    if size is None or float(size[1]) == 0:
        names = ", ".join(gpu.name for gpu in GPUS.values())
        raise ValueError(f"gpu: got {text!r}, wanted a size as 80GB or 24GiB, or one of {names}")
    unit = 2**30 if size[2].lower() == "gib" else GB
    return Gpu(text.strip(), int(float(size[1]) * unit), H100.bandwidth, H100.products, H100.source)


def update_work(parameter: Tensor, layer: LayerSubspace | None, options: Options) -> Work:
    """Adam and the addition of its step: gradient, moments and weight, and what master="split" keeps beside it."""
    low = 4 if options.master == "split" and parameter.dtype is torch.bfloat16 else 0
    moments = 4 * options.moments_of(parameter).itemsize
    weight = (3 * parameter.element_size() + low) * parameter.numel()
    if layer is None or not layer.rank:
        return Work(weight + moments * parameter.numel())
    stepped = torch.Size(layer.free_shape).numel() if options.in_coordinates else parameter.numel()
    # The step is written by Adam and read again; `projection_work` has it read and written in between.
    return Work(weight + (moments + 8) * stepped)


def projection_work(parameter: Tensor, layer: LayerSubspace, options: Options) -> list[Work]:
    """Gradient and step projected, or taken to coordinates and back: 4 m n r operations for a basis of r columns that
    projects, 2 m n r for one that holds the coordinates."""
    if not layer.rank:
        return []
    m, n = layer.shape
    bases = layer.nbytes
    stored = [basis for basis in (layer.left_basis, layer.right_basis) if basis is not None]
    if not options.in_coordinates:
        operations = 4 * m * n * sum(basis.columns.shape[1] for basis in stored)
        if layer.block:
            operations = 4 * min(m, n) * layer.rank * (max(m, n) + layer.rank)
        return [Work(2 * size * m * n + bases, operations) for size in (parameter.element_size(), 4)]
    operations, rows, columns = 0, m, n
    if layer.keep_left:
        rows = layer.free_shape[0]
        operations += 2 * m * n * rows
    if layer.keep_right:
        columns = layer.free_shape[1]
        operations += 2 * rows * n * columns
    operations += 4 * rows * columns * sum(basis.columns.shape[1] for basis in stored if not basis.keep)
    free = torch.Size(layer.free_shape).numel()
    return [Work(size * m * n + 4 * free + bases, operations) for size in (parameter.element_size(), 4)]

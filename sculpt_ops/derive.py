"""The bases of many matrices: those of equal shape together, a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .decompose import Choice, choose_method, top_subspaces
from .layer import LayerSubspace, Sides
from .leak import sketch_weight
from .ops.finite import check_finite

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["derive_layers", "progress_bar", "search_starts"]

# Elements decomposed together: 24 matrices of 576 x 576, one of 4096 x 4096. Gram matrix, eigenvectors and images take
# several times their memory; small matrices need company to occupy every core.
CHUNK = 2**23


def derive_layers(
    targets: Mapping[str, Tensor],
    wanted: Mapping[str, Choice] | float,
    sides: Sides,
    previous: Mapping[str, LayerSubspace],
    advance: Callable[[], None],
    basis_dtype: torch.dtype | None = None,
) -> tuple[dict[str, LayerSubspace], dict[str, Tensor]]:
    """The subspace of every matrix of `targets` and its sketch (`leak.sketch_weight`), in their order.

    wanted: of every matrix the rank, or a function that makes it of all squared singular values; or the share of the
        energy to hold.
    previous: earlier subspaces of these names; see `search_starts`.
    advance: called for every matrix that is done.
    basis_dtype: what the bases are stored in, see `Basis.store`.
    Raises torch.linalg.LinAlgError, naming the matrix, for one that holds NaN or Inf.
    """
    for name, matrix in targets.items():
        check_finite("from_model", name, matrix.detach())
    layers: dict[str, LayerSubspace] = {}
    sketches: dict[str, Tensor] = {}
    for names in _chunks(targets):
        chunk = [targets[name] for name in names]
        ranks, energy = (None, wanted) if isinstance(wanted, float) else ([wanted[name] for name in names], None)
        starts = [_start(previous.get(name), targets[name]) for name in names]
        for name, top in zip(names, top_subspaces(chunk, ranks, energy=energy, starts=starts), strict=True):
            layers[name] = LayerSubspace.from_top_subspace(top, sides, basis_dtype)
            sketches[name] = sketch_weight(layers[name], targets[name], name)
            advance()
    return {name: layers[name] for name in targets}, {name: sketches[name] for name in targets}


def search_starts(layers: Mapping[str, LayerSubspace]) -> dict[str, LayerSubspace]:
    """Those of `layers` that a later `derive_layers` starts from if the shape is still the same: where so few
    directions are protected that with a start they are found by a search. Other methods have no use for one."""
    return {name: layer for name, layer in layers.items() if _searched(layer)}


def _searched(layer: LayerSubspace) -> bool:
    basis, rank = layer.right_basis, layer.rank
    if basis is None or basis.keep or not rank:
        return False
    stored = basis.columns
    dtype = torch.promote_types(stored.dtype, torch.float32)
    return choose_method(*layer.shape, rank, dtype, stored.device.type, columns=rank) == "rsvd"


def _start(layer: LayerSubspace | None, matrix: Tensor) -> Tensor | None:
    if layer is None or layer.shape != tuple(matrix.shape) or not _searched(layer):
        return None
    right = layer.right
    return None if right is None else right.to(matrix.device, torch.promote_types(matrix.dtype, torch.float32))


def _chunks(targets: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names of matrices of equal shape, dtype and device, as many as `CHUNK` allows and at least one."""
    groups: dict[tuple[torch.Size, torch.dtype, torch.device], list[str]] = {}
    for name, matrix in targets.items():
        groups.setdefault((matrix.shape, matrix.dtype, matrix.device), []).append(name)
    for (shape, *_), names in groups.items():
        size = max(1, CHUNK // max(1, shape.numel()))
        yield from (names[first : first + size] for first in range(0, len(names), size))


@contextmanager
def progress_bar(total: int, shown: bool) -> Iterator[Callable[[], None]]:
    """Yields what to call after each of `total` matrices; a bar on standard error if `shown` and rich is installed."""
    bars = _bars() if shown else None
    if bars is None:
        yield lambda: None
        return
    with bars:
        bar = bars.add_task("Decomposing", total=total)
        yield lambda: bars.advance(bar)


def _bars() -> Progress | None:
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        return None
    return Progress(console=Console(stderr=True))

"""The bases of many matrices: those of equal shape together, a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .basis import Basis
from .decompose import Choice, choose_method, top_subspaces
from .input_covariance import input_covariances, input_sides
from .layer import LayerSubspace, Sides, project_each_
from .leak import SKETCH_COLUMNS, sketch_side, sketch_weight
from .ops.finite import check_finite
from .remember import (
    Memory,
    Remember,
    Remembered,
    RememberInputs,
    change_of,
    check_memory,
    extend_changes,
    remember_inputs,
)

if TYPE_CHECKING:
    from rich.progress import Progress

    from .distributed.agreement import Ranks

__all__ = ["derive_layers", "progress_bar", "protected_shares", "remember_tasks", "search_starts"]

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
    remembered: Mapping[str, Remembered] | None = None,
) -> tuple[dict[str, LayerSubspace], dict[str, Tensor]]:
    """The subspace of every matrix of `targets` and its sketch (`leak.sketch_weight`), in their order.

    wanted: of every matrix the rank, or a function that makes it of all squared singular values; or the share of the
        energy to hold.
    previous: earlier subspaces of these names; see `search_starts`.
    advance: called for every matrix that is done.
    basis_dtype: what the bases are stored in, see `Basis.store`.
    remembered: what is to be protected besides, of every matrix.
    Raises torch.linalg.LinAlgError, naming the matrix, for one that holds NaN or Inf.
    """
    for name, matrix in targets.items():
        check_finite("from_model", name, matrix.detach())
    layers: dict[str, LayerSubspace] = {}
    sketches: dict[str, Tensor] = {}
    shared: dict[int, Basis] = {}
    for names in _chunks(targets):
        chunk = [targets[name] for name in names]
        ranks, energy = (None, wanted) if isinstance(wanted, float) else ([wanted[name] for name in names], None)
        starts = [_start(previous.get(name), targets[name]) for name in names]
        for name, top in zip(names, top_subspaces(chunk, ranks, energy=energy, starts=starts), strict=True):
            also = None if remembered is None else remembered[name]
            layers[name] = LayerSubspace.from_top_subspace(top, sides, basis_dtype, also, shared)
            sketches[name] = sketch_weight(layers[name], targets[name], name)
            advance()
    return {name: layers[name] for name in targets}, {name: sketches[name] for name in targets}


def remember_tasks(
    model: nn.Module,
    targets: Mapping[str, Tensor],
    sides: Sides,
    changes: Remember | None,
    inputs: RememberInputs | None,
    before: Memory | None,
    batches: Iterable[Mapping[str, Any] | Tensor] | None,
    groups: Sequence[Ranks],
) -> Memory:
    """`before`, None at the first task, with what the task that has just ended taught.

    batches: rows of that task, for `inputs`. groups: as in `input_covariances`. The same on all ranks; of sharded
    matrices for `inputs` alone.
    Raises what `check_memory`, `input_sides` and `input_covariances` do, and torch.linalg.LinAlgError, naming the
    matrix, for one that holds NaN or Inf.
    """
    fed = {} if inputs is None else input_sides(model, targets, sides)
    if before is None:
        return Memory({name: Remembered(input_side=fed.get(name, "right")) for name in targets})
    check_memory(targets, before, changes)
    remembered = dict(before.remembered)
    if changes is not None:
        remembered = _remember_changes(targets, before, changes, sides)
    if inputs is not None:
        remembered = {name: replace(each, input_side=fed[name]) for name, each in remembered.items()}
        covariances = input_covariances(model, targets, batches, fed, groups)
        remembered = remember_inputs(remembered, covariances, inputs.energy)
    return Memory(remembered, before.start_weights)


def _remember_changes(
    targets: Mapping[str, Tensor], memory: Memory, changes: Remember, sides: Sides
) -> dict[str, Remembered]:
    """What `memory` remembers of every matrix of `targets`, with its change since the start weights in addition.

    Raises torch.linalg.LinAlgError, naming the matrix, for one that holds NaN or Inf.
    """
    for name, matrix in targets.items():
        check_finite("from_model", name, matrix.detach())
    remembered = dict(memory.remembered)
    for names in _chunks(targets):
        differences = [change_of(targets[name], memory.start_weights[name]) for name in names]
        ranks = [changes.rank_of(min(difference.shape)) for difference in differences]
        for name, top in zip(names, top_subspaces(differences, ranks), strict=True):
            remembered[name] = extend_changes(remembered[name], top, targets[name], sides)
    return remembered


def protected_shares(
    layers: Mapping[str, LayerSubspace], targets: Mapping[str, Tensor], starts: Mapping[str, Tensor]
) -> dict[str, list[float]]:
    """||P dW|| / ||dW|| of every matrix's change since `starts`, P its projector: the `LayerLeak.total` of a change
    that was made before the layers were, to 1e-6. 0.0 where nothing has changed. One number each, for one change."""
    shares: dict[str, list[float]] = {}
    for name, layer in layers.items():
        change = change_of(targets[name], starts[name])
        free = change.clone()
        project_each_([(free, layer)])
        norm = float(torch.linalg.vector_norm(change))
        shares[name] = [float(torch.linalg.vector_norm(change - free)) / norm if norm > 0 else 0.0]
    return shares


def sketch_sides(targets: Mapping[str, Tensor], remembered: Mapping[str, Remembered]) -> dict[str, Tensor]:
    """`leak.sketch_side` of every matrix, of the side that its inputs lie on; on the CPU."""
    return {name: sketch_side(matrix, name, remembered[name].input_side).cpu() for name, matrix in targets.items()}


def sketched_shares(
    layers: Mapping[str, LayerSubspace], remembered: Mapping[str, Remembered], sketches: Mapping[str, Tensor]
) -> dict[str, list[float]]:
    """||P dW|| / ||dW|| as in `protected_shares`, P of the input side alone, of every change between two `sketch_sides`
    that stand next to each other in `sketches`; to about a tenth where it is not near 0 or 1."""
    shares: dict[str, list[float]] = {}
    for name, layer in layers.items():
        basis = layer.right_basis if remembered[name].input_side == "right" else layer.left_basis
        assert basis is not None
        before, after = sketches[name][:, :-SKETCH_COLUMNS], sketches[name][:, SKETCH_COLUMNS:]
        changes = (after - before).to(basis.columns.device)
        # Of every change one number: the norm of its columns.
        squares, inside = (
            part.square().sum(0).reshape(-1, SKETCH_COLUMNS).sum(1) for part in (changes, basis.protected(changes))
        )
        shares[name] = torch.where(squares > 0, inside / squares, 0.0).sqrt().tolist()
    return shares


def search_starts(layers: Mapping[str, LayerSubspace]) -> dict[str, LayerSubspace]:
    """Those of `layers` that a later `derive_layers` starts from if the shape is still the same: where so few
    directions are protected that with a start they are found by a search. Other methods have no use for one."""
    return {name: layer for name, layer in layers.items() if _searched(layer)}


def _searched(layer: LayerSubspace) -> bool:
    basis, rank = layer.right_basis, layer.rank
    if basis is None or basis.keep or not rank:
        return False
    return choose_method(*layer.shape, rank, basis.columns.device.type, columns=rank) == "rsvd"


def _start(layer: LayerSubspace | None, matrix: Tensor) -> Tensor | None:
    if layer is None or not layer.is_here or layer.shape != tuple(matrix.shape) or not _searched(layer):
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

"""The table that `Subspaces.summary` returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .names import group_names, list_names

if TYPE_CHECKING:
    from .basis import Basis
    from .layer import LayerSubspace
    from .subspaces import Subspaces

__all__ = ["span", "summarise"]

SIDES = ("left", "right")


def span(values: Sequence[float], style: str) -> str:
    """From the smallest to the largest; one of them where they are written alike."""
    low, high = f"{min(values):{style}}", f"{max(values):{style}}"
    return low if low == high else f"{low} to {high}"


def summarise(subspaces: Subspaces, kinds: bool = False) -> str:
    """Every layer of `subspaces`, or every kind of layer, then every group of parameters that it does not protect."""
    groups = group_names(subspaces) if kinds else {name: [name] for name in subspaces}
    header = ("layer", "shape", "rank", "energy", "left", "right")
    rows = [header, *(_row(label, [subspaces[name] for name in names]) for label, names in groups.items())]
    if kinds:
        counts = ["number", *(str(len(names)) for names in groups.values())]
        rows = [(row[0], count, *row[1:]) for row, count in zip(rows, counts, strict=True)]
    if importance := subspaces.importance:
        cells = ["importance", *(span([importance[name] for name in names], ".2f") for names in groups.values())]
        rows = [(*row, cell) for row, cell in zip(rows, cells, strict=True)]
    if subspaces.remembered:
        cells = ["remembered", *(_joined([subspaces[name] for name in names]) for names in groups.values())]
        rows = [(*row, cell) for row, cell in zip(rows, cells, strict=True)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append(f"{len(subspaces)} matrices, {subspaces.memory() / 2**20:.1f} MiB of {_stored(subspaces)}")
    if empty := [name for name, layer in subspaces.items() if not layer.protects]:
        lines.append(f"NOT protected, rank 0: {list_names(empty)}")
    for trained, verb in ((True, "trained"), (False, "frozen")):
        left = [group for group in subspaces.unprotected if group.trained == trained]
        if left:
            count, elements = sum(g.parameters for g in left), sum(g.elements for g in left)
            lines.append(f"NOT protected, {verb}: {count} without a basis, {elements:,} elements")
            lines += [f"  {group.parameters} x {group.pattern}, {group.elements:,} elements" for group in left]
    if not subspaces.unprotected:
        lines.append("every parameter has a basis")
    return "\n".join(lines)


def _row(label: str, layers: Sequence[LayerSubspace]) -> tuple[str, ...]:
    shapes = dict.fromkeys(f"{m} x {n}" for m, n in (layer.shape for layer in layers))
    ranks, energies = [layer.rank for layer in layers], [layer.energy for layer in layers]
    left = _side([(layer.left_basis, layer.block) for layer in layers])
    right = _side([(layer.right_basis, layer.block) for layer in layers])
    return (label, ", ".join(shapes), span(ranks, "d"), span(energies, ".1%"), left, right)


def _joined(layers: Sequence[LayerSubspace]) -> str:
    """Directions that the sides protect beyond the weights' own."""
    sides = zip(SIDES, zip(*(layer.protected_dims for layer in layers), strict=True), strict=True)
    more = {side: [n - layer.rank for n, layer in zip(dims, layers, strict=True) if n] for side, dims in sides}
    return ", ".join(f"{span(counts, 'd')} {side}" for side, counts in more.items() if counts)


def _stored(subspaces: Subspaces) -> str:
    if subspaces.memory_of_tasks is None:
        return "bases and sketches"
    starts = " and start weights" if subspaces.memory_of_tasks.start_weights else ""
    return f"bases, sketches and, on the CPU, what is remembered{starts}"


def _side(bases: Sequence[tuple[Basis | None, bool]]) -> str:
    stored: dict[str, list[int]] = {}
    for basis, block in bases:
        if basis is not None:
            kind = "block" if block else "free" if basis.keep else "protected"
            stored.setdefault(kind, []).append(basis.columns.shape[1])
    return ", ".join(f"{span(counts, 'd')} {kind}" for kind, counts in stored.items()) or "-"

"""The table that `Subspaces.summary` returns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .names import list_names

if TYPE_CHECKING:
    from .basis import Basis
    from .layer import LayerSubspace
    from .subspaces import Subspaces

__all__ = ["summarise"]

SIDES = ("left", "right")


def summarise(subspaces: Subspaces) -> str:
    """Every layer of `subspaces`, then every group of parameters that it does not protect."""
    header = ("layer", "shape", "rank", "energy", "left", "right")
    rows = [header, *(_row(name, layer) for name, layer in subspaces.items())]
    if subspaces.importance:
        cells = ["importance", *(f"{subspaces.importance[name]:.2f}" for name in subspaces)]
        rows = [(*row, cell) for row, cell in zip(rows, cells, strict=True)]
    if subspaces.remembered:
        rows = [(*row, cell) for row, cell in zip(rows, ("remembered", *map(_joined, subspaces.values())), strict=True)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append(f"{len(subspaces)} matrices, {subspaces.memory() / 2**20:.1f} MiB of {_stored(subspaces)}")
    if empty := [name for name, layer in subspaces.items() if not layer.protects]:
        lines.append(f"NOT protected, rank 0: {list_names(empty)}")
    for trained, verb in ((True, "trained"), (False, "frozen")):
        groups = [group for group in subspaces.unprotected if group.trained == trained]
        if groups:
            count, elements = sum(g.parameters for g in groups), sum(g.elements for g in groups)
            lines.append(f"NOT protected, {verb}: {count} without a basis, {elements:,} elements")
            lines += [f"  {group.parameters} x {group.pattern}, {group.elements:,} elements" for group in groups]
    if not subspaces.unprotected:
        lines.append("every parameter has a basis")
    return "\n".join(lines)


def _row(name: str, layer: LayerSubspace) -> tuple[str, ...]:
    m, n = layer.shape
    sides = (_side(layer.left_basis, layer.block), _side(layer.right_basis, layer.block))
    return (name, f"{m} x {n}", str(layer.rank), f"{layer.energy:.1%}", *sides)


def _joined(layer: LayerSubspace) -> str:
    """Directions that the sides protect beyond the weight's own."""
    return ", ".join(
        f"{dims - layer.rank} {side}" for dims, side in zip(layer.protected_dims, SIDES, strict=True) if dims
    )


def _stored(subspaces: Subspaces) -> str:
    if subspaces.memory_of_tasks is None:
        return "bases and sketches"
    starts = " and start weights" if subspaces.memory_of_tasks.start_weights else ""
    return f"bases, sketches and, on the CPU, what is remembered{starts}"


def _side(basis: Basis | None, block: bool) -> str:
    if basis is None:
        return "-"
    return f"{basis.columns.shape[1]} {'block' if block else 'free' if basis.keep else 'protected'}"

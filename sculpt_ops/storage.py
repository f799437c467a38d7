"""Subspaces in one safetensors file: bases and sketches as tensors, the rest as JSON in the header."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from torch import Tensor

from .basis import Basis, Form
from .layer import LayerSubspace
from .leak import sketch_shape
from .tensor_file import FileFormat

if TYPE_CHECKING:
    from .distributed.agreement import Ranks
    from .subspaces import Subspaces, Unprotected

__all__ = ["load_subspaces", "save_subspaces"]

_FILE = FileFormat("sculpt_ops.subspaces", 2, "subspaces", "Subspaces.save")
_FIELDS = ("rank", "energy", "block")
_FORMS = get_args(Form)


def save_subspaces(
    subspaces: Subspaces, sketches: Mapping[str, Tensor], path: Path, ranks: Ranks | None = None
) -> None:
    """Write to `path`, which is replaced once the file is whole. ranks: those that the bases are spread over."""
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    for name, layer in subspaces.items():
        layers[name] = {"shape": list(layer.shape)} | {field: getattr(layer, field) for field in _FIELDS}
        for side, basis in (("left", layer.left_basis), ("right", layer.right_basis)):
            if basis is not None:
                layers[name][side] = basis.form
                tensors[f"{name}:{side}"] = basis.columns
                if basis.correction is not None:
                    tensors[f"{name}:{side}:correction"] = basis.correction
        if name in sketches:
            tensors[f"{name}:sketch"] = sketches[name]
    unprotected = [asdict(group) for group in subspaces.unprotected]
    header = {"layers": layers, "unprotected": unprotected, "importance": subspaces.importance}
    _FILE.write(path, tensors, header, ranks)


def load_subspaces(
    path: Path, own: Callable[[dict[str, tuple[int, int]]], Collection[str]] | None = None
) -> tuple[dict[str, LayerSubspace], dict[str, Tensor], list[Unprotected], dict[str, float]]:
    """Read what `save_subspaces` wrote, as the arguments of `Subspaces`; ValueError for a truncated or foreign file,
    OSError if it cannot be read.

    own: of the layers, given with their shapes, those to read; of the others the tensors come on the meta device.
    """
    from .subspaces import Unprotected

    tensors, header = _FILE.read(path, lambda key: own is None)
    if own is not None:
        names = own({name: tuple(fields["shape"]) for name, fields in header["layers"].items()})
        tensors, header = _FILE.read(path, lambda key: key.partition(":")[0] in names)
    layers = {name: _layer(path, name, fields, tensors) for name, fields in header["layers"].items()}
    sketches = {name: _sketch(path, name, layers[name], tensors) for name in layers if f"{name}:sketch" in tensors}
    unprotected = [Unprotected(**group) for group in header["unprotected"]]
    return layers, sketches, unprotected, header["importance"]


def _sketch(path: Path, name: str, layer: LayerSubspace, tensors: dict[str, Tensor]) -> Tensor:
    sketch, wanted = tensors[f"{name}:sketch"], sketch_shape(layer)
    if tuple(sketch.shape) != wanted:
        raise ValueError(f"{path}: the sketch of {name} has shape {tuple(sketch.shape)}, wanted {wanted}")
    return sketch


def _layer(path: Path, name: str, fields: dict[str, Any], tensors: dict[str, Tensor]) -> LayerSubspace:
    m, n = fields["shape"]
    left, right = (_basis(path, name, side, d, fields, tensors) for side, d in (("left", m), ("right", n)))
    if left is None and right is None:
        raise ValueError(f"{path}: {name} has no basis")
    return LayerSubspace(
        shape=(m, n), left_basis=left, right_basis=right, **{field: fields[field] for field in _FIELDS}
    )


def _basis(
    path: Path, name: str, side: str, length: int, fields: dict[str, Any], tensors: dict[str, Tensor]
) -> Basis | None:
    form, columns = fields.get(side), tensors.get(f"{name}:{side}")
    if form is None:
        return None
    if form not in _FORMS:
        raise ValueError(f"{path}: the {side} basis of {name} has the form {form!r}, wanted one of {', '.join(_FORMS)}")
    width = length - fields["rank"] if form == "free" else fields["rank"]
    given = None if columns is None else tuple(columns.shape)
    if columns is None or given != (length, width):
        raise ValueError(f"{path}: the {side} basis of {name} has shape {given}, wanted {(length, width)}")
    correction = tensors.get(f"{name}:{side}:correction")
    given = None if correction is None else tuple(correction.shape)
    wanted = (width, width) if columns.element_size() == 2 else None
    if given != wanted:
        raise ValueError(f"{path}: the correction of the {side} basis of {name} has shape {given}, wanted {wanted}")
    return Basis(columns, form, correction)

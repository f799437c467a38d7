"""Subspaces in one safetensors file: bases and sketches as tensors, the rest as JSON in the header."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from torch import Tensor

from .basis import Basis, Form
from .layer import LayerSubspace
from .leak import sketch_shape
from .remember import Memory, Remembered
from .tensor_file import FileFormat

if TYPE_CHECKING:
    from .distributed.agreement import Ranks
    from .subspaces import Parts, Subspaces

__all__ = ["load_subspaces", "pack", "save_subspaces", "unpack"]

_FILE = FileFormat("sculpt_ops.subspaces", 3, "subspaces", "Subspaces.save")
_FIELDS = ("rank", "energy", "block")
_FORMS = get_args(Form)
# What is remembered of a matrix, by the field of `Remembered`.
_REMEMBERED = ("left", "right", "inputs")

Header = dict[str, Any]


def save_subspaces(
    subspaces: Subspaces, sketches: Mapping[str, Tensor], path: Path, ranks: Ranks | None = None
) -> None:
    """Write to `path`, which is replaced once the file is whole. ranks: those that the bases are spread over."""
    tensors, header = pack(subspaces, sketches)
    _FILE.write(path, tensors, header, ranks)


def load_subspaces(path: Path, own: Callable[[dict[str, tuple[int, int]]], Collection[str]] | None = None) -> Parts:
    """Read what `save_subspaces` wrote, as the arguments of `Subspaces`; ValueError for a truncated or foreign file,
    OSError if it cannot be read.

    own: of the layers, given with their shapes, those to read; of the others the tensors come on the meta device.
    """
    tensors, header = _FILE.read(path, lambda key: own is None)
    if own is not None:
        with _whole(path):
            shapes = {name: tuple(fields["shape"]) for name, fields in header["layers"].items()}
        names = own(shapes)
        tensors, header = _FILE.read(path, lambda key: key.partition(":")[0] in names or ":remembered:" in key)
    return unpack(tensors, header, path)


def pack(subspaces: Subspaces, sketches: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Header]:
    """Every tensor of `subspaces` once, and all else, which JSON can hold."""
    tensors: dict[str, Tensor] = {}
    layers: Header = {}
    memory = subspaces.memory_of_tasks
    for name, layer in subspaces.items():
        layers[name] = {"shape": list(layer.shape)} | {field: getattr(layer, field) for field in _FIELDS}
        bases = (layer.left_basis, layer.right_basis)
        for side, basis, protected in zip(("left", "right"), bases, layer.protected_dims, strict=True):
            if basis is not None:
                width = layer.rank if memory is None else protected
                layers[name][side] = {"form": basis.form, "protected": width}
                tensors[f"{name}:{side}"] = basis.columns
                if basis.correction is not None:
                    tensors[f"{name}:{side}:correction"] = basis.correction
        if name in sketches:
            tensors[f"{name}:sketch"] = sketches[name]
        if memory is not None:
            remembered = memory.remembered[name]
            layers[name]["input_side"] = remembered.input_side
            tensors |= {f"{name}:remembered:{part}": basis for part, basis in remembered.tensors().items()}
            if name in memory.start_weights:
                tensors[f"{name}:start"] = memory.start_weights[name]
            if name in memory.start_sketches:
                tensors[f"{name}:start sketch"] = memory.start_sketches[name]
    # Layers that get the same input share a basis.
    first: dict[int, str] = {}
    same = {key: first[id(tensor)] for key, tensor in tensors.items() if first.setdefault(id(tensor), key) != key}
    header = {
        "layers": layers,
        "same": same,
        "unprotected": [asdict(group) for group in subspaces.unprotected],
        "importance": subspaces.importance,
        "remembers": memory is not None,
        "remembered_shares": subspaces.remembered_shares(),
    }
    return {key: tensor for key, tensor in tensors.items() if key not in same}, header


def unpack(tensors: Mapping[str, Tensor], header: Header, source: Path | str) -> Parts:
    """What `pack` has taken apart; ValueError, naming the `source`, if it does not go together."""
    with _whole(source):
        return _unpack(tensors, header, source)


@contextmanager
def _whole(source: Path | str) -> Iterator[None]:
    """Of a header that lacks something the error names the file."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source}: its header is not one of subspaces: {error!r}") from error


def _unpack(tensors: Mapping[str, Tensor], header: Header, source: Path | str) -> Parts:
    from .subspaces import Parts, Unprotected

    tensors = {**tensors, **{key: tensors[first] for key, first in header["same"].items()}}
    bases: dict[int, Basis] = {}
    layers = {name: _layer(source, name, fields, tensors, bases) for name, fields in header["layers"].items()}
    sketches = {name: _sketch(source, name, layers[name], tensors) for name in layers if f"{name}:sketch" in tensors}
    unprotected = [Unprotected(**group) for group in header["unprotected"]]
    memory = None
    if header["remembers"]:
        remembered = {
            name: Remembered(
                input_side=fields["input_side"],
                **{part: tensors.get(f"{name}:remembered:{part}") for part in _REMEMBERED},
            )
            for name, fields in header["layers"].items()
        }
        starts, sketched = (
            {name: tensors[f"{name}:{kind}"] for name in layers if f"{name}:{kind}" in tensors}
            for kind in ("start", "start sketch")
        )
        memory = Memory(remembered, starts, sketched)
    shares = header.get("remembered_shares")
    if shares is None:
        # An older file knows the last alone.
        shares = {name: [last] for name, last in header["remembered_share"].items()}
    return Parts(layers, sketches, unprotected, header["importance"], memory, shares)


def _sketch(source: Path | str, name: str, layer: LayerSubspace, tensors: dict[str, Tensor]) -> Tensor:
    sketch, wanted = tensors[f"{name}:sketch"], sketch_shape(layer)
    if tuple(sketch.shape) != wanted:
        raise ValueError(f"{source}: the sketch of {name} has shape {tuple(sketch.shape)}, wanted {wanted}")
    return sketch


def _layer(
    source: Path | str, name: str, fields: Header, tensors: Mapping[str, Tensor], bases: dict[int, Basis]
) -> LayerSubspace:
    m, n = fields["shape"]
    left, right = (_basis(source, name, side, d, fields, tensors, bases) for side, d in (("left", m), ("right", n)))
    if left is None and right is None:
        raise ValueError(f"{source}: {name} has no basis")
    return LayerSubspace(
        shape=(m, n), left_basis=left, right_basis=right, **{field: fields[field] for field in _FIELDS}
    )


def _basis(
    source: Path | str,
    name: str,
    side: str,
    length: int,
    fields: Header,
    tensors: Mapping[str, Tensor],
    bases: dict[int, Basis],
) -> Basis | None:
    """bases: those made so far, by the `id` of their columns."""
    if side not in fields:
        return None
    form, protected = fields[side]["form"], fields[side]["protected"]
    columns = tensors.get(f"{name}:{side}")
    if form not in _FORMS:
        raise ValueError(
            f"{source}: the {side} basis of {name} has the form {form!r}, wanted one of {', '.join(_FORMS)}"
        )
    width = length - protected if form == "free" else protected
    given = None if columns is None else tuple(columns.shape)
    if columns is None or given != (length, width):
        raise ValueError(f"{source}: the {side} basis of {name} has shape {given}, wanted {(length, width)}")
    correction = tensors.get(f"{name}:{side}:correction")
    given = None if correction is None else tuple(correction.shape)
    wanted = (width, width) if columns.element_size() == 2 else None
    if given != wanted:
        raise ValueError(f"{source}: the correction of the {side} basis of {name} has shape {given}, wanted {wanted}")
    return bases.setdefault(id(columns), Basis(columns, form, correction))

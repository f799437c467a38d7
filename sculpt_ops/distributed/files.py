"""One safetensors file of several ranks: each writes its own tensors into its own place, and reads what it needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..dtensor import is_dtensor
from ..names import canonical_parameters
from ..storage import load_subspaces
from ..tensor_file import DTYPES
from .agreement import Ranks
from .exchange import assign_owners
from .sharding import is_split, sharding_of

if TYPE_CHECKING:
    from ..subspaces import Parts

__all__ = ["read_own", "write_together"]


def write_together(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], ranks: Ranks) -> None:
    """Write `tensors`, the same names in the same order on every rank: those of a rank that are not on the meta device
    are written by it, those of several by the first. All ranks must see the same folder. Collective.

    The file gets its name once it is whole; what one rank raises, all raise.
    """
    held = ranks.share("save", [not tensor.is_meta for tensor in tensors.values()])
    writers = [column.index(True) for column in zip(*held, strict=True)]
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    offsets = []
    end = 0
    for name, tensor in tensors.items():
        offsets.append(end)
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offsets[-1], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    # Of weights that are sharded in several groups, each writes the same: in files of their own until they are whole.
    temporary = path.with_name(f".{path.name}.{dist.get_global_rank(ranks.group, 0)}.writing")

    def begin() -> None:
        if ranks.rank == 0:
            with temporary.open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                file.truncate(start + end)

    def fill() -> None:
        with temporary.open("r+b") as file:
            for writer, offset, tensor in zip(writers, offsets, tensors.values(), strict=True):
                if writer == ranks.rank and tensor.numel():
                    file.seek(start + offset)
                    file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())

    def finish() -> None:
        if ranks.rank == 0:
            temporary.replace(path)

    try:
        for work in (begin, fill, finish):
            ranks.together("save", work)
    finally:
        if ranks.rank == 0:
            temporary.unlink(missing_ok=True)


def read_own(path: Path, model: nn.Module) -> Parts:
    """`load_subspaces` of a sharded model: of each basis the owner alone reads it. What one rank raises, all raise."""
    parameters, aliases = canonical_parameters(model)
    parameters |= {alias: parameters[name] for alias, name in aliases.items()}
    split = {n: sharding_of(n, p).ranks for n, p in parameters.items() if is_dtensor(p) and is_split(p)}
    if not split:
        return load_subspaces(path)

    def own(shapes: Mapping[str, tuple[int, int]]) -> set[str]:
        # By the matrices in the file: the model's first parameter may be on another mesh.
        ranks = next((split[name] for name in shapes if name in split), None)
        if ranks is None:
            return set(shapes)
        owners = assign_owners(list(shapes.values()), ranks.size)
        return {name for name, owner in zip(shapes, owners, strict=True) if owner == ranks.rank}

    parts: Parts = next(iter(split.values())).each("load", lambda: load_subspaces(path, own))
    return parts

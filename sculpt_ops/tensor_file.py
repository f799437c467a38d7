"""Tensors and a JSON header in one safetensors file, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .files import replacing

if TYPE_CHECKING:
    from .distributed.agreement import Ranks

__all__ = ["DTYPES", "FileFormat"]

# As safetensors calls those that are written here.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class FileFormat:
    """key: of the header in the file's metadata. version: the one written, and the only one read.
    content, writer: "subspaces" and "Subspaces.save", for messages."""

    key: str
    version: int
    content: str
    writer: str

    def write(
        self, path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], ranks: Ranks | None = None
    ) -> None:
        """Write to a temporary file beside `path`, then rename it: a crash leaves what was there before.

        ranks: of several, each writes into the one file the tensors that it has; the others are on its meta device.
        """
        safetensors = self._safetensors("saving")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
        metadata = {self.key: json.dumps({"version": self.version, **header})}
        if ranks is not None:
            from .distributed.files import write_together

            return write_together(path, tensors, metadata, ranks)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with replacing(path, shared=True) as temporary:
            safetensors.torch.save_file(contiguous, temporary, metadata=metadata)

    def read(
        self, path: Path, wanted: Callable[[str], bool] = lambda key: True
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, on the CPU, and header of what `write` wrote; ValueError for a truncated or foreign file, OSError if
        it cannot be read. Tensors that are not `wanted` are not read and come on the meta device."""
        safetensors = self._safetensors("loading")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {
                    key: file.get_tensor(key) if wanted(key) else _without_values(file.get_slice(key))
                    for key in file.keys()  # noqa: SIM118 (not a mapping)
                }
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
        if self.key not in metadata:
            raise ValueError(f"{path} was not written by {self.writer}: its header has no {self.key!r}")
        try:
            header: dict[str, Any] = json.loads(metadata[self.key])
            version = header["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: its header is damaged: {error!r}") from error
        if version != self.version:
            raise ValueError(f"{path} has format version {version}, this release reads version {self.version}")
        return tensors, header

    def _safetensors(self, action: str) -> Any:
        """The library, which only saving and loading need."""
        try:
            import safetensors.torch
        except ImportError as error:
            raise ImportError(f"{action} {self.content} needs safetensors: pip install 'sculpt-ops[train]'") from error
        return safetensors


def _without_values(part: Any) -> Tensor:
    return torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")

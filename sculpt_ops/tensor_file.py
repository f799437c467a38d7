"""Tensors and a JSON header in one safetensors file, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["FileFormat"]


@dataclass(frozen=True)
class FileFormat:
    """key: of the header in the file's metadata. version: the one written, and the only one read.
    content, writer: "subspaces" and "Subspaces.save", for messages."""

    key: str
    version: int
    content: str
    writer: str

    def write(self, path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Write to a temporary file beside `path`, then rename it: a crash leaves what was there before."""
        safetensors = self._safetensors("saving")
        metadata = {self.key: json.dumps({"version": self.version, **header})}
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            safetensors.torch.save_file(contiguous, temporary, metadata=metadata)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, on the CPU, and header of what `write` wrote; ValueError for a truncated or foreign file, OSError if
        it cannot be read."""
        safetensors = self._safetensors("loading")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
        if self.key not in metadata:
            raise ValueError(f"{path} was not written by {self.writer}: its header has no {self.key!r}")
        header: dict[str, Any] = json.loads(metadata[self.key])
        if header["version"] != self.version:
            raise ValueError(
                f"{path} has format version {header['version']}, this release reads version {self.version}"
            )
        return tensors, header

    def _safetensors(self, action: str) -> Any:
        """The library, which only saving and loading need."""
        try:
            import safetensors.torch
        except ImportError as error:
            raise ImportError(f"{action} {self.content} needs safetensors: pip install 'sculpt-ops[train]'") from error
        return safetensors

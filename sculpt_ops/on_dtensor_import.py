"""Registers the DTensor rules of the ops when `torch.distributed.tensor` is imported, before or after this package.

Importing it takes 0.55 s, as long as all of the package, and most programs have no use for it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["register_rules"]

_MODULE = "torch.distributed.tensor"


def register_rules() -> None:
    """Now if DTensors can exist already, otherwise once they can."""
    if _MODULE in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Watch())


def _register() -> None:
    from .distributed import op_rules  # noqa: F401


class _Watch(MetaPathFinder):
    """Leaves the import to the other finders, and has the rules registered after the module has run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        loader, run = spec.loader, spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            del loader.exec_module
            sys.meta_path.remove(self)
            _register()

        loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec

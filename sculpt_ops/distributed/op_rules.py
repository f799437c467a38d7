"""Teaches `torch.ops.sculpt.*` about DTensors: importing this module registers a rule for every op.

A rule runs below the op's Autograd kernel, which has checked shapes, dtypes and flags of the whole matrices. It works
on this rank's parts with the kernels of one rank, and sums or exchanges what is split over the ranks. All ranks of the
mesh call an op together; on a rank outside it that is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..ops.library import LIBRARY
from . import op_decompose, op_orthonormalize, op_project, op_rounding

__all__: list[str] = []

_RULES: dict[str, Callable[..., Any]] = {
    "project": op_project.project,
    "project_": op_project.project_,
    "foreach_project_": op_project.foreach_project_,
    "restore_": op_project.restore_,
    "test_matrix": op_decompose.test_matrix,
    "sketch": op_decompose.sketch,
    "orthonormalize": op_orthonormalize.orthonormalize,
    "rsvd": op_decompose.rsvd,
    "_product": op_decompose.product,
    "_gram": op_decompose.gram,
    "_eigh": op_decompose.eigh,
    "_join": op_rounding.join,
    "_split_": op_rounding.split_,
    "_add_split_": op_rounding.add_split_,
    "_round_stochastic_": op_rounding.round_stochastic_,
}


def _register(name: str, rule: Callable[..., Any]) -> None:
    def run(cls: type, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        # Autograd has been served; what the rule does with the parts is not recorded again.
        with torch.no_grad():
            return rule(*args, **(kwargs or {}))

    torch.library.register_torch_dispatch(f"sculpt::{name}", DTensor, run, lib=LIBRARY)


for _name, _rule in _RULES.items():
    _register(_name, _rule)

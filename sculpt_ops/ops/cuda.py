"""Registers the CUDA kernels of the projection ops; ``restore_`` has csrc/linalg/project.cpp on every GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_apart, check_project, check_written
from .foreach_cuda import foreach_into
from .heuristics import triton_missing
from .library import LIBRARY
from .variants import project_into

__all__ = ["triton_missing"]


def _project(
    grad: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
    left_metric: Tensor | None = None,
    right_metric: Tensor | None = None,
    *,
    keep_left: bool = False,
    keep_right: bool = False,
    block: bool = False,
) -> Tensor:
    flags: dict[str, Any] = {"keep_left": keep_left, "keep_right": keep_right, "block": block}
    check_project("project", grad, left, right, left_metric, right_metric, **flags)
    out = torch.empty_like(grad)
    project_into(grad, left, right, out, **flags, left_metric=left_metric, right_metric=right_metric)
    return out


def _project_(
    grad: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
    left_metric: Tensor | None = None,
    right_metric: Tensor | None = None,
    *,
    keep_left: bool = False,
    keep_right: bool = False,
    block: bool = False,
) -> None:
    flags: dict[str, Any] = {"keep_left": keep_left, "keep_right": keep_right, "block": block}
    metrics: dict[str, Any] = {"left_metric": left_metric, "right_metric": right_metric}
    check_project("project_", grad, left, right, **metrics, **flags)
    check_written("project_", "grad", grad)
    check_apart("project_", "grad", grad, left=left, right=right, **metrics)
    project_into(grad, left, right, grad, **flags, op="project_", **metrics)


def _foreach_project_(
    grads: list[Tensor],
    lefts: list[Tensor | None],
    rights: list[Tensor | None],
    left_metrics: list[Tensor | None] | None = None,
    right_metrics: list[Tensor | None] | None = None,
    *,
    keep_lefts: Sequence[bool] = (),
    keep_rights: Sequence[bool] = (),
    block: bool = False,
) -> None:
    foreach_into(grads, lefts, rights, keep_lefts, keep_rights, block, left_metrics or (), right_metrics or ())


LIBRARY.impl("project", _project, "CUDA")
LIBRARY.impl("project_", _project_, "CUDA")
LIBRARY.impl("foreach_project_", _foreach_project_, "CUDA")

"""Rows of the GPU benchmark of single projections: what is asked most comes first, a short run has that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..ops import project_
from ..ops.cuda_limits import why_not_cuda
from ..ops.variants import backend_of, cuda_missing
from .rows import Layers, Row, Setting, basis, each_variant, error_of, expression, library, with_rates, work
from .timing import Contender, copies_beyond_l2, measure

__all__ = ["Case", "cases", "projections"]

RANKS = (64, 16, 128, 512, 2048, 256, 1024, 32)
KINDS = ("left", "both", "right", "block")
HALF, SINGLE = torch.bfloat16, torch.float32
# Rows that have a contender which seldom wins, and which takes time. A short run has no torch.compile, and after a few
# rows no Triton that was not chosen: a second of compiling each.
COMPILED, EXPRESSIONS, SHORT_TRITON = 2, 24, 8


class Case(NamedTuple):
    """basis_dtype: Subspaces stores float32 unless told otherwise."""

    model: str
    m: int
    n: int
    rank: int
    dtype: torch.dtype
    basis_dtype: torch.dtype
    kind: str


def cases(models: dict[str, Layers], small: bool) -> Iterator[Case]:
    """The foremost model's shapes at all ranks up to half the shorter side, then the others', then float32 matrices."""
    first = next(iter(models))
    others = [name for name in models if name != first]
    seen: set[tuple[Any, ...]] = set()
    for dtypes in (((HALF, HALF), (HALF, SINGLE)), ((SINGLE, SINGLE),)):
        for names in ([first], others):
            for rank in (8, 16) if small else RANKS:
                for dtype, basis_dtype in dtypes:
                    for name in names:
                        for m, n in models[name][0]:
                            for kind in KINDS:
                                key = (m, n, rank, dtype, basis_dtype, kind)
                                if rank <= min(m, n) // 2 and key not in seen:
                                    seen.add(key)
                                    yield Case(name, *key)


def projections(setting: Setting, left: Iterator[tuple[int, Case]]) -> Iterator[Row]:
    """Rows of the cases that are left, numbered, until the deadline: a later call goes on with the next."""
    while not setting.over():
        following = next(left, None)
        if following is None:
            return
        yield projection(setting, *following)


def chosen_variant(grad: Tensor, left: Tensor | None, right: Tensor | None, block: bool) -> str:
    """What dispatch runs."""
    if not grad.is_cuda:
        return grad.device.type
    chosen = backend_of(grad, left, right, block)
    if chosen == "cuda" and (cuda_missing() or why_not_cuda(grad, left, right, False, False, block)):
        return "cublas"
    return chosen


def spanned(grads: list[Tensor], left: Tensor | None, right: Tensor | None, block: bool) -> list[Contender]:
    """What protects as well as float32 bases: their rounding, with the metrics that make it an exact projector; also in
    CUDA C++ where it can run, which dispatch does not choose."""
    rounded = [None if b is None else b.to(HALF) for b in (left, right)]
    metrics = [None if b is None else torch.linalg.inv(b.double().mT @ b.double()).float() for b in rounded]
    given: dict[str, Any] = {"block": block, "left_metric": metrics[0], "right_metric": metrics[1]}

    def call(i: int) -> None:
        project_(grads[i], *rounded, **given)

    contenders = [Contender("sculpt, bf16 basis and metric", call)]
    if not grads[0].is_cuda or cuda_missing() is not None:
        return contenders
    if why_not_cuda(grads[0], rounded[0], rounded[1], False, False, block, metrics[0], metrics[1]) is None:
        contenders.append(Contender("sculpt, bf16 basis and metric, cuda", call, "cuda"))
    return contenders


def projection(setting: Setting, index: int, case: Case) -> Row:
    device, (model, m, n, rank, dtype, basis_dtype, kind) = setting.device, case
    left = basis(m, rank, basis_dtype, device) if kind != "right" else None
    right = basis(n, rank, basis_dtype, device) if kind != "left" else None
    block = kind == "block"
    count = copies_beyond_l2(m * n * dtype.itemsize, device)
    grads = [torch.randn(m, n, device=device).to(dtype) for _ in range(count)]
    exact = reference.project(grads[0].double(), *(b if b is None else b.double() for b in (left, right)), block=block)
    error = error_of(lambda: project_(grads[0].clone(), left, right, block=block), exact)
    del exact

    def ours(i: int) -> None:
        project_(grads[i], left, right, block=block)

    chosen = chosen_variant(grads[0], left, right, block)
    triton = not setting.short or chosen == "triton" or index < SHORT_TRITON
    contenders = [
        *each_variant(ours, device, triton),
        Contender("mm + addmm_", lambda i: library(grads[i], left, right, block)),
    ]
    if dtype is HALF and basis_dtype is SINGLE:
        contenders += spanned(grads, left, right, block)
    if index < EXPRESSIONS:
        contenders.append(Contender("expression", lambda i: expression(grads[i], left, right, block)))
    if index < COMPILED and not (setting.short or setting.small):
        fused = torch.compile(expression, fullgraph=True)
        contenders.append(Contender("torch.compile", lambda i: fused(grads[i], left, right, block)))
    moved, operations = work(kind, m, n, rank, dtype.itemsize)
    floor = setting.ceilings.floor(moved, operations, dtype)
    entries = with_rates(measure(contenders, count, device, setting.rounds), floor, moved, operations)
    return {
        "table": "projection",
        "model": model,
        "kind": kind,
        "m": m,
        "n": n,
        "rank": rank,
        "dtype": str(dtype).removeprefix("torch."),
        "basis": str(basis_dtype).removeprefix("torch."),
        "chosen": chosen,
        "floor_us": floor * 1e6,
        "relative_error": error,
        "contenders": entries,
    }

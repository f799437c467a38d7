"""Rows of the GPU benchmark: whole models, decompositions, an optimizer step. Single projections: projections.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..decompose import top_subspace
from ..ops import foreach_project_, rsvd
from ..ops.variants import cuda_missing
from ..optim import AdamW
from ..ranks import Rank
from ..subspaces import Subspaces
from .timing import Ceilings, Contender, measure, synchronize

__all__ = [
    "MODELS",
    "TINY",
    "Row",
    "Setting",
    "basis",
    "decompositions",
    "models",
    "optimizer_step",
    "small_svds",
]

Row = dict[str, Any]
Layers = tuple[tuple[tuple[int, int], ...], int]

# (rows, columns) of the matrices of a layer, and layers. T5-Large: of its encoder and decoder alike.
MODELS: dict[str, Layers] = {
    "LLaMA-2-7B": ((*[(4096, 4096)] * 4, (11008, 4096), (11008, 4096), (4096, 11008)), 32),
    "LLaMA-2-13B": ((*[(5120, 5120)] * 4, (13824, 5120), (13824, 5120), (5120, 13824)), 40),
    "LLaMA-2-70B": ((*[(8192, 8192)] * 2, (1024, 8192), (1024, 8192), (28672, 8192), (28672, 8192), (8192, 28672)), 80),
    "T5-Large": ((*[(1024, 1024)] * 4, (4096, 1024), (1024, 4096)), 48),
    "SmolLM2-135M": ((*[(576, 576)] * 2, (192, 576), (192, 576), (1536, 576), (1536, 576), (576, 1536)), 30),
}
TINY: dict[str, Layers] = {"tiny": (((64, 64), (96, 64)), 2)}


@dataclass
class Setting:
    """small: sizes for a dry run. deadline: of time.monotonic(); what has not begun by then is left out.

    short: there is no time for contenders that compile every row anew, or take seconds.
    """

    device: torch.device
    ceilings: Ceilings
    small: bool
    deadline: float
    short: bool = False

    def over(self) -> bool:
        return time.monotonic() > self.deadline

    @property
    def rounds(self) -> int:
        return 2 if self.small else 5

    @property
    def models(self) -> dict[str, Layers]:
        return TINY if self.small else MODELS


def basis(rows: int, rank: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    columns: Tensor = torch.linalg.qr(torch.randn(rows, rank, device=device))[0]
    return columns.to(dtype).contiguous()


def expression(grad: Tensor, left: Tensor | None, right: Tensor | None, block: bool) -> Tensor:
    """What one writes first. A float32 basis wants a float32 copy of a half-precision matrix."""
    given, wide = grad, left if left is not None else right
    assert wide is not None
    grad = grad.to(wide.dtype)
    if block:
        assert left is not None
        assert right is not None
        grad = grad - left @ (left.mT @ grad @ right) @ right.mT
    else:
        if left is not None:
            grad = grad - left @ (left.mT @ grad)
        if right is not None:
            grad = grad - (grad @ right) @ right.mT
    return grad if grad.dtype == given.dtype else given.copy_(grad)


def library(grad: Tensor, left: Tensor | None, right: Tensor | None, block: bool) -> None:
    """mm + addmm_, one side after the other; with a float32 basis on a float32 copy of a half-precision matrix."""
    given, wide = grad, left if left is not None else right
    assert wide is not None
    grad = grad.to(wide.dtype)
    if block:
        assert left is not None
        assert right is not None
        grad.addmm_(left @ ((left.mT @ grad) @ right), right.mT, alpha=-1)
    else:
        if left is not None:
            grad.addmm_(left, left.mT @ grad, alpha=-1)
        if right is not None:
            grad.addmm_(grad @ right, right.mT, alpha=-1)
    if grad is not given:
        given.copy_(grad)


def work(kind: str, m: int, n: int, r: int, itemsize: int) -> tuple[float, float]:
    """Least bytes and operations: one side a read and a write, two sides another read first."""
    passes = 2 if kind in ("left", "right") else 3
    return float(passes * m * n * itemsize), 4.0 * m * n * r * (2 if kind == "both" else 1)


def with_rates(entries: dict[str, Row], floor: float, moved: float, operations: float) -> dict[str, Row]:
    for entry in entries.values():
        if "us" in entry:
            seconds = entry["us"] * 1e-6
            entry["bytes_per_s"], entry["flop_per_s"] = moved / seconds, operations / seconds
            entry["share_of_floor"] = floor / seconds
    return entries


def each_variant(call: Callable[[int], Any], device: torch.device, triton: bool = True) -> list[Contender]:
    """What dispatch chooses, and every variant by itself; one that cannot run says so in its entry."""
    variants = ["triton"] * triton + ["cublas"] + (["cuda"] if device.type == "cuda" and cuda_missing() is None else [])
    return [Contender("sculpt", call), *(Contender(f"sculpt, {name}", call, name) for name in variants)]


def error_of(call: Callable[[], Tensor], exact: Tensor) -> float:
    return float((call().double() - exact).norm() / exact.norm())


def fitting_layers(
    shapes: tuple[tuple[int, int], ...], layers: int, bytes_an_element: int, device: torch.device
) -> int:
    """As many layers of a model as 70 % of the free memory holds."""
    if device.type != "cuda":
        return layers
    free = torch.cuda.mem_get_info(device)[0] * 0.7
    return max(1, min(layers, int(free // (sum(m * n for m, n in shapes) * bytes_an_element))))


def models(setting: Setting) -> Iterator[Row]:
    """foreach_project_ over whole models: host time of a repeated call, and time on the device."""
    large, small, middle = "LLaMA-2-7B", "SmolLM2-135M", "T5-Large"
    half, single = torch.bfloat16, torch.float32
    ranks = ((large, 64), (small, 64), (middle, 64), (large, 16))
    # Subspaces stores float32 bases unless told otherwise.
    cases = (*((*case, half) for case in ranks), *((*case, single) for case in ranks[:2]), (large, 512, half))
    for name, rank, basis_dtype in (("tiny", 8, half),) if setting.small else cases:
        for kind in ("both", "left"):
            if setting.over():
                return
            yield whole_model(setting, name, rank, kind, basis_dtype)


def whole_model(setting: Setting, name: str, rank: int, kind: str, basis_dtype: torch.dtype) -> Row:
    device, dtype = setting.device, torch.bfloat16
    shapes, layers = setting.models[name]
    layers = fitting_layers(shapes, layers, 3, device)
    sizes = [shape for _ in range(layers) for shape in shapes]
    grads = [torch.randn(m, n, device=device).to(dtype) for m, n in sizes]
    # A QR a length, and memory of its own a matrix.
    of_length = {rows: basis(rows, rank, basis_dtype, device) for rows in {size for shape in shapes for size in shape}}
    lefts = [of_length[m].clone() for m, _ in sizes]
    rights = [of_length[n].clone() if kind == "both" else None for _, n in sizes]

    def each(call: Callable[..., Any]) -> Callable[[int], None]:
        def run(_: int) -> None:
            for grad, left, right in zip(grads, lefts, rights, strict=True):
                call(grad, left, right, False)

        return run

    contenders = [
        *each_variant(lambda _: foreach_project_(grads, lefts, rights), device),
        Contender("mm + addmm_", each(library)),
        Contender("expression", each(expression)),
    ]
    entries = measure(contenders, 1, device, setting.rounds)
    amounts = [work(kind, m, n, rank, dtype.itemsize) for m, n in sizes]
    moved, operations = (sum(parts) for parts in zip(*amounts, strict=True))
    host = host_seconds(lambda: foreach_project_(grads, lefts, rights), device)
    floor = setting.ceilings.floor(moved, operations, dtype)
    return {
        "table": "model",
        "model": name,
        "matrices": len(grads),
        "kind": kind,
        "rank": rank,
        "dtype": "bfloat16",
        "basis": str(basis_dtype).removeprefix("torch."),
        "floor_us": floor * 1e6,
        "host_us": host * 1e6,
        "contenders": with_rates(entries, floor, moved, operations),
    }


def host_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Until the call returns, of repeated calls the median: the first after others finds nothing of its own in the
    processor's caches."""
    seconds = []
    for _ in range(9):
        synchronize(device)
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    synchronize(device)
    return statistics.median(seconds)


def contender_of(name: str, call: Callable[[], Any]) -> Contender:
    return Contender(name, lambda _: call(), once=name.startswith("torch.linalg"))


def decompositions(setting: Setting) -> Iterator[Row]:
    """rsvd and top_subspace against torch's, a few rounds each: a full SVD takes seconds."""
    for m, n, rank in ((96, 64, 8),) if setting.small else ((4096, 4096, 128), (1024, 1024, 512), (4096, 11008, 128)):
        if setting.over():
            return
        matrix, q = torch.randn(m, n, device=setting.device), rank
        calls: dict[str, Callable[[], Any]] = {
            "sculpt.rsvd": partial(rsvd, matrix, q),
            "sculpt.top_subspace": partial(top_subspace, matrix, q),
            "torch.svd_lowrank": partial(torch.svd_lowrank, matrix, q + 16),
            "torch.linalg.svd": partial(torch.linalg.svd, matrix, full_matrices=False),
        }
        if setting.short and min(m, n) > 1024:
            del calls["torch.linalg.svd"]
        contenders = [contender_of(name, call) for name, call in calls.items()]
        entries = measure(contenders, 1, setting.device, 3)
        # Reading the matrix once for the sketch and twice for each of two power iterations.
        moved, operations = 5.0 * m * n * 4, 10.0 * m * n * (rank + 16)
        floor = setting.ceilings.floor(moved, operations, torch.float32)
        yield {
            "table": "decomposition",
            "m": m,
            "n": n,
            "rank": rank,
            "dtype": "float32",
            "floor_us": floor * 1e6,
            "contenders": with_rates(entries, floor, moved, operations),
        }


def small_svds(setting: Setting) -> Iterator[Row]:
    """The small factors of rsvd over a model's layers, rank 64 and 128: the Jacobi kernel, where it was built, against
    the library's SVD and the eigendecomposition of Gram matrices, which loses half of the digits."""
    if setting.device.type != "cuda" or cuda_missing() is not None:
        return
    for q in (80, 144):
        if setting.over():
            return
        batch = torch.linalg.qr(torch.randn(224, q, q, device=setting.device))[1]
        calls: dict[str, Callable[[], Any]] = {
            "_cuda_jacobi_svd": partial(torch.ops.sculpt._cuda_jacobi_svd, batch),
            "torch.linalg.svd": partial(torch.linalg.svd, batch),
            "torch.linalg.eigh of the Gram": lambda batch=batch: torch.linalg.eigh(batch.mT @ batch),  # type: ignore[misc]
        }
        contenders = [contender_of(name, call) for name, call in calls.items()]
        entries = measure(contenders, 1, setting.device, 3)
        # A matrix read, two and the values written; a pivoted factor, its Q, and one sweep of rotations on both.
        moved, operations = 224.0 * (3 * q * q + q) * 4, 224.0 * (8 / 3 + 11) * q**3
        floor = setting.ceilings.floor(moved, operations, torch.float32)
        yield {
            "table": "small svd",
            "matrices": 224,
            "m": q,
            "n": q,
            "dtype": "float32",
            "floor_us": floor * 1e6,
            "contenders": with_rates(entries, floor, moved, operations),
        }


def optimizer_step(setting: Setting) -> Iterator[Row]:
    """A step of AdamW on a model's bfloat16 matrices, both sides of rank 64 protected, against torch's fused one."""
    if setting.over():
        return
    name = "tiny" if setting.small else "LLaMA-2-7B"
    shapes, layers = setting.models[name]
    # A quarter of the layers: subspaces of all take longer to find than the steps do to time.
    layers = fitting_layers(shapes, max(1, layers // 4), 16, setting.device)
    rank = 8 if setting.small else 64
    dtype = torch.bfloat16
    model = nn.ModuleList(
        nn.Linear(n, m, bias=False, device=setting.device, dtype=dtype) for _ in range(layers) for m, n in shapes
    )
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    subspaces = Subspaces.from_model(model, protect=Rank(rank), targets="*")
    full = AdamW(model.named_parameters(), lr=1e-5, subspaces=subspaces)
    # Of its own: it puts reflectors in the place of bases.
    turned = Subspaces(dict(subspaces.items()), {}).bind(model)
    compact = AdamW(model.named_parameters(), lr=1e-5, subspaces=turned, state="subspace")
    plain = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=setting.device.type == "cuda")
    contenders = [
        Contender("sculpt.AdamW", lambda _: full.step()),
        Contender("sculpt.AdamW, state=subspace", lambda _: compact.step()),
        Contender("torch.optim.AdamW, fused", lambda _: plain.step()),
    ]
    entries = measure(contenders, 1, setting.device, setting.rounds)
    # Weight and moments read and written, gradient read, in bfloat16.
    moved = 7.0 * 2 * sum(m * n for m, n in shapes) * layers
    floor = setting.ceilings.floor(moved, 0, dtype)
    yield {
        "table": "optimizer",
        "model": name,
        "matrices": len(model),
        "rank": rank,
        "dtype": "bfloat16",
        "floor_us": floor * 1e6,
        "contenders": with_rates(entries, floor, moved, 0.0),
    }

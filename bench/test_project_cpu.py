"""`project_` on the CPU against the best library call, `mm` + `addmm_`, at the shapes of real models.

Interleaved in one run: before every timed round of ours, one round of the library's is timed on the same matrix. The
ratio is the median over rounds of torch / ours, with its quartiles; the table prints the rows we lose.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch
from tables import Row, Table
from torch import Tensor

import sculpt_ops

SHAPES = {
    "LLaMA-2 7B": [(4096, 4096), (11008, 4096), (4096, 11008)],
    "SmolLM2-135M": [(576, 576), (192, 576), (1536, 576), (576, 1536)],
    "T5-Large": [(1024, 1024), (4096, 1024), (1024, 4096)],
}
RANKS = (16, 64, 256, 1024)
CASES = [
    pytest.param(shape, rank, dtype, side, id=f"{model} {shape[0]}x{shape[1]} r{rank} {str(dtype)[6:]} {side}")
    for model, shapes in SHAPES.items()
    for shape in shapes
    for rank in RANKS
    for dtype in (torch.bfloat16, torch.float32)
    for side in ("left", "right")
    if rank <= min(shape)
]


def show(row: Row) -> list[str]:
    shape = "{} x {}".format(*row["shape"])
    times = f"{row['torch_ms']:9.3f} {row['ours_ms']:9.3f}"
    ratio = f"{row['ratio']:6.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
    lost = "  slower" if row["ratio"] < 1 else ""
    return [f"{shape:>14} {row['rank']:>5} {row['dtype']:>9} {row['side']:>6} {times} {ratio:>20}{lost}"]


TABLE = Table(
    file="cpu",
    heading=f"{'shape':>14} {'rank':>5} {'dtype':>9} {'side':>6} {'torch ms':>9} {'ours ms':>9} {'torch / ours':>20}",
    show=show,
)


def library(grad: Tensor, basis: Tensor, side: str) -> None:
    if side == "left":
        grad.addmm_(basis, basis.T @ grad, alpha=-1)
    else:
        grad.addmm_(grad @ basis, basis.T, alpha=-1)


def measure(benchmark: Any, rows: list[Row], torch_call: Any, our_call: Any, rounds: int, **row: Any) -> None:
    """Time both, round by round in turn; pytest-benchmark times ours, its untimed setup times the library's."""
    theirs: list[float] = []

    def before() -> None:
        start = time.perf_counter()
        torch_call()
        theirs.append(time.perf_counter() - start)

    benchmark.pedantic(our_call, setup=before, rounds=rounds, warmup_rounds=2)
    ours = benchmark.stats.stats.data
    ratios = sorted(a / b for a, b in zip(theirs[-len(ours) :], ours, strict=True))
    low, _, high = statistics.quantiles(ratios, n=4)
    measured = {
        **row,
        "torch_ms": statistics.median(theirs[-len(ours) :]) * 1e3,
        "ours_ms": statistics.median(ours) * 1e3,
        "ratio": statistics.median(ratios),
        "ratio_low": low,
        "ratio_high": high,
        "rounds": rounds,
    }
    benchmark.extra_info.update(measured)
    rows.append(measured)


@pytest.mark.parametrize(("shape", "rank", "dtype", "side"), CASES)
def test_project(
    benchmark: Any, rows: list[Row], shape: tuple[int, int], rank: int, dtype: torch.dtype, side: str
) -> None:
    m, n = shape
    grad = torch.randn(m, n).to(dtype)
    basis = torch.linalg.qr(torch.randn(m if side == "left" else n, rank))[0].to(dtype)
    bases = (basis, None) if side == "left" else (None, basis)
    # About two seconds a case: enough rounds to see the spread, few enough for the whole table in ten minutes.
    rounds = max(9, min(200, int(4e11 / (4.0 * m * n * rank))))
    facts = {"shape": list(shape), "rank": rank, "dtype": str(dtype)[6:], "side": side}
    with torch.no_grad():
        measure(
            benchmark,
            rows,
            lambda: library(grad, basis, side),
            lambda: torch.ops.sculpt.project_(grad, *bases),
            rounds,
            **facts,
        )


def test_eager_overhead(benchmark: Any, rows: list[Row]) -> None:
    """A 64 x 64 matrix of rank 8, where the call itself is what costs: at most 15 us more than the library's."""
    grad, basis = torch.randn(64, 64), torch.linalg.qr(torch.randn(64, 8))[0]
    facts = {"shape": [64, 64], "rank": 8, "dtype": "float32", "side": "left"}
    with torch.no_grad():
        measure(
            benchmark,
            rows,
            lambda: library(grad, basis, "left"),
            lambda: torch.ops.sculpt.project_(grad, basis),
            2000,
            **facts,
        )


def test_grouped_call_over_a_model(benchmark: Any, rows: list[Row]) -> None:
    """One `foreach_project_` over SmolLM2-135M's 210 matrices, both sides at half rank, against the library in turn."""
    shapes = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)] * 30
    grads = [torch.randn(s) for s in shapes]
    lefts = [torch.linalg.qr(torch.randn(m, min(m, n) // 2))[0] for m, n in shapes]
    rights = [torch.linalg.qr(torch.randn(n, min(m, n) // 2))[0] for m, n in shapes]

    def in_turn() -> None:
        for grad, left, right in zip(grads, lefts, rights, strict=True):
            library(grad, left, "left")
            library(grad, right, "right")

    facts = {"shape": [210, 1], "rank": 288, "dtype": "float32", "side": "model"}
    assert sculpt_ops.foreach_project_(grads[:1], lefts[:1], rights[:1]) is None
    with torch.no_grad():
        measure(
            benchmark,
            rows,
            in_turn,
            lambda: torch.ops.sculpt.foreach_project_(grads, lefts, rights),
            9,
            **facts,
        )

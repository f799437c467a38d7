"""The one-pass projection's own code on an emulated GPU (tests/cuda/gpu), against float64.

Beside values: every address is in its array and aligned, barriers count what they are told to, products and copies are
waited for and shown to, and whatever order threads, stores and products come in, results are the same to the bit.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from .emulated_gpu import aligned, basis, library, near, pointer, sizes, spanned

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

FLOAT, HALF = torch.float32, torch.bfloat16
KERNEL = "project_side_sm90a"


class Case(NamedTuple):
    """cluster: its blocks, 0 as planned for an H200. clusters: how many the GPU holds at a time."""

    length: int
    extent: int
    r: int
    dtype: torch.dtype
    keep: bool = False
    cluster: int = 0
    clusters: int = 1


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return library(KERNEL, "side", tmp_path_factory.mktemp("side"))


def project(side: ctypes.CDLL, case: Case, right: bool, given: Tensor, U: Tensor, seed: int) -> Tensor:
    grad = aligned(given)
    places = pointer(grad), pointer(U), *sizes(*given.shape, case.r)
    wide = case.dtype == FLOAT
    error = side.side(*places, right, wide, case.keep, case.cluster, case.clusters, seed)
    assert error == 0, side.wrong()
    return grad


def shown(side: ctypes.CDLL, case: Case, right: bool, seeds: range) -> None:
    """Values of noise and, unless it is kept, of what is all taken away; each seed gives the same bits."""
    torch.manual_seed(case.length + case.extent)
    m, n = (case.extent, case.length) if right else (case.length, case.extent)
    U = basis(case.length, case.r, case.dtype)
    grads = [aligned(torch.randn(m, n).bfloat16())]
    grads += [] if case.keep else [spanned(None, U, m, n) if right else spanned(U, None, m, n)]
    for given in grads:
        G, V = given.double(), U.double()
        part = (G @ V) @ V.mT if right else V @ (V.mT @ G)
        outs = [project(side, case, right, given, U, seed) for seed in seeds]
        assert near(outs[0], part if case.keep else G - part, given)
        assert all(torch.equal(out, outs[0]) for out in outs)


def on_both_sides(side: ctypes.CDLL, case: Case, seeds: range) -> None:
    for right in (False, True):
        shown(side, case, right, seeds)


# Panels of 64: six or more for each cluster.
MANY = [
    Case(512, 8 * 64, 16, FLOAT, cluster=8),
    Case(450, 6 * 64 - 3, 7, HALF, keep=True, cluster=8),
    Case(512, 6 * 64, 64, FLOAT, cluster=8),
    Case(449, 6 * 64 - 8, 100, HALF, cluster=8),
    Case(1000, 6 * 64, 16, FLOAT, cluster=16),
    Case(256, 13 * 64, 16, HALF, cluster=4, clusters=2),
    Case(200, 6 * 64 - 1, 40, FLOAT, keep=True, cluster=4),
    Case(256, 6 * 64, 128, HALF, cluster=4),
    Case(128, 9 * 64, 16, FLOAT, cluster=2),
    Case(300, 6 * 64 - 40, 40, HALF, cluster=2),
    Case(64, 6 * 64, 64, FLOAT, keep=True, cluster=1),
    Case(130, 7 * 64 - 5, 7, FLOAT, cluster=1),
    Case(128, 6 * 64, 128, HALF, keep=True, cluster=1),
]


@pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
@pytest.mark.parametrize("case", MANY, ids=str)
def test_many_panels_a_cluster(side: ctypes.CDLL, case: Case, right: bool) -> None:
    shown(side, case, right, range(3))


@pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
@pytest.mark.parametrize("dtype", [HALF, FLOAT], ids=str)
@pytest.mark.parametrize(
    ("m", "n", "ranks"), [(96, 160, (16, 32)), (70, 45, (7, 5)), (130, 600, (40, 70)), (4, 66, (2, 33))]
)
def test_small_shapes_as_an_h200_divides_them(
    side: ctypes.CDLL, m: int, n: int, ranks: tuple[int, int], dtype: torch.dtype, right: bool
) -> None:
    """Those of bench/gpu/small_shapes.py, and next to nothing."""
    length, extent, r = (n, m, ranks[1]) if right else (m, n, ranks[0])
    if dtype == FLOAT and r > 64:
        pytest.skip("a rank above what float32 bases may have")
    for keep in (False, True):
        shown(side, Case(length, extent, r, dtype, keep, clusters=1000), right, range(1))


def test_results_do_not_depend_on_how_many_clusters_run(side: ctypes.CDLL) -> None:
    torch.manual_seed(0)
    given, U = aligned(torch.randn(128, 9 * 64).bfloat16()), basis(128, 16, FLOAT)
    outs = [project(side, Case(128, 9 * 64, 16, FLOAT, False, 2, some), False, given, U, some) for some in (1, 2, 4, 9)]
    assert all(torch.equal(out, outs[0]) for out in outs)


def without(*pieces: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        for piece in pieces:
            assert text.count(piece) == 1, piece
            text = text.replace(piece, "")
        return text

    return change


READ = ("      send(there + (read - barrier), 0u, 0u, there);\n", " + 8 * (RANKS / owned)")


# The first was found on an H200: ranks of 16 came out wrong.
@pytest.mark.parametrize(
    ("missing", "case"),
    [
        (READ, Case(512, 8 * 64, 16, FLOAT, cluster=8)),
        (("    if (block.owns()) wait_for(block.parts_barrier, parity);\n",), Case(256, 6 * 64, 16, HALF, cluster=4)),
        (("    wait_for_groups<NEWER>();\n",), Case(128, 6 * 64, 16, HALF, cluster=2)),
        (("at < m && ",), Case(300, 6 * 64 - 40, 40, HALF, cluster=2)),
    ],
    ids=["word that parts were read", "wait for parts", "wait for copies", "end of the matrix"],
)
def test_what_is_left_out_is_missed(
    missing: tuple[str, ...], case: Case, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The emulation finds such faults: without it the tests above would say little."""
    changed = library(KERNEL, "side", tmp_path_factory.mktemp("changed"), without(*missing))
    with pytest.raises(AssertionError):
        on_both_sides(changed, case, range(8))

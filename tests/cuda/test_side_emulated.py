"""The one-pass projection's own code on an emulated GPU (tests/cuda/gpu), against float64.

Beside values: every address is in its array and aligned, barriers count what they are told to, products and copies are
waited for and shown to, and whatever order threads, stores and products come in, results are the same to the bit.
"""

from __future__ import annotations

import ctypes
import shutil
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sculpt_ops.ops.cuda_limits import BasisForm

from .emulated_gpu import aligned, basis, library, near, pointer, sizes, spanned

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

HALF, FLOAT, METRIC, FLOAT16 = BasisForm
# Of matrices and of bases.
DTYPES = {
    HALF: (torch.bfloat16, torch.bfloat16),
    FLOAT: (torch.bfloat16, torch.float32),
    METRIC: (torch.bfloat16, torch.bfloat16),
    FLOAT16: (torch.float16, torch.float16),
}
KERNEL = "project_side_sm90a"


class Case(NamedTuple):
    """cluster: its blocks, 0 as planned for an H200. width: of a panel. clusters: how many the GPU holds at a time."""

    length: int
    extent: int
    r: int
    form: BasisForm
    keep: bool = False
    cluster: int = 0
    width: int = 32
    clusters: int = 1


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return library(KERNEL, "side", tmp_path_factory.mktemp("side"))


class Thin(NamedTuple):
    """A basis, and a metric that is no more symmetric than a rounded basis is orthonormal: a transposed one is seen."""

    basis: Tensor
    metric: Tensor | None

    @property
    def places(self) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
        return pointer(self.basis), ctypes.c_void_p() if self.metric is None else pointer(self.metric)


def thin(length: int, r: int, form: BasisForm) -> Thin:
    U = basis(length, r, DTYPES[form][1])
    if form != METRIC:
        return Thin(U, None)
    exact = torch.linalg.inv(U.double().mT @ U.double())
    noise = 2**-10 * torch.randn(r, r, dtype=torch.float64) / length**0.5
    return Thin(U, (exact + noise).float().contiguous())


def project(side: ctypes.CDLL, case: Case, right: bool, given: Tensor, U: Thin, seed: int) -> Tensor:
    grad = aligned(given)
    places = pointer(grad), *U.places, *sizes(*given.shape, case.r)
    error = side.side(*places, right, case.form, case.keep, case.cluster, case.width, case.clusters, seed)
    assert error == 0, side.wrong()
    return grad


def shown(side: ctypes.CDLL, case: Case, right: bool, seeds: range) -> None:
    """Values of noise and, unless it is kept, of what is all taken away; each seed gives the same bits."""
    torch.manual_seed(case.length + case.extent)
    m, n = (case.extent, case.length) if right else (case.length, case.extent)
    U = thin(case.length, case.r, case.form)
    dtype = DTYPES[case.form][0]
    grads = [aligned(torch.randn(m, n).to(dtype))]
    sides = (None, U.basis) if right else (U.basis, None)
    grads += [] if case.keep else [spanned(*sides, m, n, dtype)]
    for given in grads:
        G, V = given.double(), U.basis.double()
        coefficients = G @ V if right else V.mT @ G
        if U.metric is not None:
            coefficients = coefficients @ U.metric.double() if right else U.metric.double() @ coefficients
        rounded = coefficients.to(dtype).double() if case.form in (HALF, FLOAT16) else coefficients
        part, expected = (C @ V.mT if right else V @ C for C in (coefficients, rounded))
        outs = [project(side, case, right, given, U, seed) for seed in seeds]
        exact, expected = (part, expected) if case.keep else (G - part, G - expected)
        assert near(outs[0], exact, given, expected)
        assert all(torch.equal(out, outs[0]) for out in outs)


def on_both_sides(side: ctypes.CDLL, case: Case, seeds: range) -> None:
    for right in (False, True):
        shown(side, case, right, seeds)


# More panels for each cluster than are in its shared memory at a time, or edges.
MANY = [
    Case(512, 14 * 32, 16, FLOAT, cluster=8),
    Case(456, 6 * 32 - 8, 7, HALF, keep=True, cluster=8),
    Case(512, 15 * 16, 64, FLOAT, cluster=8, width=16),
    Case(472, 6 * 32 - 8, 100, HALF, cluster=8),
    Case(1000, 6 * 32, 16, FLOAT, cluster=16),
    Case(256, 27 * 32, 16, HALF, cluster=4, clusters=2),
    Case(200, 6 * 32 - 8, 40, FLOAT, keep=True, cluster=4),
    Case(256, 14 * 32, 128, HALF, cluster=4),
    Case(128, 9 * 32, 16, FLOAT, cluster=2),
    Case(304, 14 * 16 - 8, 40, HALF, cluster=2, width=16),
    Case(136, 7 * 32 - 8, 7, FLOAT, cluster=2, width=16),
    Case(40, 3 * 32, 33, FLOAT, keep=True, cluster=2),
    Case(1200, 5 * 32, 64, HALF, cluster=4),
    Case(512, 14 * 32, 16, METRIC, cluster=8),
    Case(200, 6 * 32 - 8, 40, METRIC, keep=True, cluster=4),
    Case(472, 6 * 32 - 8, 100, METRIC, cluster=8),
    Case(304, 14 * 16 - 8, 31, METRIC, cluster=2, width=16),
    Case(640, 7 * 16, 128, METRIC, cluster=4, width=16),
    Case(512, 14 * 32, 16, FLOAT16, cluster=8),
    Case(472, 6 * 32 - 8, 100, FLOAT16, keep=True, cluster=8),
    Case(304, 14 * 16 - 8, 40, FLOAT16, cluster=2, width=16),
]


@pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
@pytest.mark.parametrize("case", MANY, ids=str)
def test_many_panels_a_cluster(side: ctypes.CDLL, case: Case, right: bool) -> None:
    shown(side, case, right, range(3))


@pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
@pytest.mark.parametrize("form", BasisForm, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "ranks"), [(96, 160, (16, 32)), (70, 48, (7, 5)), (130, 600, (40, 70)), (4, 72, (2, 33))]
)
def test_small_shapes_as_an_h200_divides_them(
    side: ctypes.CDLL, m: int, n: int, ranks: tuple[int, int], form: BasisForm, right: bool
) -> None:
    """Like those of bench/gpu/small_shapes.py, and next to nothing."""
    length, extent, r = (n, m, ranks[1]) if right else (m, n, ranks[0])
    if form == FLOAT and r > 64:
        pytest.skip("a rank above what float32 bases may have")
    for keep in (False, True):
        shown(side, Case(length, extent, r, form, keep, clusters=1000), right, range(1))


def test_results_do_not_depend_on_how_many_clusters_run(side: ctypes.CDLL) -> None:
    torch.manual_seed(0)
    given, U = aligned(torch.randn(128, 9 * 32).bfloat16()), thin(128, 16, FLOAT)
    cases = {some: Case(128, 9 * 32, 16, FLOAT, False, 2, 32, some) for some in (1, 2, 4, 9)}
    outs = [project(side, case, False, given, U, some) for some, case in cases.items()]
    assert all(torch.equal(out, outs[0]) for out in outs)


class Given(ctypes.Structure):
    """A matrix of a list, as tests/cuda/gpu/side.cpp takes it."""

    _fields_ = [*((x, ctypes.c_void_p) for x in ("grad", "basis", "metric")), *((x, ctypes.c_int64) for x in "mnrk")]


@pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
@pytest.mark.parametrize(
    ("form", "cluster", "width", "clusters"),
    [
        (HALF, 4, 32, 1),
        (FLOAT, 2, 16, 3),
        (HALF, 4, 16, 2),
        (HALF, 2, 32, 5),
        (METRIC, 4, 32, 1),
        (METRIC, 2, 16, 3),
        (FLOAT16, 2, 32, 2),
    ],
)
def test_a_list_is_as_its_matrices_alone(
    side: ctypes.CDLL, form: BasisForm, cluster: int, width: int, clusters: int, right: bool
) -> None:
    torch.manual_seed(cluster)
    shapes = [(200, 104, 16), (256, 8, 64), (56, 200, 5), (232, 400, 33), (8, 40, 3)]
    bases = [thin(length, r, form) for length, _, r in shapes]
    noise = [torch.randn(extent, length) if right else torch.randn(length, extent) for length, extent, _ in shapes]
    grads = [aligned(grad.to(DTYPES[form][0])) for grad in noise]
    alone = []
    for i, (length, extent, r) in enumerate(shapes):
        case = Case(length, extent, r, form, i == 1, 2, width)
        alone.append(project(side, case, right, grads[i], bases[i], 0))
    for seed in range(3):
        outs = [aligned(grad) for grad in grads]
        entries = [
            Given(pointer(out), *U.places, *out.shape, shape[2], i == 1)
            for i, (out, U, shape) in enumerate(zip(outs, bases, shapes, strict=True))
        ]
        array = (Given * len(entries))(*entries)
        error = side.sides(array, *sizes(len(entries)), right, form, cluster, width, clusters, seed)
        assert error == 0, side.wrong()
        # The number of blocks decides the order of sums.
        for out, one in zip(outs, alone, strict=True):
            assert (
                torch.equal(out, one)
                if cluster == 2
                else float((out.double() - one.double()).norm()) <= 2e-3 * float(one.double().norm())
            )


# A statement of the kernel that it cannot do without, and where that shows.
NEEDED = {
    "all have read": ("      __syncwarp();  // all have read\n", Case(512, 30 * 32, 16, HALF, cluster=8)),
    "what was there is used": (
        "          if (half == 0 && seen++ >= size.stages) wait_for(side.used(stage.at), stage.phase ^ 1);\n",
        Case(128, 20 * 32, 16, HALF, cluster=2),
    ),
    "wait for parts": (
        "        wait_for_others(side.parts_full(stage.at), stage.phase);\n",
        Case(256, 6 * 32, 16, HALF, cluster=4),
    ),
    "wait for stores": ("        wait_for_reads<0>();\n", Case(128, 20 * 32, 16, HALF, cluster=2)),
    "wait for a slot": (
        "        if (seen++ >= size.slots) wait_for(side.empty(slot.at), slot.phase ^ 1);\n",
        Case(128, 20 * 32, 16, HALF, cluster=2),
    ),
    "fence": ("        show_to_async();  // the stores of others\n", Case(128, 6 * 32, 16, HALF, cluster=2)),
    "wait for the basis": (
        "        meet(kBasisBarrier, kBasisThreads);  // U is there\n",
        Case(128, 6 * 32, 16, METRIC, cluster=2),
    ),
}
# The sanitizer's check of addresses would take `left_out` for one of the kernel's own.
SWITCH = """
extern "C" int left_out;
int left_out = -1;
__attribute__((noinline, no_sanitize("thread"))) static bool has(int statement) { return statement != left_out; }
"""


def switched(text: str) -> str:
    """The kernel with those statements under `has`: one library for all of them, which takes 16 s to compile."""
    for i, (statement, _) in enumerate(NEEDED.values()):
        assert text.count(statement) == 1, statement
        at = len(statement) - len(statement.lstrip())
        text = text.replace(statement, f"{statement[:at]}if (has({i})) {{ {statement[at:-1]}\n}}\n")
    return SWITCH + text


@pytest.fixture(scope="module")
def switchable(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return library(KERNEL, "side", tmp_path_factory.mktemp("switchable"), switched)


@pytest.mark.parametrize("missing", NEEDED)
def test_what_is_left_out_is_missed(switchable: ctypes.CDLL, missing: str) -> None:
    """The emulation finds such faults: without it the tests above would say little."""
    left_out, case = ctypes.c_int.in_dll(switchable, "left_out"), NEEDED[missing][1]
    left_out.value = -1
    on_both_sides(switchable, case, range(2))
    left_out.value = list(NEEDED).index(missing)
    with pytest.raises(AssertionError):
        on_both_sides(switchable, case, range(8))

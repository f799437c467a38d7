"""Compiles the launches of every op for GPUs that are not there: code produced, shared memory, spills, tensor cores.

What a launcher would launch is recorded on meta tensors, so that the tile sizes, strides and options are its own.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[2] / "bench" / "gpu"))

from triton_binaries import (
    ELEMENTWISE,
    GROUPED,
    KERNELS,
    PARTS,
    TARGETS,
    Binary,
    Launch,
    compiled,
    plan,
    plan_grouped,
    plan_parts,
    recording,
)

from sculpt_ops.triton_kernels import launch, philox, rounding, split_parts
from sculpt_ops.triton_kernels.panels import max_rank

pytestmark = pytest.mark.skipif(launch.INTERPRET, reason="TRITON_INTERPRET is set: nothing is compiled")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

# ptxas gives up a few bytes (8 to 24 were seen) to stay at 64 or 128 registers, where one more program fits.
SPILL_BYTES = 32


def assert_fits(entry: Launch, target: str, spill_bytes: int = SPILL_BYTES) -> Binary:
    binary = compiled(entry, TARGETS[target].gpu)
    assert binary.code.startswith(b"\x7fELF")
    assert binary.shared <= TARGETS[target].shared_bytes, entry
    assert binary.spilled <= spill_bytes, entry
    return binary


ONE_SIDE, TWO_SIDES = ("left", "keep", "right"), ("both", "block")


# Every pair of dtypes on one target, the two that differ most on the others: a launch takes about a second to compile.
PAIRS = [("sm_90", BF16, F32), ("sm_90", F16, F16), *((t, d, d) for t in TARGETS for d in (BF16, F32))]


@pytest.mark.parametrize(("target", "dtype", "basis"), PAIRS)
def test_largest_rank_compiles_without_spills(target: str, dtype: torch.dtype, basis: torch.dtype) -> None:
    is_hip = TARGETS[target].device.is_hip
    launches = plan(ONE_SIDE, 4096, 11008, max_rank(dtype, basis, is_hip), dtype, basis, target)
    launches += plan(TWO_SIDES, 4096, 11008, max_rank(dtype, F32, is_hip), dtype, basis, target)
    assert {entry.kernel for entry in launches} == set(KERNELS)
    for entry in launches:
        assert_fits(entry, target)


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 40960)])
def test_small_ranks_and_wide_panels_compile_without_spills(rank: int, shape: tuple[int, int]) -> None:
    for entry in plan((*ONE_SIDE, *TWO_SIDES), *shape, rank, BF16, BF16, "sm_90"):
        assert_fits(entry, "sm_90")


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_sizes_that_are_not_aligned_compile(target: str) -> None:
    """Loads element by element need more registers: some of it may go to the stack."""
    for entry in plan((*ONE_SIDE, *TWO_SIDES), 199, 1127, 33, BF16, BF16, target):
        assert_fits(entry, target, spill_bytes=256)


@pytest.mark.parametrize(("dtype", "basis"), [(BF16, BF16), (BF16, F32)])
def test_bfloat16_products_run_on_tensor_cores(dtype: torch.dtype, basis: torch.dtype) -> None:
    for entry in plan((*ONE_SIDE, *TWO_SIDES), 4096, 11008, 128, dtype, basis, "sm_90"):
        instructions = re.findall(r"(?:wgmma\.mma_async|mma\.sync)\S*", compiled(entry, TARGETS["sm_90"].gpu).assembly)
        assert instructions, entry
        # The thin factor L core is wholly fp32; nothing that touches G is.
        if dict(entry.signature)["grad_ptr"] == "*bf16":
            assert all("bf16" in instruction for instruction in instructions), entry


def test_offsets_have_64_bits() -> None:
    for entry in plan((*ONE_SIDE, *TWO_SIDES), 4096, 11008, 64, BF16, BF16, "sm_90"):
        ir = compiled(entry, TARGETS["sm_90"].gpu).ir
        assert "tt.addptr" in ir
        assert not re.findall(r"tt\.addptr.*(?:xi32>|, i32) loc", ir), entry


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rounding", [None, BF16])
def test_test_matrix_compiles_without_fused_multiply_adds(target: str, rounding: torch.dtype | None) -> None:
    """With them the normals would not be those of the other devices to the bit."""
    with recording(TARGETS[target].device) as launches:
        for dtype, rademacher in ((F32, False), (F32, True), (torch.float64, False)):
            out = torch.empty(2, 4096, 144, dtype=dtype, device="meta")
            philox.fill_test_matrix(out, -5, 2**31, 3, rademacher=rademacher, rounding=rounding)
    assert len(launches) == 3
    for entry in launches:
        binary = assert_fits(entry, target, spill_bytes=0)
        fused = re.findall(r"\b(?:v_)?(?:pk_)?fma\w*[._]\S*f(?:32|64)", binary.assembly)
        roots = re.findall(r"\b(?:v_sqrt_f32|v_rsq_f32|sqrt\.rn\.f32)", binary.assembly)
        assert bool(roots) != dict(entry.constants)["RADEMACHER"]
        # AMDGCN spells out those that round a root correctly; fused throughout there would be 36 a root.
        assert len(fused) <= (5 * len(roots) if target == "gfx942" else 0)
        assert not re.findall(r"tt\.addptr.*(?:xi32>|, i32) loc", binary.ir)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("n", [4096 * 4096, 199 * 1127, 2**31 + 16], ids=str)
def test_rounding_compiles(target: str, n: int) -> None:
    high, low, value = (torch.empty(n, dtype=dtype, device="meta") for dtype in (BF16, torch.int16, F32))
    with recording(TARGETS[target].device) as launches:
        rounding.add_split(high, low, value)
        rounding.round_stochastic(high, value, -5, 2**35 + 3)
    assert [entry.kernel for entry in launches] == [rounding.add_split_kernel, rounding.round_stochastic_kernel]
    for entry in launches:
        assert not re.findall(r"tt\.addptr.*(?:xi32>|, i32) loc", assert_fits(entry, target, spill_bytes=0).ir)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("m", "n", "rank"), [(4096, 11008, 64), (11008, 4096, 16), (199, 1127, 33)])
def test_parts_compile_without_spills(m: int, n: int, rank: int, target: str) -> None:
    launches = plan_parts(m, n, rank, target)
    assert {entry.kernel for entry in launches} == set(PARTS)
    for entry in launches:
        binary = assert_fits(entry, target, spill_bytes=0)
        assert not re.findall(r"tt\.addptr.*(?:xi32>|, i32) loc", binary.ir), entry
        # The twin keeps subnormal numbers.
        assert ".ftz" not in binary.assembly
        if target.startswith("sm") and rank % 16 == 0:
            assert "v4" in binary.assembly, entry
        if target == "sm_90" and entry.kernel is split_parts.corrected_parts_kernel:
            assert re.search(r"(?:wgmma\.mma_async|mma\.sync)\S*bf16", binary.assembly)


@pytest.mark.parametrize(("target", "dtype", "basis"), [*PAIRS, ("sm_80", BF16, F32), ("sm_80", F16, F16)])
def test_grouped_launches_of_the_largest_rank_compile_without_spills(
    target: str, dtype: torch.dtype, basis: torch.dtype
) -> None:
    rank = max_rank(dtype, basis, TARGETS[target].device.is_hip)
    launches = plan_grouped(4096, 11008, rank, dtype, basis, target)
    assert {entry.kernel for entry in launches} == set(GROUPED)
    for entry in launches:
        # The scalars are offsets in the tables.
        assert not re.findall(r"tt\.addptr.*xi32> loc", assert_fits(entry, target).ir), entry


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_grouped_launches_of_sizes_that_are_not_aligned_compile(target: str) -> None:
    for entry in plan_grouped(199, 1127, 33, BF16, BF16, target):
        assert_fits(entry, target, spill_bytes=256)


def test_grouped_products_load_16_bytes_at_a_time_and_run_on_tensor_cores() -> None:
    """Pointers that come out of a table carry no alignment of their own."""
    for entry in plan_grouped(4096, 11008, 64, BF16, BF16, "sm_90"):
        assembly = compiled(entry, TARGETS["sm_90"].gpu).assembly
        assert re.search(r"wgmma\.mma_async|mma\.sync", assembly), entry
        assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10|ld\.global\S*v4", assembly), entry


def test_the_documented_table_names_every_kernel() -> None:
    """`bench/gpu/kernel_table.py --write` makes it; compiling all of it takes a minute."""
    text = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    table = text.partition("<!-- kernel table")[2].partition("<!-- end")[0]
    assert all(target in table for target in TARGETS)
    for kernel in (*KERNELS, *GROUPED, *ELEMENTWISE, *PARTS):
        assert f"| `{kernel.__name__.removesuffix('_kernel')}` |" in table

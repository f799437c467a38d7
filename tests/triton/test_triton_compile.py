"""Compiles the launches of every op for GPUs that are not there: code produced, shared memory, spills, tensor cores.

What a launcher would launch is recorded on meta tensors, so that the tile sizes, strides and options are its own.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from sculpt_ops.triton_kernels import (  # noqa: E402
    launch,
    philox,
    project_block,
    project_both,
    project_left,
    project_right,
    rank_update,
    rounding,
    thin_products,
)
from sculpt_ops.triton_kernels.panels import Device, max_rank  # noqa: E402

pytestmark = pytest.mark.skipif(launch.INTERPRET, reason="TRITON_INTERPRET is set: nothing is compiled")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
POINTERS = {BF16: "*bf16", F16: "*fp16", F32: "*fp32", torch.float64: "*fp64", torch.int16: "*i16"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
KERNELS = (project_left.project_one_side_kernel, thin_products.thin_products_kernel, rank_update.rank_update_kernel)
ELEMENTWISE = (philox.test_matrix_kernel, rounding.add_split_kernel, rounding.round_stochastic_kernel)

# ptxas gives up a few bytes (8 to 24 were seen) to stay at 64 or 128 registers, where one more program fits.
SPILL_BYTES = 32


class Target(NamedTuple):
    """A GPU to compile for; one program may use `shared_bytes`."""

    gpu: GPUTarget
    device: Device
    shared_bytes: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), Device(40 * 2**20, 108), 163 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), Device(50 * 2**20, 132), 227 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), Device(126 * 2**20, 148), 227 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), Device(4 * 2**20, 304, is_hip=True), 64 * 1024),
}


class Launch(NamedTuple):
    """A kernel with the types, constants and alignments triton would specialise it for, and its options."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]


def specialise(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    """As triton does on a launch: aligned pointers, multiples of 16 known as such, 1 and None as constants."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: options.pop(name) for name in list(options) if name in kernel.arg_names}
    signature, constants, aligned = {}, {}, []
    for index, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            aligned.append(index)
        elif name.isupper() or value is None or value == 1:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                aligned.append(index)
    return Launch(kernel, *(tuple(d.items()) for d in (signature, constants)), tuple(aligned), tuple(options.items()))


@contextmanager
def recording(device: Device) -> Iterator[list[Launch]]:
    """Launchers called inside see `device`, skip the check for a GPU, and launch nothing."""
    launches: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "device_of", lambda index: device)
        for module in (project_left, project_right, project_both, project_block):
            patch.setattr(module, "check_operands", lambda *args, **kwargs: None)
        for kernel in (*KERNELS, *ELEMENTWISE):

            def record(*args: Any, kernel: Any = kernel, grid: Any, warmup: bool, **options: Any) -> None:
                launches.append(specialise(kernel, args, options))

            patch.setattr(kernel, "run", record)
        yield launches


def plan(
    ops: tuple[str, ...], m: int, n: int, rank: int, dtype: torch.dtype, basis: torch.dtype, target: str
) -> list[Launch]:
    """Every distinct launch of `ops` on an m x n gradient with bases of `rank`."""
    grad = torch.empty(m, n, dtype=dtype, device="meta")
    left, right = (torch.empty(size, rank, dtype=basis, device="meta") for size in (m, n))
    calls: dict[str, Callable[[], None]] = {
        "left": lambda: project_left.project_left(grad, left, grad, keep=False),
        "keep": lambda: project_left.project_left(grad, left, grad, keep=True),
        "right": lambda: project_right.project_right(grad, right, grad, keep=False),
        "both": lambda: project_both.project_both(grad, left, right, grad),
        "block": lambda: project_block.project_block(grad, left, right, grad),
    }
    with recording(TARGETS[target].device) as launches:
        for op in ops:
            calls[op]()
    return list(dict.fromkeys(launches))


class Binary(NamedTuple):
    """`code` of the GPU, `assembly` (PTX or AMDGCN), triton's `ir`, spilled bytes or registers, shared bytes."""

    code: bytes
    assembly: str
    ir: str
    spilled: int
    shared: int


@cache
def compiled(entry: Launch, gpu: GPUTarget) -> Binary:
    source = ASTSource(
        entry.kernel,
        dict(entry.signature),
        dict(entry.constants),
        {(index,): [["tt.divisibility", 16]] for index in entry.aligned},
    )
    kernel = triton.compile(source, target=gpu, options=dict(entry.options))
    if gpu.backend == "hip":
        spilled = re.search(r"\.vgpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])
        code, assembly = kernel.asm["hsaco"], kernel.asm["amdgcn"]
    else:
        spilled = re.search(r"STACK:(\d+)", resource_usage(kernel.asm["cubin"]))
        code, assembly = kernel.asm["cubin"], kernel.asm["ptx"]
    assert spilled is not None
    return Binary(code, assembly, kernel.asm["ttir"], int(spilled[1]), kernel.metadata.shared)


def resource_usage(cubin: bytes) -> str:
    """Kernels without arrays or calls use their stack for spills alone."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


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

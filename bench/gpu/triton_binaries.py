"""Compiles the launches of the Triton kernels for GPUs that are not there, and reads what the binaries take.

What a launcher would launch is recorded on meta tensors, so that the tile sizes, strides and options are its own.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sculpt_ops.ops import split_products
from sculpt_ops.triton_kernels import (
    grouped,
    launch,
    philox,
    project_block,
    project_both,
    project_left,
    project_right,
    rank_update,
    rounding,
    split_parts,
    thin_products,
)
from sculpt_ops.triton_kernels.grouped_launch import Member, prepare
from sculpt_ops.triton_kernels.panels import Device

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
SIDES = ("left", "right")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
KERNELS = (project_left.project_one_side_kernel, thin_products.thin_products_kernel, rank_update.rank_update_kernel)
ELEMENTWISE = (philox.test_matrix_kernel, rounding.add_split_kernel, rounding.round_stochastic_kernel)
PARTS = (split_parts.split_parts_kernel, split_parts.corrected_parts_kernel)
GROUPED = tuple(getattr(grouped, name) for name in grouped.__all__)


class Target(NamedTuple):
    """A GPU to compile for; a program may use `shared_bytes`, all programs of a multiprocessor `all_shared_bytes`."""

    gpu: GPUTarget
    device: Device
    shared_bytes: int
    all_shared_bytes: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), Device(40 * 2**20, 108), 163 * 1024, 164 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), Device(50 * 2**20, 132), 227 * 1024, 228 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), Device(126 * 2**20, 148), 227 * 1024, 228 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), Device(4 * 2**20, 304, is_hip=True), 64 * 1024, 64 * 1024),
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
    with ExitStack() as stack:
        stack.enter_context(patch.object(launch, "device_of", lambda index: device))
        for module in (project_left, project_right, project_both, project_block):
            stack.enter_context(patch.object(module, "check_operands", lambda *args, **kwargs: None))
        stack.enter_context(patch.object(split_parts, "why_not_parts", lambda out, source: None))
        for kernel in (*KERNELS, *ELEMENTWISE, *PARTS, *GROUPED):

            def record(*args: Any, kernel: Any = kernel, grid: Any, warmup: bool, **options: Any) -> None:
                launches.append(specialise(kernel, args, options))

            stack.enter_context(patch.object(kernel, "run", record))
        yield launches


def distinct(launches: Sequence[Launch]) -> list[Launch]:
    return list(dict.fromkeys(launches))


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
    return distinct(launches)


def plan_grouped(m: int, n: int, rank: int, dtype: torch.dtype, basis: torch.dtype, target: str) -> list[Launch]:
    """The launches of a list of one-sided matrices, removed and kept, and of a two-sided list."""
    grad = torch.empty(m, n, dtype=dtype, device="meta")
    left, right = (torch.empty(size, rank, dtype=basis, device="meta") for size in (m, n))
    one = [Member(grad, left, None, False, False, False), Member(grad, None, right, False, True, False)]
    both = [Member(grad, left, right, False, False, False)] * 2
    with recording(TARGETS[target].device) as launches:
        for members in (one, both):
            lists = ([member.grad for member in members], *([getattr(m, side) for m in members] for side in SIDES))
            for group in prepare(members, range(len(members))):
                group.locate(*lists).launch()
    return distinct(launches)


def plan_parts(m: int, n: int, rank: int, target: str) -> list[Launch]:
    """What stands between library products of a bfloat16 matrix with float32 bases: each side, both, kept, block."""
    grad = torch.empty(m, n, dtype=torch.bfloat16, device="meta")
    left, right = (torch.empty(size, rank, device="meta") for size in (m, n))
    with (
        recording(TARGETS[target].device) as launches,
        patch.object(split_products, "_kernels", lambda tensor: split_parts),
        patch.object(split_products, "_corrects", lambda *args: True),
    ):
        for bases in ((left, None), (None, right), (left, right)):
            split_products.project_split(grad, *bases, grad, False, False, False)
        for keep_left, block in ((True, False), (False, True)):
            split_products.project_split(grad, left, right, grad, keep_left, False, block)
    return distinct(launches)


class Binary(NamedTuple):
    """`code` of the GPU, `assembly` (PTX or AMDGCN), triton's `ir`, registers of a thread, spilled bytes or registers,
    shared bytes and warps of a program."""

    code: bytes
    assembly: str
    ir: str
    registers: int
    spilled: int
    shared: int
    warps: int


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
        code, assembly = kernel.asm["hsaco"], kernel.asm["amdgcn"]
        registers = number(r"\.vgpr_count:\s+(\d+)", assembly)
        spilled = number(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    else:
        code, assembly = kernel.asm["cubin"], kernel.asm["ptx"]
        usage = resource_usage(code)
        registers, spilled = number(r"REG:(\d+)", usage), number(r"STACK:(\d+)", usage)
    return Binary(
        code, assembly, kernel.asm["ttir"], registers, spilled, kernel.metadata.shared, kernel.metadata.num_warps
    )


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, pattern
    return int(found[1])


def resource_usage(cubin: bytes) -> str:
    """Kernels without arrays or calls use their stack for spills alone."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

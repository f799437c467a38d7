"""Registers, shared memory, spills and programs a multiprocessor of every GPU kernel, from its binaries alone.

    python bench/gpu/kernel_table.py            # prints the table
    python bench/gpu/kernel_table.py --write    # puts it between the markers in docs/kernels.md

A cell is the variant that takes most registers: registers a thread, KiB of shared memory a program, programs that fit a
multiprocessor at a time; spilled bytes are spelt out. Of CUDA C++ kernels registers and static shared bytes.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))

from triton_binaries import (
    CUOBJDUMP,
    TARGETS,
    Binary,
    Launch,
    Target,
    compiled,
    number,
    plan,
    plan_grouped,
    plan_parts,
    recording,
)

from sculpt_ops.files import replacing
from sculpt_ops.ops.cuda_limits import BasisForm
from sculpt_ops.triton_kernels import philox, rounding

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- kernel table: bench/gpu/kernel_table.py --write -->", "<!-- end of the kernel table -->"
BF16, F32 = torch.bfloat16, torch.float32
# A layer of LLaMA-2 7B, with its usual ranks; rank 0 stands for kernels without one.
M, N = 4096, 11008
CASES = ((BF16, BF16, 64), (BF16, BF16, 128), (BF16, F32, 64), (F32, F32, 64))
CUDA_ARCHITECTURES = ("80", "90a", "100a")


class Use(NamedTuple):
    registers: int
    shared: int
    spilled: int
    programs: int

    def __str__(self) -> str:
        spilled = f", {self.spilled} B spilled" if self.spilled else ""
        return f"{self.registers}, {self.shared / 1024:.0f}, {self.programs}{spilled}"


def programs(registers: int, shared: int, threads: int, target: Target) -> int:
    """Programs at a time on a multiprocessor (a compute unit): bounded by registers, shared memory and threads."""
    if target.device.is_hip:
        waves = min(8, 512 // max(8, -(-registers // 8) * 8)) * 4  # on four SIMDs of 512 registers a lane
        return min(waves * 64 // threads, target.all_shared_bytes // max(shared, 1), 2048 // threads)
    # Registers are given to warps in units of 256; a program keeps 1 KiB of shared memory for the system.
    warp = -(-registers * 32 // 256) * 256
    return min(65536 // warp // (threads // 32), target.all_shared_bytes // (shared + 1024), 2048 // threads)


def use(binary: Binary, target: Target) -> Use:
    threads = binary.warps * target.gpu.warp_size
    return Use(
        binary.registers, binary.shared, binary.spilled, programs(binary.registers, binary.shared, threads, target)
    )


def name_of(entry: Launch) -> str:
    return str(entry.kernel.__name__).removesuffix("_kernel")


def launches(target: str) -> Iterator[tuple[str, Launch]]:
    """Every launch with the words that say what of."""
    for dtype, basis, rank in CASES:
        kind = f"{str(dtype).removeprefix('torch.')}, {str(basis).removeprefix('torch.')} basis, rank {rank}"
        for entry in (
            *plan(("left", "keep", "right", "both", "block"), M, N, rank, dtype, basis, target),
            *plan_grouped(M, N, rank, dtype, basis, target),
        ):
            yield kind, entry
    with recording(TARGETS[target].device) as recorded:
        philox.fill_test_matrix(torch.empty(M, 144, device="meta"), 0, 0, 0, rademacher=False, rounding=BF16)
        high, low, value = (torch.empty(M, N, dtype=dtype, device="meta") for dtype in (BF16, torch.int16, F32))
        rounding.add_split(high, low, value)
        rounding.round_stochastic(high, value, 0, 0)
    for entry in (*recorded, *plan_parts(M, N, 64, target)):
        yield "", entry


def triton_rows() -> dict[tuple[str, str], dict[str, Use]]:
    rows: defaultdict[tuple[str, str], dict[str, Use]] = defaultdict(dict)
    for name, target in TARGETS.items():
        for kind, entry in launches(name):
            cells = rows[name_of(entry), kind]
            cells[name] = max(cells.get(name, Use(0, 0, 0, 0)), use(compiled(entry, target.gpu), target))
    return rows


def triton_table() -> list[str]:
    lines = ["| Triton kernel | of | " + " | ".join(TARGETS) + " |", "|---" * (2 + len(TARGETS)) + "|"]
    for (name, kind), cells in sorted(triton_rows().items()):
        lines.append(f"| `{name}` | {kind} | " + " | ".join(str(cells[target]) for target in TARGETS) + " |")
    return lines


def architectures(source: Path) -> tuple[str, ...]:
    """A file that is for one target only carries its suffix: `_sm90a.cu`."""
    suffix = re.search(r"_sm(\d+a?)$", source.stem)
    return (suffix[1],) if suffix else CUDA_ARCHITECTURES


def cuda_binary(source: Path, architecture: str, folder: Path) -> Path:
    from torch.utils.cpp_extension import include_paths

    cubin = folder / f"{source.stem}_{architecture}.cubin"
    includes = [f"-I{path}" for path in (ROOT / "csrc", *include_paths())]
    command = ["nvcc", "-cubin", f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-O3", "-std=c++17"]
    command += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", *includes, str(source), "-o", str(cubin)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return cubin


def cuda_table() -> list[str]:
    """A row a kernel; shared memory that a launch asks for is not in the binary: only the static part is."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    if not sources or shutil.which("nvcc") is None:
        return []
    rows: defaultdict[tuple[str, str], dict[str, tuple[int, ...]]] = defaultdict(dict)
    with tempfile.TemporaryDirectory() as folder:
        for source in sources:
            for architecture in architectures(source):
                cubin = cuda_binary(source, architecture, Path(folder))
                command = [os.fspath(CUOBJDUMP), "--dump-resource-usage", str(cubin)]
                text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                for mangled, usage in re.findall(r"Function (\S+?):?\n\s*(REG:.*)", text):
                    demangled = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
                    name = demangled.strip().replace("(anonymous namespace)::", "").removeprefix("void ")
                    name = re.sub(r"\(sculpt::BasisForm\)(\d)", lambda form: BasisForm(int(form[1])).name.lower(), name)
                    name = re.sub(r"\((?:int|bool)\)", "", name).split("(")[0]
                    # Of its sides and widths the one that takes most.
                    name = re.sub(r"(project_side<\d+, \w+), .*", r"\1>", name)
                    cells, target = rows[name, source.name], f"sm_{architecture}"
                    use = tuple(number(rf"{kind}:(\d+)", usage) for kind in ("REG", "SHARED", "STACK"))
                    cells[target] = max(cells.get(target, use), use)
    targets = [f"sm_{architecture}" for architecture in CUDA_ARCHITECTURES]
    lines = ["", f"| CUDA C++ kernel | file | {' | '.join(targets)} |", "|---" * (2 + len(targets)) + "|"]
    for (name, file), cells in rows.items():
        shown = [_cell(*cells[target]) if target in cells else "" for target in targets]
        lines.append(f"| `{name}` | {file} | {' | '.join(shown)} |")
    return lines


def _cell(registers: int, shared: int, spilled: int) -> str:
    return f"{registers}, {shared}" + (f", {spilled} B spilled" if spilled else "")


def write(table: str) -> None:
    text = DOCS.read_text()
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{DOCS}: wanted the markers {BEGIN} and {END}")
    with replacing(DOCS) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/kernels.md")
    given = parser.parse_args()
    table = "\n".join([*triton_table(), *cuda_table()])
    if given.write:
        write(table)
    else:
        print(table)


if __name__ == "__main__":
    main()

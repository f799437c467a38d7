"""Every CUDA C++ file through nvcc for its targets: no spills, registers within the launch bounds, tensor cores."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "csrc" / "cuda"
KERNELS = sorted(CUDA.glob("*.cu"))
FLAGS = ["-O3", "-std=c++17", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}"]
REGISTERS = 65536
# Threads of a multiprocessor that the registers must be enough for: 256 a block, or the launch bounds of jacobi.cu.
THREADS = {"jacobi": 32 * 27}

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def compiled(source: Path, architecture: str, folder: Path) -> tuple[str, str]:
    """What ptxas says, and the PTX."""
    out = []
    for kind in ("-cubin", "-ptx"):
        target = folder / f"{source.stem}{kind}"
        command = ["nvcc", kind, f"-gencode=arch=compute_{architecture},code=sm_{architecture}", *FLAGS]
        if kind == "-ptx":
            command[2] = f"-arch=compute_{architecture}"
        run = subprocess.run(
            [*command, "-Xptxas", "-v", str(source), "-o", str(target)], capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        out.append(run.stderr if kind == "-cubin" else target.read_text())
    return out[0], out[1]


def test_there_are_kernels() -> None:
    assert KERNELS


@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.name)
def test_kernels_compile_without_spills(source: Path, tmp_path: Path) -> None:
    suffix = re.search(r"_sm(\d+a?)$", source.stem)
    for architecture in (suffix[1],) if suffix else ("80", "90a", "100a"):
        said, ptx = compiled(source, architecture, tmp_path)
        spills = [int(x) for x in re.findall(r"(\d+) bytes spill", said)]
        registers = [int(x) for x in re.findall(r"Used (\d+) registers", said)]
        assert registers
        assert max(spills) == 0, said
        assert max(registers) * THREADS.get(source.stem, 256) <= REGISTERS
        assert "warning" not in said
        if source.stem == "project_side_sm90a":
            assert "wgmma.mma_async" in ptx
            assert "st.async" in ptx
            assert "cp.async.bulk.tensor" in ptx
            # At the start and the end alone: in the loop it would wait for all of memory.
            assert ptx.count("barrier.cluster.arrive") == 2 * len(registers)
            # As this does, by emptying L1, and each of those that wait did it once.
            assert "acquire.cluster.shared" not in ptx
        if source.stem == "jacobi":
            # One for each length of a column and place of the second factor; no access to memory of unknown place.
            assert len(registers) == 10
            assert not re.search(r"\b(ld|st)\.(f32|u32)", ptx)
        # No atomic sums: their order is not fixed. (A barrier may count threads: bar.red.)
        assert not re.search(r"(?<!\.)\b(atom|red)\.", ptx)


@pytest.mark.parametrize(("architecture", "words"), [("80", ""), ("100a", ""), ("90", "wanted architecture 9.0a")])
def test_hopper_kernels_are_empty_or_refused_elsewhere(architecture: str, words: str, tmp_path: Path) -> None:
    """So that one build has code for several GPUs; that of 9.0 would do nothing on Hopper."""
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    source = str(CUDA / "project_side_sm90a.cu")
    command = ["nvcc", "-cubin", target, *FLAGS, "-Xptxas", "-v", source, "-o", str(tmp_path / "side.cubin")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode == 0) == (not words), run.stderr
    assert words in run.stderr
    assert max([int(x) for x in re.findall(r"Used (\d+) registers", run.stderr)], default=0) <= 16


@pytest.mark.parametrize("source", sorted(CUDA.glob("*.cpp")), ids=lambda path: path.name)
def test_the_ops_compile_against_torch(source: Path, tmp_path: Path) -> None:
    """Stable ABI alone, and refusals before anything is launched."""
    includes = [f"-I{path}" for path in include_paths()]
    command = ["nvcc", "-c", *FLAGS, *includes, str(source), "-o", str(tmp_path / "ops.o")]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert run.returncode == 0, run.stderr
    assert torch.version.cuda is None or (tmp_path / "ops.o").exists()

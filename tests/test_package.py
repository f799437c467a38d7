"""The package as a dependency: what an import costs, what it registers, and that the source is clean."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sculpt_ops

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_import_needs_torch_and_numpy_alone() -> None:
    """Whatever torch itself imports is torch's business; of ours nothing heavier may come."""
    heavy = ["triton", "transformers", "accelerate", "safetensors", "typer", "rich", "matplotlib", "psutil", "gguf"]
    script = f"""
import sys, torch
before = set(sys.modules)
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {heavy!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import sculpt_ops
print(sculpt_ops.project_(torch.ones(2, 2), torch.eye(2)).abs().sum().item())
print(sorted(n for n in set(sys.modules) - before if n.partition(".")[0] in {heavy!r}))
"""
    done = run(sys.executable, "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["0.0", "[]"]


def test_the_ops_are_in_the_namespace_with_the_published_schemas() -> None:
    schemas = {
        name: str(getattr(torch.ops.sculpt, name).default._schema)
        for name in ("project", "project_", "foreach_project_")
    }
    bases = "Tensor? left=None, Tensor? right=None, Tensor? left_metric=None, Tensor? right_metric=None"
    flags = "*, bool keep_left=False, bool keep_right=False, bool block=False"
    assert schemas["project"] == f"sculpt::project(Tensor grad, {bases}, {flags}) -> Tensor"
    assert schemas["project_"] == f"sculpt::project_(Tensor(a!) grad, {bases}, {flags}) -> ()"
    assert schemas["foreach_project_"] == (
        "sculpt::foreach_project_(Tensor(a!)[] grads, Tensor?[] lefts, Tensor?[] rights, Tensor?[]? left_metrics=None, "
        "Tensor?[]? right_metrics=None, *, bool[] keep_lefts=[], bool[] keep_rights=[], bool block=False) -> ()"
    )
    assert "Tensor? core=None, Tensor? reference=None" in str(torch.ops.sculpt.restore_.default._schema)


def test_public_names_exist_and_are_documented() -> None:
    for name in sculpt_ops.__all__:
        assert getattr(sculpt_ops, name).__doc__, name


@pytest.mark.parametrize(
    "command",
    [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)],
    ids=" ".join,
)
def test_source_is_clean(command: tuple[str, ...]) -> None:
    done = run(sys.executable, "-m", *command)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_file_is_over_500_lines() -> None:
    folders = ("csrc", "sculpt_ops", "triton_kernels", "tests", "bench", "examples")
    files = [
        p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in {".py", ".cpp", ".h", ".cu", ".cuh", ".sh"}
    ]
    assert len(files) > 30
    assert {str(p): n for p in files if (n := len(p.read_text().splitlines())) > 500} == {}

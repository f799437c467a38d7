"""The ops without Python: in a C++ program, and in a package that AOTInductor made."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sculpt_ops

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
CPP = Path(__file__).resolve().parents[1] / "examples" / "cpp"


@pytest.mark.parametrize("device", DEVICES)
def test_a_program_without_python_projects(tmp_path: Path, device: str) -> None:
    program = tmp_path / "project"
    env = {**os.environ, "PYTHON": sys.executable}
    subprocess.run([CPP / "build.sh", program], env=env, check=True, capture_output=True, text=True)
    linked = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    assert "libpython" not in linked
    library = find_spec("sculpt_ops._C")
    assert library is not None
    assert library.origin is not None
    done = subprocess.run([program, library.origin, device], check=True, capture_output=True, text=True)
    before, after = map(float, done.stdout.split())
    assert 0.3 < before < 0.4  # the root of 64 / 512
    assert after < 1e-6
    missing = subprocess.run([program, tmp_path / "none.so"], check=False, capture_output=True, text=True)
    assert missing.returncode == 1
    assert "none.so" in missing.stderr


class Step(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("left", torch.linalg.qr(torch.randn(64, 8))[0])

    def forward(self, grad: Tensor) -> Tensor:
        out = sculpt_ops.project(grad, self.left).clone()
        sculpt_ops.project_(out, None, out[:, :0].new_zeros(48, 2))
        sculpt_ops.foreach_project_([out], [self.left], [None], left_metrics=[torch.eye(8)])
        return out


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_package_of_aot_inductor_projects(tmp_path: Path) -> None:
    step, grad = Step(), torch.randn(64, 48)
    exported = torch.export.export(step, (grad,))
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "step.pt2"))
    found = torch._inductor.aoti_load_package(package)(grad)
    torch.testing.assert_close(found, step(grad), rtol=0, atol=0)

"""Runs the numerical checks of the Triton kernels in triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

CHECKS = ("kernel_checks.py", "grouped_checks.py", "parts_checks.py")


def release(distribution: str) -> tuple[int, int]:
    major, minor = version(distribution).split(".")[:2]
    return int(major), int(minor)


@pytest.mark.parametrize("checks", CHECKS)
@pytest.mark.parametrize("interpret", ["1", "0"], ids=["interpreter", "gpu"])
def test_kernels_agree_with_float64(interpret: str, checks: str) -> None:
    if interpret == "0" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if interpret == "1" and release("triton") < (3, 7) and release("numpy") >= (2, 4):
        pytest.skip("the interpreter of triton before 3.7 turns one-element arrays into ints, which numpy 2.4 refuses")
    environment = os.environ | {"TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(Path(__file__).with_name(checks))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr

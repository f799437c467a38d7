"""The CUDA kernel that adds steps, on an emulated GPU (tests/cuda/gpu): to the bit as tensor by tensor."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable

import pytest
import torch

from .add_steps_cases import MODES, Case, a_case, add_, same
from .emulated_gpu import library

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


class Given(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "low", "step")),
        *((name, ctypes.c_int64) for name in ("numel", "seed")),
        ("half", ctypes.c_bool),
    )


Run = Callable[[Case], None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    kernel = library("add_steps", "add_steps", tmp_path_factory.mktemp("emulated"))

    def call(case: Case) -> None:
        given = (Given * len(case.weights))()
        for i, (entry, weight, step) in enumerate(zip(given, case.weights, case.steps, strict=True)):
            entry.weight, entry.step, entry.numel = weight.data_ptr(), step.data_ptr(), weight.numel()
            entry.low = case.lows[i].data_ptr() if case.lows else None
            entry.seed = case.seeds[i] if case.seeds else 0
            entry.half = weight.dtype is torch.bfloat16
        assert kernel.add_steps(given, ctypes.c_long(len(given)), ctypes.c_bool(bool(case.seeds))) == 0, kernel.wrong()

    return call


@pytest.mark.parametrize("mode", MODES)
def test_values(run: Run, mode: str) -> None:
    ours = a_case(mode)
    twin = ours.clone()
    for _ in range(2):
        run(ours)
        add_(twin)
        same(ours, twin)


@pytest.mark.parametrize("mode", MODES)
def test_memory_that_does_not_start_at_a_multiple_of_sixteen(run: Run, mode: str) -> None:
    ours = a_case(mode, [(1003,)])
    twin = ours.clone()
    run(ours._replace(steps=[torch.empty(1004)[1:].copy_(ours.steps[0])]))
    add_(twin)
    same(ours, twin)

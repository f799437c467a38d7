"""The CUDA kernel that adds steps, compiled for the CPU and run thread by thread: to the bit as tensor by tensor."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable

import pytest
import torch

from .add_steps_cases import MODES, Case, a_case, add_, same
from .emulating import library

ENTRY = """
struct Given { void* weight; int16_t* low; const float* step; int64_t numel, seed; bool half; };
extern "C" int run(const Given* given, long n, bool stochastic) {
  auto* entries = new sculpt::AddEntry[n];
  for (long i = 0; i < n; ++i)
    entries[i] = {given[i].weight, given[i].low, given[i].step, given[i].numel, sculpt::Key::of(given[i].seed),
                  given[i].half};
  const int error = sculpt::add_steps(entries, n, stochastic, nullptr);
  delete[] entries;
  return error;
}
"""

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
    kernel = library("add_steps", ENTRY, tmp_path_factory.mktemp("emulated"), launches=1)

    def call(case: Case) -> None:
        given = (Given * len(case.weights))()
        for i, (entry, weight, step) in enumerate(zip(given, case.weights, case.steps, strict=True)):
            entry.weight, entry.step, entry.numel = weight.data_ptr(), step.data_ptr(), weight.numel()
            entry.low = case.lows[i].data_ptr() if case.lows else None
            entry.seed = case.seeds[i] if case.seeds else 0
            entry.half = weight.dtype is torch.bfloat16
        assert kernel.run(given, ctypes.c_long(len(given)), ctypes.c_bool(bool(case.seeds))) == 0

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

"""The AdamW CUDA kernel, on an emulated GPU (tests/cuda/gpu), without fused products: its twin to the bit."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from sculpt_ops import reference

from ..ops.adam_cases import DECAYS, HYPERPARAMETERS, SHAPES, Case, a_case
from .emulated_gpu import library

POINTERS = ("grad", "first", "second", "out", "count", "weight", "low", "start")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


class Entry(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("numel", ctypes.c_int64),
        ("count_value", ctypes.c_float),
        ("half_grad", ctypes.c_bool),
        ("half_moments", ctypes.c_bool),
        ("half_out", ctypes.c_bool),
        ("half_weight", ctypes.c_bool),
    )


class Settings(ctypes.Structure):
    _fields_ = (
        ("lr", ctypes.c_void_p),
        *((name, ctypes.c_double) for name in ("lr_value", "beta1", "beta2", "eps", "weight_decay")),
        ("lr_double", ctypes.c_bool),
        ("maximize", ctypes.c_bool),
    )


Run = Callable[..., None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    kernel = library("adam", "adam", tmp_path_factory.mktemp("emulated"))
    assert kernel.size() == ctypes.sizeof(Entry) + 1000 * ctypes.sizeof(Settings)

    def call(case: Case, on_host: Sequence[int] = (), lr_on_host: bool = False, maximize: bool = False) -> None:
        entries = (Entry * len(case.grads))()
        for i, entry in enumerate(entries):
            columns = (case.grads, case.firsts, case.seconds, case.steps, case.counts)
            tensors: list[Tensor | None] = [column[i] for column in columns]
            weight = case.weights[i]
            for name, tensor in zip(POINTERS, [*tensors, weight, case.lows[i], case.starts[i]], strict=True):
                setattr(entry, name, None if tensor is None else tensor.data_ptr())
            entry.numel = case.grads[i].numel()
            entry.half_grad = case.grads[i].dtype is torch.bfloat16
            entry.half_moments = case.firsts[i].dtype is torch.bfloat16
            entry.half_out = case.steps[i].dtype is torch.bfloat16
            entry.half_weight = weight is not None and weight.dtype is torch.bfloat16
            if i in on_host:
                entry.count = None
                entry.count_value = float(case.counts[i]) + 1
        lr = None if lr_on_host else case.lr.data_ptr()
        settings = Settings(lr=lr, lr_double=True, maximize=maximize, **HYPERPARAMETERS)
        settings.lr_value = float(case.lr) if lr_on_host else float("nan")
        assert kernel.adam(entries, ctypes.c_long(len(entries)), ctypes.byref(settings)) == 0, kernel.wrong()
        for i in on_host:
            case.counts[i] += 1

    return call


def same(ours: Case, twin: Case) -> None:
    for a, b in zip(ours.written(), twin.written(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("decays", DECAYS)
@pytest.mark.parametrize("step_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("moment_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values(
    run: Run, grad_dtype: torch.dtype, moment_dtype: torch.dtype, step_dtype: torch.dtype, decays: str
) -> None:
    ours = a_case(SHAPES, grad_dtype, decays, moment_dtype=moment_dtype, step_dtype=step_dtype)
    twin = ours.clone()
    for maximize in (False, True):
        run(ours, maximize=maximize)
        reference.adam_(*twin, **HYPERPARAMETERS, maximize=maximize)
        same(ours, twin)


@pytest.mark.parametrize("on_host", [range(300), range(1, 300, 3), [299]], ids=["all", "some", "the last"])
def test_counts_and_learning_rate_on_the_host(run: Run, on_host: Sequence[int]) -> None:
    """More tensors than a launch takes, so that one launch may have counts on the host and the other none."""
    ours = a_case([(9,)] * 300)
    twin = ours.clone()
    for _ in range(2):
        run(ours, on_host, lr_on_host=True)
        reference.adam_(*twin, **HYPERPARAMETERS)
    same(ours, twin)


@pytest.mark.parametrize("name", ["steps", "grads", "firsts", "seconds"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_that_does_not_start_at_a_multiple_of_sixteen(run: Run, dtype: torch.dtype, name: str) -> None:
    ours = a_case([(1000,)], dtype, moment_dtype=dtype, step_dtype=dtype)
    twin = ours.clone()
    (given,) = getattr(ours, name)
    ours = ours._replace(**{name: [torch.empty(1001, dtype=dtype)[1:].copy_(given)]})
    run(ours)
    reference.adam_(*twin, **HYPERPARAMETERS)
    same(ours, twin)

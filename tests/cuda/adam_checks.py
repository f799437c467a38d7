"""AdamW's elementwise work on a GPU by the CUDA C++ kernel, against its twin; not run yet anywhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sculpt_ops import reference
from sculpt_ops.ops.variants import cuda_missing

from ..ops.adam_cases import DECAYS, HYPERPARAMETERS, SHAPES, Case, a_case

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or cuda_missing() is not None, reason="needs a GPU and the CUDA C++ kernels"
)


def on_gpu(case: Case) -> Case:
    return Case(*[[t if t is None else t.cuda() for t in column] for column in case[:-1]], case.lr.cuda())


def near(ours: list[Tensor], twins: list[Tensor]) -> None:
    """Within the rounding of the kernel's fused products and sums."""
    for a, b in zip(ours, twins, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decays", DECAYS)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values(grad_dtype: torch.dtype, decays: str, maximize: bool) -> None:
    twin = a_case([*SHAPES, *[(3, 7)] * 300], grad_dtype, decays)
    ours = on_gpu(twin)
    for _ in range(3):
        torch.ops.sculpt._cuda_adam_(*ours, **HYPERPARAMETERS, maximize=maximize)
        reference.adam_(*twin, **HYPERPARAMETERS, maximize=maximize)
    near(ours.written(), twin.written())


def test_memory_that_does_not_start_at_a_multiple_of_sixteen() -> None:
    twin = a_case([(1000,)])
    ours = on_gpu(twin)
    room = torch.empty(1001, device="cuda")
    ours = ours._replace(grads=[room[1:].copy_(ours.grads[0])])
    torch.ops.sculpt._cuda_adam_(*ours, **HYPERPARAMETERS)
    reference.adam_(*twin, **HYPERPARAMETERS)
    near(ours.written(), twin.written())


def test_a_graph_follows_learning_rate_and_counts() -> None:
    case = a_case([(129, 65), (5,)], decays="halves")
    ours, twin = on_gpu(case), case.clone()
    torch.ops.sculpt._cuda_adam_(*on_gpu(case), **HYPERPARAMETERS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.sculpt._cuda_adam_(*ours, **HYPERPARAMETERS)
    for lr in (1e-3, 1e-2, 0.0):
        ours.lr.fill_(lr)
        twin.lr.fill_(lr)
        graph.replay()
        reference.adam_(*twin, **HYPERPARAMETERS)
    near(ours.written(), twin.written())


def test_what_it_cannot_do_is_refused_before_anything_is_written() -> None:
    case = on_gpu(a_case([(6,), (5,)]))
    with pytest.raises(RuntimeError, match="_cuda_adam_: counts: wanted the device of grads"):
        torch.ops.sculpt._cuda_adam_(*case._replace(counts=[c.cpu() for c in case.counts]), **HYPERPARAMETERS)
    assert all(step.isnan().all() for step in case.steps)

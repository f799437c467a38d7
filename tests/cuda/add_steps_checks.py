"""Steps added to a list of weights on a GPU by the CUDA C++ kernel, to the bit as tensor by tensor."""

from __future__ import annotations

import pytest
import torch

from sculpt_ops.ops.variants import cuda_missing

from .add_steps_cases import MODES, a_case, add_, same

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or cuda_missing() is not None, reason="needs a GPU and the CUDA C++ kernels"
)


@pytest.mark.parametrize("mode", MODES)
def test_values(mode: str) -> None:
    twin = a_case(mode)
    ours = twin.cuda()
    for _ in range(2):
        torch.ops.sculpt._cuda_add_steps_(*ours)
        add_(twin)
        same(ours, twin)


@pytest.mark.parametrize("mode", MODES)
def test_memory_that_does_not_start_at_a_multiple_of_sixteen(mode: str) -> None:
    twin = a_case(mode, [(1003,)])
    ours = twin.cuda()
    room = torch.empty(1004, device="cuda")
    torch.ops.sculpt._cuda_add_steps_(*ours._replace(steps=[room[1:].copy_(ours.steps[0])]))
    add_(twin)
    same(ours, twin)


@pytest.mark.parametrize("mode", ["float32", "halves"])
def test_in_a_graph(mode: str) -> None:
    twin = a_case(mode, [(129, 65), (5,)])
    ours = twin.cuda()
    torch.ops.sculpt._cuda_add_steps_(*twin.cuda())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.sculpt._cuda_add_steps_(*ours)
    for _ in range(3):
        graph.replay()
        add_(twin)
    same(ours, twin)

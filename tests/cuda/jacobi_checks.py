"""SVD by Jacobi rotations on a GPU by the CUDA C++ kernel, against float64 and the CPU's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sculpt_ops.ops.jacobi import jacobi_svd
from sculpt_ops.ops.variants import cuda_missing

from ..ops.accuracy import gaussian
from ..ops.jacobi_cases import KEPT, SIZES, cases, check, check_kept

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or cuda_missing() is not None, reason="needs a GPU and the CUDA C++ kernels"
)


def on_gpu(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, V = torch.ops.sculpt._cuda_jacobi_svd(matrices.cuda())
    return U, S, V


@pytest.mark.parametrize("q", SIZES)
def test_values_of_every_kind(q: int) -> None:
    kinds = cases(q)
    U, S, V = on_gpu(torch.stack(list(kinds.values())))
    on_cpu = torch.ops.sculpt._jacobi_svd(torch.stack(list(kinds.values())))
    for i, (kind, matrix) in enumerate(kinds.items()):
        check(matrix, U[i], S[i], V[i])
        if kind in KEPT:
            check_kept(matrix, S[i])
            torch.testing.assert_close(S[i].cpu(), on_cpu[1][i], rtol=1e-5, atol=0)


@pytest.mark.parametrize("q", [80, 144])
def test_as_many_as_the_layers_of_a_model(q: int) -> None:
    """More matrices than blocks in flight; each as it comes out alone."""
    batch = gaussian(224, q, q, dtype=torch.float32).triu().cuda()
    U, S, V = on_gpu(batch.view(7, 32, q, q))
    for i in range(0, 224, 37):
        factors = (U.flatten(0, 1)[i], S.flatten(0, 1)[i], V.flatten(0, 1)[i])
        check(batch[i].cpu(), *factors)
        assert all(torch.equal(a, b) for a, b in zip(factors, on_gpu(batch[i]), strict=True))


@pytest.mark.parametrize("q", [17, 80, 160])
def test_the_same_bits_every_time(q: int) -> None:
    batch = torch.stack([gaussian(q, q), gaussian(q, 3) @ gaussian(3, q, seed=2)]).float().cuda().repeat(150, 1, 1)
    first, different = on_gpu(batch), torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(99):
        for a, b in zip(first, on_gpu(batch), strict=True):
            different += (a != b).any()
    assert int(different) == 0
    for factor in first:
        assert torch.equal(factor[0], factor[-2])
        assert torch.equal(factor[1], factor[-1])


@pytest.mark.parametrize("q", [33, 160])
def test_a_graph_follows_its_input(q: int) -> None:
    matrices = gaussian(3, 5, q, q, dtype=torch.float32).cuda()
    given = matrices[0].clone()
    on_gpu(given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = on_gpu(given)
    for batch in matrices:
        given.copy_(batch)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, on_gpu(batch), strict=True))


def test_strides_streams_and_empty_batches() -> None:
    room = gaussian(3, 20, 40, dtype=torch.float32).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for view in (room[:, :, ::2], room[:, :, :20].mT, room[:1, :, :20].expand(4, 20, 20)):
            assert all(torch.equal(a, b) for a, b in zip(on_gpu(view), on_gpu(view.contiguous()), strict=True))
    stream.synchronize()
    for shape in ((0, 0), (0, 3, 3), (2, 0, 0)):
        assert on_gpu(torch.empty(shape))[1].shape == shape[:-1]


def test_what_is_not_finite_stays_in_its_matrix() -> None:
    batch = gaussian(3, 50, 50, dtype=torch.float32)
    batch[1, 4, 2] = float("inf")
    for factor in on_gpu(batch):
        assert factor[1].isnan().all()
        assert factor[[0, 2]].isfinite().all()


def test_what_it_cannot_do_is_refused() -> None:
    """By the Python function that leads to the kernel: nothing else calls it."""
    for matrix, words in (
        (torch.zeros(2, 3), r"given shape \(2, 3\), wanted square matrices"),
        (torch.zeros(161, 161), r"given shape \(161, 161\), wanted square matrices .* q at most 160"),
        (torch.zeros(2, 2, dtype=torch.float64), "given dtype float64, wanted float32"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"_jacobi_svd: input: {words}"):
            jacobi_svd(matrix.cuda())

"""What the ops send: the coefficients or the matrix, whichever is less, for all matrices of a call together."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import sculpt_ops
from sculpt_ops.distributed import op_collectives
from sculpt_ops.distributed.op_sides import cheaper_exchange
from sculpt_ops.distributed.traffic import Traffic
from tests.ops.accuracy import gaussian, orthonormal

from .placed import COLUMNS, ROWS, WHOLE, line, place, square, whole
from .ranks import Ranks

# Where whole numbers of bytes leave every rank: all sizes are multiples of 4.
M, N = 48, 32


def sent_by_projection(r: int, dtype: torch.dtype, how: object, side: str) -> list[tuple[str, int]]:
    grad = place(gaussian(M, N, dtype=dtype), line(), how)
    basis = place(orthonormal(M if side == "left" else N, r, torch.float32), line(), WHOLE)
    with Traffic() as traffic:
        sculpt_ops.project_(grad, **{side: basis})
    return [(collective.op, collective.bytes) for collective in traffic.collectives]


def sent_by_all() -> None:
    p = dist.get_world_size()
    for dtype in (torch.float32, torch.bfloat16):
        # In a ring each rank sends 2 (p - 1) / p of what is summed, in an exchange (p - 1) / p of what it has.
        matrix = 2 * (p - 1) * M * N * dtype.itemsize // p**2
        for r in (0, 4, 8, 12, 24, 32):
            for how, side, length in ((ROWS, "left", N), (COLUMNS, "right", M)):
                coefficients = 2 * (p - 1) * r * length * 4 // p
                sent = sent_by_projection(r, dtype, how, side)
                assert sum(nbytes for _, nbytes in sent) == min(coefficients, matrix)
                assert all(op == ("all_reduce" if coefficients <= matrix else "all_to_all") for op, _ in sent)
            for how, side in ((ROWS, "right"), (COLUMNS, "left"), (WHOLE, "left"), (WHOLE, "right")):
                assert sent_by_projection(r, dtype, how, side) == []


def collectives_of_a_list(count: int) -> list[str]:
    """Left and right bases, narrow (coefficients) and wide (the matrix is sent), two dtypes."""
    grads, lefts, rights = [], [], []
    for i in range(count):
        r = 2 if i % 2 else 40
        grads.append(place(gaussian(M, N, dtype=torch.bfloat16 if i % 4 < 2 else torch.float32, seed=i), line(), ROWS))
        lefts.append(place(orthonormal(M, r, torch.float32), line(), WHOLE))
        rights.append(place(orthonormal(N, 3, torch.float32), line(), WHOLE))
    with Traffic() as traffic:
        sculpt_ops.foreach_project_(grads, lefts, rights)
    return [collective.op for collective in traffic.collectives]


def buckets_of_bounded_size() -> None:
    """Past the cap there is one collective for as many matrices as fit, with the same result."""
    grads = [gaussian(M, N, dtype=torch.float32, seed=i) for i in range(7)]
    for r, op, count in ((4, "all_reduce", 4), (40, "all_to_all", 14)):
        left = orthonormal(M, r, torch.float32)
        given = [place(grad, line(), ROWS) for grad in grads]
        before = op_collectives.BUCKET_BYTES
        op_collectives.BUCKET_BYTES = 2 * 4 * N * 4  # coefficients of two matrices, no matrix
        try:
            with Traffic() as traffic:
                sculpt_ops.foreach_project_(given, [place(left, line(), WHOLE)] * 7, [None] * 7)
        finally:
            op_collectives.BUCKET_BYTES = before
        assert [collective.op for collective in traffic.collectives] == [op] * count
        for grad, out in zip(grads, given, strict=True):
            assert torch.allclose(whole(out), sculpt_ops.project(grad, left), atol=1e-5)


def sent_for_both_sides() -> list[int]:
    """A kept right side: r x s coordinates are summed, not r x n; block: r x s as well."""
    left, right = (
        place(orthonormal(M, 4, torch.float32), line(), ROWS),
        place(orthonormal(N, 8, torch.float32), line(), WHOLE),
    )
    sent = []
    for flags in ({}, {"keep_right": True}, {"block": True}):
        grad = place(gaussian(M, N, dtype=torch.float32), line(), ROWS)
        with Traffic() as traffic:
            sculpt_ops.project_(grad, left, right, **flags)
        assert len(traffic.collectives) == 1
        sent.append(traffic.bytes)
    return sent


def sent_on_a_square_mesh() -> None:
    """Rows over one mesh dimension, columns over the other: one sum along each; block: of the core, along both."""
    left, right = (
        place(orthonormal(M, 4, torch.float32), square(), WHOLE),
        place(orthonormal(N, 4, torch.float32), square(), WHOLE),
    )
    for flags in ({}, {"block": True}):
        grad = place(gaussian(M, N, dtype=torch.float32), square(), ROWS, COLUMNS)
        with Traffic() as traffic:
            sculpt_ops.project_(grad, left, right, **flags)
        assert [(each.op, each.size) for each in traffic.collectives] == [("all_reduce", 2)] * 2


def largest_of_decompositions() -> None:
    """No collective carries a whole matrix."""
    tall = place(gaussian(256, 24, dtype=torch.float32), line(), ROWS)
    wide = place(gaussian(24, 256, dtype=torch.float32), line(), ROWS)
    nbytes = 256 * 24 * 4
    for call in (
        lambda: sculpt_ops.sketch(tall, 4, seed=1, transpose=True),
        lambda: sculpt_ops.orthonormalize(tall),
        lambda: sculpt_ops.rsvd(tall, 2, oversample=2),
        lambda: sculpt_ops.rsvd(wide, 2, oversample=2),
        lambda: sculpt_ops.top_subspace(tall, 2).left,
        lambda: sculpt_ops.top_subspace(wide, 2).right,
    ):
        with Traffic() as traffic:
            call()
        assert traffic.collectives
        assert all(collective.bytes <= nbytes / 2 for collective in traffic.collectives)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_the_cheaper_exchange_sends_fewer_bytes(itemsize: int) -> None:
    for m, n, r, ranks in (
        (4096, 11008, 128, 8),
        (4096, 4096, 1024, 8),
        (576, 1536, 72, 2),
        (64, 64, 16, 4),
        (8, 9, 0, 3),
    ):
        wide = max(itemsize, 4)
        share = 2 * (ranks - 1) / ranks
        sent = {"coefficients": share * r * n * wide, "matrix": share * m * n * itemsize / ranks}
        assert sent[cheaper_exchange(m, n, r, ranks, itemsize, wide)] == min(sent.values())
    assert cheaper_exchange(64, 64, 16 * itemsize // max(itemsize, 4), 4, itemsize, max(itemsize, 4)) == "coefficients"


def test_a_projection_sends_the_lesser_of_coefficients_and_matrix(ranks: Ranks) -> None:
    ranks.run(sent_by_all)


def test_the_number_of_collectives_does_not_depend_on_the_number_of_matrices(ranks: Ranks) -> None:
    few, many = ranks.run(collectives_of_a_list, 4)[0], ranks.run(collectives_of_a_list, 24)[0]
    assert few == many == ["all_reduce"] + ["all_to_all"] * 4


def test_what_is_sent_at_once_is_bounded(two_ranks: Ranks) -> None:
    two_ranks.run(buckets_of_bounded_size)


def test_a_kept_side_narrows_what_is_summed(ranks: Ranks) -> None:
    removed, kept, block = ranks.run(sent_for_both_sides)[0]
    assert kept * N == removed * 8
    assert block == kept


def test_a_square_mesh_sums_along_each_dimension(four_ranks: Ranks) -> None:
    four_ranks.run(sent_on_a_square_mesh)


def test_decompositions_never_gather_the_matrix(ranks: Ranks) -> None:
    ranks.run(largest_of_decompositions)

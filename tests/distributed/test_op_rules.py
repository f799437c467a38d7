"""Projection, restore and rounding on DTensors: what one rank computes, and no more sent than needed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

import sculpt_ops
from sculpt_ops import reference
from sculpt_ops.ops import rounding
from tests.ops.accuracy import REMOVE_AND_KEEP, assert_accurate, gaussian, orthonormal

from .placed import COLUMNS, ROWS, WHOLE, line, place, place_basis, placements, whole
from .ranks import Ranks

# m, n, r, s: even, uneven, fewer rows or columns than ranks, and bases wide enough that the matrix is sent instead.
SHAPES = [(16, 24, 3, 4), (13, 7, 2, 3), (3, 10, 1, 2), (9, 3, 0, 1), (40, 12, 25, 9)]


def project_everywhere() -> None:
    for m, n, r, s in SHAPES:
        grad, left, right = gaussian(m, n, dtype=torch.float32), *bases(m, n, r, s)
        for mesh, how in placements():
            for cut in (False, True):
                L = place_basis(left, mesh, how, "left", cut)
                R = place_basis(right, mesh, how, "right", cut)
                for flags in REMOVE_AND_KEEP:
                    given = place(grad, mesh, *how)
                    out = sculpt_ops.project(given, L, R, **flags)
                    assert out.placements == given.placements
                    assert torch.equal(given.to_local(), place(grad, mesh, *how).to_local())
                    assert_accurate(whole(out), reference.project, grad, left, right, **flags)
                    assert sculpt_ops.project_(given, L, R, **flags) is given
                    assert torch.equal(given.to_local(), out.to_local())


def metrics_everywhere() -> None:
    """Metrics that are not symmetric, of matrices one by one and in a list."""
    for m, n, r, s in SHAPES:
        grad, left, right = gaussian(m, n, dtype=torch.float32), *bases(m, n, r, s)
        metrics = gaussian(r, r, dtype=torch.float32, seed=3), gaussian(s, s, dtype=torch.float32, seed=4)
        for mesh, how in placements():
            L, R = place_basis(left, mesh, how, "left", False), place_basis(right, mesh, how, "right", True)
            one, other = (place(metric, mesh, WHOLE) for metric in metrics)
            for flags in REMOVE_AND_KEEP:
                given = place(grad, mesh, *how)
                out = sculpt_ops.project(given, L, R, **flags, left_metric=one, right_metric=other)
                assert_accurate(whole(out), with_metrics, grad, left, right, *metrics, **flags)
                lists = {f"{name}s": [value] for name, value in flags.items() if name != "block"}
                sculpt_ops.foreach_project_(
                    [given], [L], [R], **lists, block="block" in flags, left_metrics=[one], right_metrics=[None]
                )
                assert_accurate(whole(given), with_metrics, grad, left, right, metrics[0], None, **flags)


def with_metrics(grad: Tensor, left: Tensor, right: Tensor, one: Tensor, other: Tensor | None, **flags: bool) -> Tensor:
    return reference.project(grad, left, right, **flags, left_metric=one, right_metric=other)


def restore_everywhere() -> None:
    for m, n, r, s in SHAPES:
        weight, start = gaussian(m, n, dtype=torch.float32), gaussian(m, n, dtype=torch.float32, seed=2)
        left, right = bases(m, n, r, s)
        thin = {"left_image": left.mT @ start, "right_image": start @ right, "core": left.mT @ start @ right}
        for mesh, how in placements():
            images = {name: place(tensor, mesh, WHOLE) for name, tensor in thin.items()}
            L, R = place_basis(left, mesh, how, "left", False), place_basis(right, mesh, how, "right", True)
            for flags in REMOVE_AND_KEEP:
                given = place(weight, mesh, *how)
                sculpt_ops.restore_(
                    given,
                    L,
                    images["left_image"],
                    R,
                    images["right_image"],
                    core=images["core"],
                    reference=place(start, mesh, *how),
                    **flags,
                )

                def plain(weight: Tensor, left: Tensor, right: Tensor, start: Tensor, flags: dict = flags) -> Tensor:
                    core, images = left.mT @ start @ right, (left.mT @ start, start @ right)
                    return reference.restore_(
                        weight.clone(), left, images[0], right, images[1], core=core, reference=start, **flags
                    )

                assert_accurate(whole(given), plain, weight, left, right, start)


def project_lists() -> None:
    """Lists of all shapes and placements on one mesh, single sides too, in float64 and half precision."""
    mesh = line()
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        basis_dtype = torch.float64 if dtype is torch.float64 else torch.float32
        cases = []
        for i, (m, n, r, s) in enumerate(SHAPES):
            left, right = bases(m, n, r, s, basis_dtype)
            for how in (WHOLE, ROWS, COLUMNS):
                for sides in ((left, right), (left, None), (None, right)):
                    keep = [side is not None and (i + k) % 2 == 0 for k, side in enumerate(sides)]
                    cases.append((gaussian(m, n, dtype=dtype, seed=i), how, *sides, *keep))
        grads = [place(case[0], mesh, case[1]) for case in cases]
        lefts, rights = ([None if c[k] is None else place(c[k], mesh, WHOLE) for c in cases] for k in (2, 3))
        flags = {"keep_lefts": [case[4] for case in cases], "keep_rights": [case[5] for case in cases]}
        sculpt_ops.foreach_project_(grads, lefts, rights, **flags)
        for given, (grad, _, left, right, keep_left, keep_right) in zip(grads, cases, strict=True):
            keep = {"keep_left": keep_left, "keep_right": keep_right}
            assert_accurate(whole(given), reference.project, grad, left, right, **keep)


def half_precision_leaks_no_more_than_on_one_rank() -> list[float]:
    """The coefficients are summed in float32: summed in bfloat16 they would leak 1e-3."""
    grad, left = gaussian(64, 48, dtype=torch.float32), orthonormal(64, 8, torch.float32)
    exact = grad.bfloat16()
    given = place(exact, line(), ROWS)
    sculpt_ops.project_(given, place(left, line(), WHOLE))
    alone = sculpt_ops.project(exact, left)
    return [float((left.mT.double() @ t.double()).norm() / exact.double().norm()) for t in (whole(given), alone)]


def batches() -> None:
    """A batch of matrices, split along the batch too; a basis for all entries, or one for each."""
    grad = gaussian(5, 12, 6, dtype=torch.float32)
    single, many = (
        orthonormal(12, 3, torch.float32),
        torch.stack([orthonormal(12, 3, torch.float32, i) for i in range(5)]),
    )
    for how in (Shard(0), Shard(1), Shard(2), WHOLE):
        for left in (single, many):
            given = place(grad, line(), how)
            sculpt_ops.project_(given, place(left, line(), WHOLE))
            assert_accurate(whole(given), reference.project, grad, left)


def under_every_mode() -> None:
    grad, left = gaussian(12, 8, dtype=torch.float32), orthonormal(12, 3, torch.float32)
    given, L = place(grad, line(), ROWS), place(left, line(), WHOLE)
    with torch.inference_mode():
        sculpt_ops.project_(given, L)
        fresh = sculpt_ops.project(place(grad, line(), ROWS), L)
    assert_accurate(whole(given), reference.project, grad, left)
    assert torch.equal(whole(fresh), whole(given))
    before = given._version
    with torch.no_grad():
        sculpt_ops.foreach_project_([given], [L], [None])
    assert given._version > before


def round_everywhere() -> None:
    value, seed, offset = gaussian(13, 10, dtype=torch.float32), 7, 5
    expected = rounding.round_stochastic_(torch.empty(13, 10, dtype=torch.bfloat16), value, seed=seed, offset=offset)
    high, low = torch.empty(13, 10, dtype=torch.bfloat16), torch.empty(13, 10, dtype=torch.int16)
    rounding.split_(value, high, low)
    for mesh, how in placements():
        exact, out = place(value, mesh, *how), place(torch.zeros_like(high), mesh, *how)
        rounding.round_stochastic_(out, exact, seed=seed, offset=offset)
        assert torch.equal(whole(out), expected)
        halves = place(torch.zeros_like(high), mesh, *how), place(torch.zeros_like(low), mesh, *how)
        rounding.split_(exact, *halves)
        assert torch.equal(whole(halves[0]), high)
        assert torch.equal(whole(halves[1].int()), low.int())  # gloo has no int16
        rounding.add_split_(*halves, exact)
        joined = rounding.join_halves(*halves)
        assert joined.placements == exact.placements
        assert torch.equal(whole(joined), 2 * value)


def project_under_tensor_parallelism() -> None:
    """fully_shard on a module that is already split over the other mesh dimension makes _StridedShard placements."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    for rows in (12, 10):
        layer = torch.nn.Linear(8, rows, bias=False)
        with torch.no_grad():
            layer.weight.copy_(gaussian(rows, 8, dtype=torch.float32))
        start, left, right = layer.weight.detach().clone(), *bases(rows, 8, 3, 2)
        names = init_names()
        parallelize_module(layer, names["tp"], ColwiseParallel())
        fully_shard(layer, mesh=names["dp"])
        weight = layer.weight.detach()
        assert type(weight.placements[0]) is not Shard
        mesh = weight.device_mesh
        for flags in REMOVE_AND_KEEP:
            given = weight.clone()
            sculpt_ops.project_(given, place(left, mesh, WHOLE), place(right, mesh, WHOLE), **flags)
            assert_accurate(whole(given), reference.project, start, left, right, **flags)


def init_names() -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def bases(m: int, n: int, r: int, s: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return orthonormal(m, r, dtype), orthonormal(n, s, dtype, seed=1)


def test_project_and_project_in_place_on_every_placement(ranks: Ranks) -> None:
    ranks.run(project_everywhere)


def test_metrics_on_every_placement(ranks: Ranks) -> None:
    ranks.run(metrics_everywhere)


def test_restore_on_every_placement(ranks: Ranks) -> None:
    ranks.run(restore_everywhere)


def test_lists_of_all_kinds_at_once(ranks: Ranks) -> None:
    ranks.run(project_lists)


def test_half_precision_leaks_no_more_than_on_one_rank(ranks: Ranks) -> None:
    for ours, alone in ranks.run(half_precision_leaks_no_more_than_on_one_rank):
        assert ours <= 1.05 * alone


def test_batches_and_batches_that_are_split(ranks: Ranks) -> None:
    ranks.run(batches)


def test_inference_mode_and_no_grad(two_ranks: Ranks) -> None:
    two_ranks.run(under_every_mode)


def test_master_weights_have_the_bits_of_one_rank(ranks: Ranks) -> None:
    ranks.run(round_everywhere)


def test_fsdp_over_tensor_parallelism(four_ranks: Ranks) -> None:
    four_ranks.run(project_under_tensor_parallelism)

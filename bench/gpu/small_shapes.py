"""Runs every GPU path once on small shapes, for compute-sanitizer, and checks the results roughly.

python bench/gpu/small_shapes.py
python bench/gpu/small_shapes.py --own     # the CUDA C++ kernels alone: with all others racecheck takes over a minute
"""

from __future__ import annotations

import argparse
import os

import torch

import sculpt_ops
from sculpt_ops import reference
from sculpt_ops.bench.rows import basis
from sculpt_ops.bench.timing import backend
from sculpt_ops.ops.variants import cuda_missing

DEVICE = torch.device(os.environ.get("SCULPT_TEST_DEVICE", "cuda"))
FLAGS = ({}, {"keep_left": True}, {"keep_right": True}, {"block": True})


def close(out: torch.Tensor, exact: torch.Tensor) -> None:
    assert float((out.double() - exact).norm()) <= 2e-2 * float(exact.norm()) + 1e-6


def projections(variant: str, dtype: torch.dtype) -> None:
    with backend(variant):
        for m, n, r, s in ((96, 160, 16, 32), (70, 45, 7, 5)):
            grad = torch.randn(m, n, device=DEVICE).bfloat16()
            left, right = basis(m, r, dtype, DEVICE), basis(n, s, dtype, DEVICE)
            for flags in FLAGS:
                exact = reference.project(grad.double(), left.double(), right.double(), **flags)
                close(sculpt_ops.project(grad, left, right, **flags), exact)
            copies = [grad.clone(), grad.clone()]
            sculpt_ops.foreach_project_(copies, [left, left], [right, right])
            close(copies[1], reference.project(grad.double(), left.double(), right.double()))
            sculpt_ops.foreach_project_(copies, [left, None], [None, right])


def jacobi(matrices: torch.Tensor) -> None:
    ops = torch.ops.sculpt
    run = ops._cuda_jacobi_svd if DEVICE.type == "cuda" and cuda_missing() is None else ops._jacobi_svd
    U, S, V = run(matrices)
    close(U * S.unsqueeze(-2) @ V.mT, matrices.double())


def cuda_kernels() -> None:
    """What the CUDA C++ kernels can do: one matrix, a keep flag with one side alone; clusters on Hopper only."""
    hopper = torch.cuda.get_device_capability(DEVICE) == (9, 0)
    cases = [(left, right, {}) for left, right in ((True, False), (False, True)) if hopper]
    cases += [(left, right, {f"keep_{'left' if left else 'right'}": True}) for left, right, _ in cases]
    cases += [(True, True, {}), (True, True, {"block": True})]
    with backend("cuda"):
        for m, n, r, s in ((96, 160, 16, 32), (70, 45, 7, 5), (130, 600, 40, 70)):
            grad = torch.randn(m, n, device=DEVICE).bfloat16()
            for dtype in (grad.dtype, torch.float32):
                bases = basis(m, r, dtype, DEVICE), basis(n, s, dtype, DEVICE)
                for has_left, has_right, flags in cases:
                    too_wide = not has_left and dtype is torch.float32 and s > 64
                    if not (has_left and has_right) and (n % 8 or too_wide):  # what one side cannot do
                        continue
                    left, right = bases[0] if has_left else None, bases[1] if has_right else None
                    wide = [None if side is None else side.double() for side in (left, right)]
                    close(
                        sculpt_ops.project(grad, left, right, **flags), reference.project(grad.double(), *wide, **flags)
                    )
        if hopper:
            float16()
            side_lists()


def float16() -> None:
    """One side of float16 matrices, ranks with and without padding."""
    for r in (16, 70):
        grad = torch.randn(96, 160, device=DEVICE).half()
        left, right = (basis(length, r, torch.half, DEVICE) for length in grad.shape)
        for keep in (False, True):
            close(
                sculpt_ops.project(grad, left, keep_left=keep),
                reference.project(grad.double(), left.double(), keep_left=keep),
            )
            close(
                sculpt_ops.project(grad, None, right, keep_right=keep),
                reference.project(grad.double(), None, right.double(), keep_right=keep),
            )


def side_lists() -> None:
    """One launch for matrices of different extents and ranks, whose panels are divided anew; another with metrics."""
    sizes = ((96, 160, 16), (96, 8, 5), (96, 400, 33))
    given = [torch.randn(m, n, device=DEVICE).bfloat16() for m, n, _ in sizes]
    lefts = [basis(m, r, torch.bfloat16, DEVICE) for m, _, r in sizes]
    metrics = [torch.linalg.inv(left.double().mT @ left.double()) for left in lefts]
    for some in (metrics, None):
        grads = [grad.clone() for grad in given]
        listed = {"left_metrics": [metric.float() for metric in some]} if some else {}
        sculpt_ops.foreach_project_(grads, lefts, [None] * 3, **listed)
        for i, (grad, left) in enumerate(zip(given, lefts, strict=True)):
            own = some[i] if some else None
            close(grads[i], reference.project(grad.double(), left.double(), left_metric=own))


def others() -> None:
    """What Triton's kernels and library products do."""
    for variant, dtype in (("triton", torch.bfloat16), ("cublas", torch.bfloat16), ("cublas", torch.float32)):
        projections(variant, dtype)
    matrix = torch.randn(96, 64, device=DEVICE)
    sculpt_ops.orthonormalize(sculpt_ops.sketch(matrix, 16, seed=1))
    U, S, V = sculpt_ops.rsvd(matrix, 8)
    assert U.shape == (96, 8)
    assert V.shape == (64, 8)
    assert bool(S.isfinite().all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--own", action="store_true", help="the CUDA C++ kernels alone")
    given = parser.parse_args()
    torch.manual_seed(0)
    if DEVICE.type == "cuda" and cuda_missing() is None:
        cuda_kernels()
    if not given.own:
        others()
    for q in (5, 40):  # the second of rank 3: the factors are completed
        jacobi(torch.stack([torch.randn(q, q), torch.randn(q, 3) @ torch.randn(3, q)]).to(DEVICE))
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    print("small shapes: done")


if __name__ == "__main__":
    main()

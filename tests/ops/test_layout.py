"""What lists of tensors are looked up by."""

from __future__ import annotations

import torch
from torch import Tensor

import sculpt_ops  # noqa: F401  (the ops exist once the library is loaded)


def numbers(*tensors: Tensor) -> list[int]:
    found: list[int] = torch.ops.sculpt._layout(list(tensors)).tolist()
    return found


def test_matrices_are_told_apart_by_all_that_a_plan_depends_on() -> None:
    matrix = torch.zeros(4, 6)
    variants = [
        matrix,
        matrix.mT,
        matrix[:, 1:],
        matrix[1:],
        matrix[:3],
        matrix[:, :5],
        matrix[:, ::2],
        matrix.view(6, 4),
        matrix.view(torch.int32),
        matrix.clone(),
    ]
    found = {tuple(numbers(variant)) for variant in variants}
    assert len(found) == len(variants)
    alone = numbers(matrix)
    assert numbers(matrix, matrix) == alone * 2
    assert (alone[0], *alone[2:]) == (matrix.data_ptr(), 2, 4, 6, 6, 1)
    assert numbers() == []


def test_batches_and_vectors_are_told_apart_too() -> None:
    batch = torch.zeros(2, 4, 6)
    variants = [batch, batch.mT, batch[:1], batch[:, :3], batch.view(2, 6, 4), batch.view(4, 2, 6), batch.view(48)]
    assert len({tuple(numbers(variant)) for variant in variants}) == len(variants)

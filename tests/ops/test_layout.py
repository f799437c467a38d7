"""What lists of tensors are looked up by."""

from __future__ import annotations

import torch
from torch import Tensor

import sculpt_ops  # noqa: F401  (the ops exist once the library is loaded)


def numbers(*tensors: Tensor) -> list[list[int]]:
    found: list[list[int]] = torch.ops.sculpt._layout(list(tensors)).view(-1, 6).tolist()
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
    found = [tuple(entry) for entry in numbers(*variants)]
    assert len(set(found)) == len(variants)
    assert numbers(matrix, matrix) == [list(found[0])] * 2
    address, _, *rest = found[0]
    assert (address, *rest) == (matrix.data_ptr(), 4, 6, 6, 1)
    assert numbers() == []


def test_what_is_no_matrix_is_like_none() -> None:
    matrix = torch.zeros(4, 6)
    for other in (matrix.view(24), matrix[None], matrix[0, 0]):
        assert numbers(other)[0][2:] == [-1] * 4

"""Whether two tensors share memory: the rule in Python and, through the op, the one in C++ against all their bytes."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sculpt_ops
from sculpt_ops.ops.checks import _share_memory

BUFFER = torch.zeros(2000)


def bytes_of(tensor: Tensor) -> set[int]:
    size, found = tensor.element_size(), set()
    for index in itertools.product(*map(range, tensor.shape)):
        first = tensor.data_ptr() + size * sum(i * stride for i, stride in zip(index, tensor.stride(), strict=True))
        found.update(range(first, first + size))
    return found


@st.composite
def views(draw: st.DrawFn, dims: int | None = None) -> Tensor:
    count = dims or draw(st.integers(1, 3))
    sizes = [draw(st.integers(1, 5)) for _ in range(count)]
    strides = [draw(st.sampled_from([1, 2, 3, 5, 8, 16, 40])) for _ in range(count)]
    source = BUFFER if dims or draw(st.booleans()) else BUFFER.view(torch.bfloat16)
    return source.as_strided(sizes, strides, draw(st.integers(0, 60)))


@given(views(), views())
@settings(max_examples=400)
def test_every_byte(a: Tensor, b: Tensor) -> None:
    assert _share_memory(a, b) == bool(bytes_of(a) & bytes_of(b))


@given(views(dims=2), views(dims=2))
@settings(max_examples=400)
def test_the_op_refuses_what_shares_a_byte(a: Tensor, b: Tensor) -> None:
    said = ""
    try:
        torch.ops.sculpt.foreach_project_([a, b], [None, None], [None, None])
    except RuntimeError as error:
        said = str(error)
    # A view that could hold an element twice is refused first, by a simpler rule.
    assert "overlaps itself" in said or bool(said) == bool(bytes_of(a) & bytes_of(b))


def test_what_would_take_too_long_is_taken_to_share() -> None:
    strides = [2 * 3**i for i in range(6)]
    a = torch.zeros(40000).as_strided([40] * 6, strides)
    b = a.as_strided([40] * 6, strides, 1)
    assert _share_memory(a, b)
    with_room = torch.zeros(100)
    sculpt_ops.foreach_project_([with_room[:50].view(5, 10), with_room[50:].view(5, 10)], [None] * 2, [None] * 2)

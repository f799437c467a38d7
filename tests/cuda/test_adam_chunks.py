"""How the AdamW CUDA kernel deals tensors out to blocks: every element once, counts beyond 2^31 too."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sculpt_ops import _host

ENTRIES, CHUNK = 256, 2**14


def blocks_of(size: int) -> int:
    return -(-size // CHUNK)


@given(st.lists(st.integers(0, 10 * CHUNK), max_size=20).filter(any))
def test_every_element_is_in_one_block(sizes: list[int]) -> None:
    launches, _ = _host.adam_chunks(sizes, 0)
    assert launches == [(len(sizes), sum(map(blocks_of, sizes)))]
    places = [_host.adam_chunks(sizes, block)[1] for block in range(launches[0][1])]
    wanted = [(entry, begin) for entry, size in enumerate(sizes) for begin in range(0, size, CHUNK)]
    assert places == wanted
    assert all(a < b for a, b in pairwise(places))


def test_more_tensors_than_a_launch_has_room_for() -> None:
    launches, _ = _host.adam_chunks([1] * (2 * ENTRIES + 3), 0)
    assert launches == [(ENTRIES, ENTRIES), (ENTRIES, ENTRIES), (3, 3)]


def test_tensors_of_more_than_two_to_the_31_elements() -> None:
    size = 2**33 + 5
    launches, place = _host.adam_chunks([7, size, 9], blocks_of(size))
    assert launches == [(3, blocks_of(size) + 2)]
    assert place == (1, (blocks_of(size) - 1) * CHUNK)
    # A grid has at most 2^31 - 1 blocks.
    half = 2**30 * CHUNK
    assert [entries for entries, _ in _host.adam_chunks([half, half, 1], 0)[0]] == [1, 2]
    with pytest.raises(ValueError, match="no room"):
        _host.adam_chunks([2**31 * CHUNK], 0)

"""Work on many tensors, a bounded number of bytes at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

__all__ = ["in_buckets"]

Item = TypeVar("Item")


def in_buckets(items: Iterable[Item], nbytes: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """`items` in order, as many together as have at most `limit` bytes; a larger one alone."""
    bucket: list[Item] = []
    held = 0
    for item in items:
        size = nbytes(item)
        if bucket and held + size > limit:
            yield bucket
            bucket, held = [], 0
        bucket.append(item)
        held += size
    if bucket:
        yield bucket

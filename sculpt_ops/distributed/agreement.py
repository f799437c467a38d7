"""A group of ranks, and what they have to agree on: an error that one of them meets is raised on all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.distributed as dist

from ..ops.finite import LinAlgError

__all__ = ["Ranks", "collective"]


# Only what every rank can make of a message: other exceptions have arguments of their own.
_KNOWN = (ValueError, TypeError, LinAlgError, OSError, FileExistsError, FileNotFoundError, PermissionError)


class Ranks(NamedTuple):
    """A process group and this process's place in it."""

    group: Any
    rank: int
    size: int

    @classmethod
    def of(cls, group: Any) -> Ranks:
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def share(self, what: str, value: Any) -> list[Any]:
        """`value` of every rank; small Python objects."""
        values: list[Any] = [None] * self.size
        with collective(what):
            dist.all_gather_object(values, value, self.group)
        return values

    def each(self, what: str, work: Callable[[], Any]) -> Any:
        """What `work` returns here. An exception on any rank is raised on all."""
        kept: list[Any] = []
        self.together(what, lambda: kept.append(work()))
        return kept[0]

    def together(self, what: str, work: Callable[[], Any]) -> list[Any]:
        """What `work` returns on every rank. An exception on any of them is raised on all, the first rank's: a rank
        that left alone would let the others wait for it."""
        failure: Exception | None = None
        result = None
        try:
            result = work()
        except Exception as error:
            failure = error
        outcomes = self.share(what, (None if failure is None else (type(failure).__name__, str(failure)), result))
        for rank, (raised, _) in enumerate(outcomes):
            if raised is not None:
                kind, message = raised
                known = {k.__name__: k for k in _KNOWN}.get(kind)
                if failure is not None and rank == self.rank:
                    raise failure
                raise known(message) if known is not None else RuntimeError(f"{what}: rank {rank}: {kind}: {message}")
        return [value for _, value in outcomes]


@contextmanager
def collective(what: str) -> Iterator[None]:
    """Says what was being done when a collective fails."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{what}: a rank died, or did not come within the timeout of the process group; every rank must make the "
            f"same calls. {str(error).splitlines()[0]}"
        ) from error

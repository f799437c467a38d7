"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["check_folder", "replacing"]


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A name beside `path` to write to, which takes its place at the end of the block: a crash leaves what was there
    before, and an error nothing else. The name is the same each time, so that who goes on after a crash takes it up;
    shared: several processes write `path` at the same time, each under a name of its own."""
    own = f".{os.getpid()}" if shared else ""
    temporary = path.with_name(f"{path.name}{own}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_folder(path: str | Path, argument: str) -> None:
    """FileExistsError, which begins with `argument`, where `path` is no folder and cannot become one."""
    path = Path(path)
    there = next((each for each in (path, *path.absolute().parents) if each.exists()), None)
    if there is not None and not there.is_dir():
        raise FileExistsError(f"{argument}: {there} is a file, wanted a folder")

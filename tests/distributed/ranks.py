"""Functions run on several ranks at once: processes with a gloo group, kept from one test to the next."""

from __future__ import annotations

import datetime
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

__all__ = ["Failure", "Ranks"]

# A collective that a rank does not come to ends after this, with an error and not with a hang.
COLLECTIVE_SECONDS = 30


@dataclass(frozen=True)
class Failure:
    """What a rank raised: the exception's type by name, its message, and where it came from."""

    kind: str
    message: str
    trace: str


class Ranks:
    """`size` processes in one gloo group, one thread each; `run` calls a function on all of them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._workers: list[tuple[BaseProcess, Connection]] = []

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
        """What `function(*arguments)`, importable by name, returned on each rank. AssertionError with the first trace
        if a rank raised."""
        results = self.attempt(function, *arguments, timeout=timeout)
        failed = {rank: result for rank, result in enumerate(results) if isinstance(result, Failure)}
        for rank, failure in failed.items():
            raise AssertionError(f"ranks {sorted(failed)} of {self.size} raised; rank {rank}:\n{failure.trace}")
        return results

    def errors(self, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Failure]:
        """What every rank raised. AssertionError if one did not."""
        results = self.attempt(function, *arguments, timeout=timeout)
        assert all(isinstance(result, Failure) for result in results), f"a rank raised nothing: {results}"
        return results

    def attempt(self, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
        """What each rank returned, or its `Failure`. AssertionError if a rank is not done in time."""
        if not self._workers:
            self._start()
        for _, pipe in self._workers:
            pipe.send((function, arguments))
        results: list[Any] = []
        for rank, (process, pipe) in enumerate(self._workers):
            if not pipe.poll(timeout):
                self.stop()
                raise AssertionError(f"{function.__name__}: rank {rank} is not done after {timeout} s")
            try:
                results.append(pipe.recv())
            except EOFError:
                process.join(5)
                results.append(Failure("EOFError", f"rank {rank} died with exit code {process.exitcode}", ""))
        # After a failure the ranks may be at different collectives.
        if any(isinstance(result, Failure) for result in results):
            self.stop()
        return results

    def stop(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
        for process, _ in self._workers:
            process.join(10)
        self._workers = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = str(Path(tempfile.mkdtemp()) / "store")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.size, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))


def _work(rank: int, size: int, store: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=COLLECTIVE_SECONDS),
    )
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            result = function(*arguments)
        except BaseException as error:
            result = Failure(type(error).__name__, str(error), traceback.format_exc())
        pipe.send(result)

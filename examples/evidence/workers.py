"""Works a queue off, in this process or in several at once, until it is empty or the time is up."""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import connection, get_context
from typing import Any

from jobs import Job, Queue

__all__ = ["work_off"]


def work_off(queue: Queue, run: Callable[[Job], str], count: int = 1, seconds: float | None = None) -> int:
    """Run what `queue` has and print a line each; returns how many failed.

    run: with `count` > 1 something that can be pickled. seconds: after so many nothing begins any more; what has begun
    ends.
    """
    end = None if seconds is None else time.monotonic() + seconds

    def take() -> Job | None:
        return None if end is not None and time.monotonic() >= end else queue.next()

    if count > 1:
        return _in_processes(queue, run, count, take)
    failed = 0
    while (job := take()) is not None:
        good, line = _attempt(run, job)
        failed += not good
        queue.done(job)
        print(line, flush=True)
    return failed


def _attempt(run: Callable[[Job], str], job: Job) -> tuple[bool, str]:
    try:
        return True, run(job)
    except Exception:
        # One configuration that diverges, or runs out of memory, is not to end all the others.
        return False, f"{job.label}: FAILED\n{traceback.format_exc()}"


def _in_processes(queue: Queue, run: Callable[[Job], str], count: int, take: Callable[[], Job | None]) -> int:
    failed = 0
    idle = [_Worker(run, count) for _ in range(count)]
    busy: dict[Any, tuple[_Worker, Job]] = {}
    # The choice after the development runs needs it, and is not to wait for it then.
    threading.Thread(target=importlib.import_module, args=("tables",), daemon=True).start()
    try:
        while True:
            while idle and (job := take()) is not None:
                worker = idle.pop()
                worker.pipe.send(job)
                busy[worker.pipe] = worker, job
            if not busy:
                return failed
            for pipe in connection.wait(list(busy)):
                worker, job = busy.pop(pipe)
                try:
                    good, line = worker.pipe.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    good, line = False, f"{job.label}: FAILED, its process ended with {worker.process.exitcode}"
                    worker = _Worker(run, count)
                failed += not good
                queue.done(job)
                idle.append(worker)
                print(line, flush=True)
    finally:
        for worker in (*idle, *(worker for worker, _ in busy.values())):
            worker.stop()


class _Worker:
    """A process that keeps its imports and its GPU from one job to the next."""

    def __init__(self, run: Callable[[Job], str], count: int) -> None:
        # A process forked after torch has been used would share its threads' locks, and could not use a GPU.
        context = get_context("spawn")
        self.pipe, end = context.Pipe()
        threads = max(1, (os.cpu_count() or 1) // count)
        self.process = context.Process(target=_serve, args=(end, run, threads), daemon=True)
        self.process.start()
        end.close()

    def stop(self) -> None:
        with suppress(OSError):
            self.pipe.send(None)
        self.process.join(10)
        if self.process.is_alive():
            self.process.terminate()


def _serve(pipe: Any, run: Callable[[Job], str], threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    while True:
        try:
            job = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            sys.exit(1)
        if job is None:
            return
        pipe.send(_attempt(run, job))

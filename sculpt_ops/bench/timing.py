"""Times calls on a GPU (on a CPU to try the machinery): inputs that outgrow L2, contenders in turn, graph replays."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

__all__ = ["Ceilings", "Contender", "backend", "copies_beyond_l2", "measure", "measure_ceilings", "synchronize"]

# Calls of a round shorter than this are captured and replayed: a launch from Python takes tens of microseconds.
GRAPH_SECONDS = 1e-3
ROUNDS = 5
# A call longer than this is timed twice only, and one that is so by its nature and takes seconds is not warmed up.
SLOW_SECONDS = 60e-3
ONCE_SECONDS = 1.0


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """SCULPT_BACKEND inside; None leaves the choice to the heuristics."""
    before = os.environ.pop("SCULPT_BACKEND", None)
    if name is not None:
        os.environ["SCULPT_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("SCULPT_BACKEND", None)
        if before is not None:
            os.environ["SCULPT_BACKEND"] = before


def copies_beyond_l2(bytes_of_one: int, device: torch.device) -> int:
    """Inputs to rotate among, so that more than three times L2 lies between two uses of one."""
    if device.type != "cuda":
        return 2
    l2 = int(torch.cuda.get_device_properties(device).L2_cache_size)
    return 3 * l2 // max(bytes_of_one, 1) + 2


@dataclass
class Contender:
    """call(i) works on the i-th of the rotating inputs. backend: SCULPT_BACKEND while it runs.

    once: it compiles nothing, so that where the first call takes seconds, its time is the result.
    """

    name: str
    call: Callable[[int], Any]
    backend: str | None = None
    once: bool = False


class Prepared(NamedTuple):
    """run: one call on each input. graph: whether that replays a graph. rounds: how often to time it yet.

    first: seconds of a call that took too long to be repeated.
    """

    run: Callable[[], Any]
    graph: bool
    rounds: int
    first: float | None = None


@dataclass(frozen=True)
class Ceilings:
    """What this device does: bytes read plus written in a large copy, operations in a large square product."""

    bytes_per_s: float
    half_flops: float
    float32_flops: float

    def floor(self, bytes_moved: float, operations: float, dtype: torch.dtype) -> float:
        """Least seconds."""
        rate = self.half_flops if dtype.itemsize == 2 else self.float32_flops
        return max(bytes_moved / self.bytes_per_s, operations / rate)


def elapsed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds between two events of the device around run, or of the clock."""
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin_event.record()
    run()
    end_event.record()
    end_event.synchronize()
    return float(begin_event.elapsed_time(end_event)) * 1e-3


def captured(contender: Contender, count: int) -> Callable[[], Any]:
    """A graph of one call on each input; raises where something in it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    with backend(contender.backend), torch.cuda.graph(graph):
        for i in range(count):
            contender.call(i)
    return graph.replay


def prepared(contender: Contender, count: int, device: torch.device, rounds: int) -> Prepared:
    """Warmed up, captured if it is short."""

    def run() -> None:
        with backend(contender.backend):
            for i in range(count):
                contender.call(i)

    begin = time.perf_counter()
    run()
    synchronize(device)
    first = (time.perf_counter() - begin) / count
    if contender.once and first > ONCE_SECONDS:
        return Prepared(run, False, 0, first)
    if device.type != "cuda":
        return Prepared(run, False, min(rounds, 2) if first > SLOW_SECONDS else rounds)
    call = elapsed(run, device) / count
    if call < GRAPH_SECONDS:
        try:
            return Prepared(captured(contender, count), True, rounds)
        except RuntimeError:
            synchronize(device)
    return Prepared(run, False, min(rounds, 2) if call > SLOW_SECONDS else rounds)


def measure(
    contenders: list[Contender], count: int, device: torch.device, rounds: int = ROUNDS
) -> dict[str, dict[str, Any]]:
    """Every round times each contender once over all inputs, in turn. A contender that fails says so in its entry."""
    ready: dict[str, Prepared] = {}
    entries: dict[str, dict[str, Any]] = {}
    for contender in contenders:
        try:
            ready[contender.name] = prepared(contender, count, device, rounds)
        except Exception as error:
            entries[contender.name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    seconds: dict[str, list[float]] = {name: [] if it.first is None else [it.first] for name, it in ready.items()}
    for i in range(rounds):
        for name, it in ready.items():
            if i < it.rounds:
                seconds[name].append(elapsed(it.run, device) / count)
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        entries[name] = {"us": middle * 1e6, "us_low": low * 1e6, "us_high": high * 1e6, "graph": ready[name].graph}
        entries[name]["rounds"] = len(values)
    return {contender.name: entries[contender.name] for contender in contenders}


def measure_ceilings(device: torch.device, small: bool) -> Ceilings:
    """small: sizes for a CPU, whose figures say nothing of a GPU."""
    elements, side = (2**20, 256) if small else (2**29, 8192)
    source = torch.empty(elements, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)

    def rate(call: Callable[[], Any], work: float) -> float:
        call()
        synchronize(device)
        return work / statistics.median(elapsed(call, device) for _ in range(5))

    copy = rate(lambda: target.copy_(source), 4.0 * elements)
    products = []
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        products.append(rate(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), 2.0 * side**3))  # type: ignore[misc]
    return Ceilings(copy, *products)

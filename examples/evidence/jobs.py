"""Which runs there are, and in what order they may begin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from protocol import Protocol, Settings

STAGES = ("entry", "dev", "final", "ablation")


@dataclass(frozen=True)
class Job:
    """One run. part: one of `STAGES`, the folder of its result. config: the name of `settings`. order: of `tasks`."""

    part: str
    method: str
    config: str
    order: str
    seed: int
    tasks: tuple[str, ...] = field(compare=False)
    settings: Settings = field(compare=False)

    @property
    def name(self) -> str:
        return f"{self.method}, {self.config}, {self.order}, seed {self.seed}"

    @property
    def label(self) -> str:
        return f"{self.part}: {self.name}"

    @property
    def folder(self) -> str:
        """Of its task folders."""
        return "dev" if self.part == "ablation" else self.part

    def result(self, results: Path) -> Path:
        return results / self.part / f"{self.name}.json.gz"


def entry_jobs(protocol: Protocol) -> Iterator[Job]:
    """Each task alone."""
    for rate in protocol.entry_rates:
        for task in protocol.datasets:
            alone = {**protocol.common, "protect": "none", "lr": rate}
            yield Job("entry", "plain", f"lr {rate:g}", task, 0, (task,), alone)


def dev_jobs(protocol: Protocol, methods: Sequence[str]) -> Iterator[Job]:
    """The first configuration of every method on the development order, then the second: a search cut short is cut
    short for all."""
    methods = [method for method in methods if method not in protocol.settled]
    for number in range(max((len(protocol.configs[method]) for method in methods), default=0)):
        for method in methods:
            if number < len(protocol.configs[method]):
                config, own = list(protocol.configs[method].items())[number]
                settings = {**protocol.common, **own}
                yield Job("dev", method, config, "dev", 0, tuple(protocol.dev_order), settings)


def final_jobs(protocol: Protocol, method: str, config: str) -> list[Job]:
    settings = {**protocol.common, **protocol.configs[method][config]}
    return [
        Job("final", method, config, order, seed, tuple(tasks), settings)
        for seed in protocol.seeds
        for order, tasks in protocol.orders.items()
    ]


def ablation_jobs(protocol: Protocol) -> Iterator[Job]:
    for config, own in protocol.ablations.items():
        yield Job("ablation", "sculpt", config, "dev", 0, tuple(protocol.dev_order), {**protocol.common, **own})


class Queue:
    """Jobs without a result, in the order they are to begin.

    After the entry and development runs come those of the comparison, seed by seed and order by order over all methods,
    so that what is there when time runs out can be compared; a method's wait until all of its configurations are
    through. All this first for `Protocol.foremost`, where there are such. What has to wait lets the next begin.
    """

    def __init__(self, protocol: Protocol, stage: str, results: Path, only: str | None = None) -> None:
        self._protocol, self._results, self._only = protocol, results, only
        self._first = [
            self._missing(dev_jobs(protocol, methods)) if stage in ("dev", "all") else [] for methods in protocol.tiers
        ]
        if stage in ("entry", "all"):
            self._first[0][:0] = self._missing(entry_jobs(protocol))
        self._last = self._missing(ablation_jobs(protocol)) if stage in ("ablation", "all") else []
        # Of every method that has been chosen for; a method's place is that of the protocol.
        self._finals: dict[str, list[Job]] = {}
        self._undecided = list(protocol.configs) if stage in ("final", "all") else []
        self._running: list[Job] = []

    def next(self) -> Job | None:
        """The job to begin now; None if there is none, or none that need not wait for others."""
        job = self._choose()
        if job is not None:
            self._running.append(job)
        return job

    def _choose(self) -> Job | None:
        for first, methods in zip(self._first, self._protocol.tiers, strict=True):
            if first:
                return first.pop(0)
            if (job := self._next_final(methods)) is not None:
                return job
        return self._last.pop(0) if self._last and not self._undecided else None

    def done(self, job: Job) -> None:
        """To be called when a job has ended, well or not."""
        self._running.remove(job)

    def _next_final(self, methods: Sequence[str]) -> Job | None:
        self._decide()
        begins = [jobs[0] for method in methods if (jobs := self._finals.get(method))]
        if not begins:
            return None
        places = [(seed, order) for seed in self._protocol.seeds for order in self._protocol.orders]
        job = min(begins, key=lambda job: places.index((job.seed, job.order)))
        self._finals[job.method].remove(job)
        return job

    def _decide(self) -> None:
        """Choose for the methods whose last development run has ended; one without a result is left out."""
        busy = {job.method for job in (*chain(*self._first), *self._running) if job.part == "dev"}
        ready = [method for method in self._undecided if method not in busy]
        if ready:
            # Only here: with several processes this one begins before torch is there.
            from tables import choose

            chosen = choose(self._results, self._protocol)
            for method in ready:
                self._undecided.remove(method)
                if method in chosen:
                    self._finals[method] = self._missing(final_jobs(self._protocol, method, chosen[method]))

    def _missing(self, jobs: Iterator[Job] | list[Job]) -> list[Job]:
        return [
            job
            for job in jobs
            if not job.result(self._results).exists() and (self._only is None or self._only in job.name)
        ]

"""The tables of `communication.py` as Markdown, with estimates of the time at the rates of a DGX H100."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from communication import Load, Model, passes, set_up, step, sums_by_owner, theirs_set_up, theirs_step

from sculpt_ops.distributed.exchange import assign_owners

__all__ = ["BEGIN", "END", "check", "tables"]

BEGIN, END = "<!-- begin: python bench/communication.py -->\n", "<!-- end -->"

# Bytes a second that a GPU sends, one way, at full rate: NVIDIA's DGX H100 data sheet has 900 GB/s of NVLink a GPU,
# both ways together, and one 400 Gb/s InfiniBand adapter (ConnectX-7) a GPU.
NVLINK = 450e9
INFINIBAND = 50e9
# Operations a second of bfloat16 products, as docs/memory.md assumes them; products of float32 take several.
PRODUCTS = 790e12
NODE = 8
SHARES = (0.25, 0.5, 0.75)
MODELS = ("llama-2-7b", "llama-2-70b")


@dataclass(frozen=True)
class Layout:
    """`size` GPUs that the weights are sharded over, and as many times that as there are `replicas` (HSDP)."""

    size: int
    replicas: int = 1

    @property
    def across(self) -> bool:
        """Whether the shards of a weight lie on several nodes."""
        return self.size > NODE

    def __str__(self) -> str:
        if self.replicas > 1:
            return f"{self.size * self.replicas}, shards in a node"
        return f"{self.size}, flat" if self.across else str(self.size)


LAYOUTS = (Layout(8), Layout(64), Layout(8, 8), Layout(1024), Layout(8, 128))
# Replicas do the same work: what is sent is that of one node.
SHARDED = (Layout(8), Layout(64), Layout(1024))


def milliseconds(load: Load, layout: Layout) -> float:
    """At full rates, for the rank that has most to send or receive. In a ring over nodes the adapters of a node carry
    the stream together; in an all-to-all each GPU has its own alone, for all but what stays in the node."""
    direct = max(*load.sent, *load.received)
    if not layout.across:
        return 1e3 * (direct + load.ring) / NVLINK
    leaving = direct * (layout.size - NODE) / (layout.size - 1)
    return 1e3 * (leaving / INFINIBAND + load.ring / min(NVLINK, NODE * INFINIBAND))


def passes_milliseconds(gathered: int, reduced: int, layout: Layout) -> float:
    inside, between = passes(gathered, reduced, layout.size, layout.replicas)
    rate = min(NVLINK, NODE * INFINIBAND) if layout.across else NVLINK
    return 1e3 * (inside / rate + between / INFINIBAND)


@cache
def model_of(name: str) -> Model:
    return Model.of(name)


@cache
def ours(name: str, layout: Layout, protect: float = 0.5, grad_bytes: int = 4, decay: bool = False) -> Load:
    model = model_of(name)
    return step(model.shapes, model.ranks(protect), layout.size, grad_bytes=grad_bytes, decay=decay)


@cache
def theirs(name: str, layout: Layout, protect: float) -> Load:
    model = model_of(name)
    return theirs_step(model.shapes, model.ranks(protect), layout.size)


def tables() -> str:
    """All of them; what stands between the marks of docs/distributed.md."""
    theirs = [f"theirs, {share:g}" for share in SHARES]
    parts = [
        "GB sent by a rank in a step, float32 weights and gradients, and collectives; last, for scale, the passes of "
        "FSDP2 itself (bfloat16 gathers, float32 reduction):",
        rows_of(sent_a_step, SHARDED, "ours", "busiest", "weight decay", "calls", *theirs, "calls", "passes"),
        "**Estimated, not measured:** milliseconds at full rate, nothing overlapped, of that communication, of the "
        "passes', and of the projections' operations on the busiest rank:",
        rows_of(
            *(estimates, LAYOUTS, "ours", "weight decay", "theirs, 0.5", "passes, ours", "theirs, 0.5"),
            *("projections, ours", "theirs"),
        ),
        "Few protected directions, `Rank(64)`, both sides: matrices projected in place, GB sent in a step:",
        rows_of(few_directions, SHARDED, "in place", "full", "busiest", "calls", "subspace", "busiest"),
        "Setting up from float32 weights: GB sent by a rank, collectives, and the decompositions (cost m n min(m, n)) "
        "of the busiest rank over the mean:",
        rows_of(
            setting_up, SHARDED, "ours", "busiest", "calls", "work", "theirs, first rank", "others", "calls", "work"
        ),
    ]
    return "\n\n".join(parts) + "\n"


def rows_of(cells: Callable[[str, Layout], Iterator[str]], layouts: Sequence[Layout], *headings: str) -> str:
    lines = ["| model | GPUs | " + " | ".join(headings) + " |", "|---|---|" + "---:|" * len(headings)]
    lines += [
        f"| {name} | {layout} | " + " | ".join(cells(name, layout)) + " |" for name in MODELS for layout in layouts
    ]
    return "\n".join(lines)


def sent_a_step(name: str, layout: Layout) -> Iterator[str]:
    model, load = model_of(name), ours(name, layout)
    yield from (gigabytes(load.mean), gigabytes(load.largest), gigabytes(ours(name, layout, decay=True).mean))
    yield str(load.collectives)
    yield from (gigabytes(theirs(name, layout, share).largest) for share in SHARES)
    yield str(theirs(name, layout, 0.5).collectives)
    yield gigabytes(sum(passes(model.parameters, model.parameters, layout.size)))


def estimates(name: str, layout: Layout) -> Iterator[str]:
    model, flat = model_of(name), layout.replicas == 1
    yield from (figure(milliseconds(ours(name, layout, decay=decay), layout)) for decay in (False, True))
    yield figure(milliseconds(theirs(name, layout, 0.5), layout)) if flat else "-"
    yield figure(passes_milliseconds(model.parameters, model.parameters, layout))
    yield figure(passes_milliseconds(*model.factors(0.5), layout)) if flat else "-"
    owners = assign_owners(model.shapes, layout.size)
    # Gradient and step, each 4 m n (r + s); of theirs the factors, whose rows every rank has its share of.
    half = [min(shape) // 2 for shape in model.shapes]
    mine = [2 * 4 * m * n * 2 * k for (m, n), k in zip(model.shapes, half, strict=True)]
    yield figure(1e3 * max(sums_by_owner(owners, mine, layout.size)) / PRODUCTS)
    other = sum(2 * 4 * k * k * (m + n) for (m, n), k in zip(model.shapes, half, strict=True)) / layout.size
    yield figure(1e3 * other / PRODUCTS) if flat else "-"


def few_directions(name: str, layout: Layout) -> Iterator[str]:
    model, few = model_of(name), 64
    ranks = [few] * len(model.shapes)
    in_place = sum(2 * layout.size * few <= m for m, _ in model.shapes)
    full, subspace = (step(model.shapes, ranks, layout.size, state=state) for state in ("full", "subspace"))
    yield f"{in_place} of {len(model.shapes)}"
    yield from (gigabytes(full.mean), gigabytes(full.largest), str(full.collectives))
    yield from (gigabytes(subspace.mean), gigabytes(subspace.largest))


def setting_up(name: str, layout: Layout) -> Iterator[str]:
    model = model_of(name)
    mine, other = set_up(model.shapes, model.ranks(0.5), layout.size), theirs_set_up(model.shapes, layout.size)
    yield from (gigabytes(mine.mean), gigabytes(mine.largest), str(mine.collectives))
    yield figure(imbalance(model, assign_owners(model.shapes, layout.size), layout.size))
    yield from (gigabytes(other.each[0]), gigabytes(max(other.each[1:])), str(other.collectives))
    count = len(model.shapes) // layout.size
    workers = [min(i // count, layout.size - 1) if count else layout.size - 1 for i in range(len(model.shapes))]
    yield figure(imbalance(model, workers, layout.size))


def imbalance(model: Model, owners: Sequence[int], size: int) -> float:
    """Of what the busiest rank has to do, and of the mean."""
    loads = sums_by_owner(owners, [m * n * min(m, n) for m, n in model.shapes], size)
    return max(loads) * size / sum(loads)


def gigabytes(nbytes: float) -> str:
    return figure(nbytes / 1e9)


def figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def check(document: Path) -> int:
    """0 if `document` holds the tables as they are now."""
    _, _, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    same = rest.partition(END)[0].strip() == tables().strip()
    print(f"{document.name}: the tables are " + ("up to date" if same else "not those of bench/communication.py"))
    return 0 if same else 1

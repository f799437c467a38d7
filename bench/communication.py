"""What the ranks of a group send: a step and a set-up of ours, of mini_trainer's scheme, and FSDP2's own passes.

    python bench/communication.py            # the tables of docs/distributed.md
    python bench/communication.py --check    # whether they are what stands there

Bytes are those of the usual algorithms (`sculpt_ops.distributed.traffic`), exact but for the exchange of small Python
objects while setting up; the tests hold them against counted ones. Of mini_trainer 0.9.0 the collectives are those of
mini_trainer/osft_utils.py.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

from conftest import ROOT

from sculpt_ops.buckets import in_buckets
from sculpt_ops.continual.plan.models import KNOWN_MODELS
from sculpt_ops.distributed.exchange import Place, _buckets, assign_owners
from sculpt_ops.distributed.layers import _rounds
from sculpt_ops.distributed.op_collectives import BUCKET_BYTES
from sculpt_ops.distributed.op_exchange import chunk
from sculpt_ops.distributed.sharding import moves_to_owner
from sculpt_ops.distributed.traffic import all_gather_bytes, all_reduce_bytes, reduce_scatter_bytes
from sculpt_ops.optim.rows import BUCKET_BYTES as STEP_BYTES
from sculpt_ops.optim.rows import SHARDED_BUCKETS

Shape = tuple[int, int]
# A matrix and the rank that owns it.
Owned = tuple[Shape, int]


@dataclass(frozen=True)
class Load:
    """Bytes that every rank of a group sends and receives, and the collectives that each of them takes part in.

    sent, received: of every rank in all-to-alls, or from one rank to another. ring: that every rank sends in rings.
    """

    sent: list[int]
    received: list[int]
    ring: int
    collectives: int

    @property
    def each(self) -> list[int]:
        return [sent + self.ring for sent in self.sent]

    @property
    def mean(self) -> float:
        return sum(self.each) / len(self.each)

    @property
    def largest(self) -> int:
        return max(self.each)

    def __add__(self, other: Load) -> Load:
        sent = [a + b for a, b in zip(self.sent, other.sent, strict=True)]
        received = [a + b for a, b in zip(self.received, other.received, strict=True)]
        return Load(sent, received, self.ring + other.ring, self.collectives + other.collectives)


def step(
    shapes: Sequence[Shape],
    rank: Sequence[int],
    size: int,
    *,
    sides: Literal["both", "left", "right"] = "both",
    state: Literal["full", "subspace"] = "full",
    grad_bytes: int = 4,
    decay: bool = False,
) -> Load:
    """`AdamW.step` of matrices sharded by rows over `size` ranks, `rank` of each protected; float32 steps."""
    owners = assign_owners(shapes, size)
    away: list[Owned] = []
    coefficients: list[tuple[Shape, int]] = []
    for (m, n), k, owner in zip(shapes, rank, owners, strict=True):
        width = 0 if sides == "right" else min(k, m - k)
        if state == "subspace" or moves_to_owner(m, n, width, size):
            away.append(((m, n), owner))
        elif width:
            # Where the narrow space on the right is kept, sums are taken of what is left of the matrix there.
            coefficients.append(((m, n), 4 * width * (n - k if sides == "both" and n - k < k else n)))
    load = Load([0] * size, [0] * size, 0, 0)
    if away:
        kinds = 1 if not decay or grad_bytes == 4 else 2  # a collective a dtype
        load += moved(away, size, grad_bytes + 4 * decay) + moved(away, size, 4, back=True)
        load += Load([0] * size, [0] * size, 0, (kinds + 1) * len(_buckets(places(away), size)))
    together = [[nbytes for _, nbytes in coefficients], *step_buckets(coefficients, size)]
    sums = [sum(part) for bucket in together for part in in_buckets(bucket, int, BUCKET_BYTES)]
    ring = sum(all_reduce_bytes(nbytes, size) for nbytes in sums)
    return load + Load([0] * size, [0] * size, ring, len(sums))


def set_up(shapes: Sequence[Shape], rank: Sequence[int], size: int, *, weight_bytes: int = 4) -> Load:
    """`Subspaces.from_model`, both sides: weights to their owners, without the few KB of Python objects that each round
    shares in two all-gathers, as does the check for NaN; then bases to where matrices are projected in place."""
    owners = assign_owners(shapes, size)
    owned = list(zip(shapes, owners, strict=True))
    rounds = len(_rounds({str(i): place for i, place in enumerate(places(owned))}, size))
    load = moved(owned, size, weight_bytes) + Load([0] * size, [0] * size, 0, 3 * rounds + 2)
    here = [
        (shape, k, owner)
        for (shape, owner), k in zip(owned, rank, strict=True)
        if not moves_to_owner(*shape, min(k, shape[0] - k), size)
    ]
    left: list[Owned] = [((m, min(k, m - k)), owner) for (m, _), k, owner in here]
    load += moved(left, size, 4, back=True) + Load([0] * size, [0] * size, 0, bool(left))
    right = sums_by_owner([owner for *_, owner in here], [4 * n * min(k, n - k) for (_, n), k, _ in here], size)
    for root, nbytes in enumerate(right):
        # A chain from the owner on; the last rank of it sends nothing.
        sent = [nbytes if (each + 1) % size != root else 0 for each in range(size)]
        received = [nbytes if each != root else 0 for each in range(size)]
        load += Load(sent, received, 0, bool(nbytes))
    return load


def sums_by_owner(owners: Sequence[int], values: Sequence[int], size: int) -> list[int]:
    """The sum of every owner's `values`."""
    sums = [0] * size
    for owner, value in zip(owners, values, strict=True):
        sums[owner] += value
    return sums


def places(owned: Sequence[Owned]) -> list[Place]:
    """As far as their buckets depend on them."""
    return [Place(shape, cast(Any, None), owner) for shape, owner in owned]


def moved(owned: Sequence[Owned], size: int, itemsize: int, *, back: bool = False) -> Load:
    """All shards of matrices to their owners, or `back`."""
    out, into = [0] * size, [0] * size
    for (m, n), owner in owned:
        for rank, rows in enumerate(shares(m, size)):
            if rank != owner:
                out[rank] += rows * n * itemsize
                into[owner] += rows * n * itemsize
    return Load(into, out, 0, 0) if back else Load(out, into, 0, 0)


@cache
def shares(length: int, size: int) -> tuple[int, ...]:
    """Rows on every rank."""
    return tuple(chunk(length, rank, size)[1] for rank in range(size))


def step_buckets(coefficients: Sequence[tuple[Shape, int]], size: int) -> list[list[int]]:
    """Bytes of coefficients of the matrices that are stepped together, as `optim.rows` has it."""
    total, before = sum(4 * m * n for (m, n), _ in coefficients), 0
    count = min(max(-(-total // (size * STEP_BYTES)), 1), SHARDED_BUCKETS)
    buckets: list[list[int]] = [[] for _ in range(count)]
    for (m, n), nbytes in coefficients:
        buckets[count * before // total].append(nbytes)
        before += 4 * m * n
    return buckets


def theirs_step(shapes: Sequence[Shape], rank: Sequence[int], size: int, itemsize: int = 4) -> Load:
    """mini_trainer's `project_gradients` and `project_parameters`: each sums U_highᵀ U_low of all matrices in one
    all-reduce, and gathers V_high (k x n, split by rows, padded to as many on each rank) matrix by matrix.
    `OSFT_CACHE_V=1`, which keeps all V_high whole on every rank, would leave the all-reduces."""
    sums = sum(k * (min(shape) - k) for shape, k in zip(shapes, rank, strict=True)) * itemsize
    gathered = [-(-k // size) * size * n * itemsize for (_, n), k in zip(shapes, rank, strict=True)]
    ring = all_reduce_bytes(sums, size) + sum(all_gather_bytes(nbytes, size) for nbytes in gathered)
    return Load([0] * size, [0] * size, 2 * ring, 2 * (1 + len(shapes)))


def theirs_set_up(shapes: Sequence[Shape], size: int, itemsize: int = 4) -> Load:
    """mini_trainer's `compute_distributed_svd`: the first rank sends each rank an equal number of matrices, takes their
    factors back and broadcasts the factors of all matrices, whole, to all ranks."""
    count = len(shapes) // size
    sent, received = [0] * size, [0] * size
    for index, (m, n) in enumerate(shapes):
        worker = min(index // count, size - 1) if count else size - 1
        if worker:
            factors = (m + n + 1) * min(m, n) * itemsize
            sent[0], received[worker] = sent[0] + m * n * itemsize, received[worker] + m * n * itemsize
            sent[worker], received[0] = sent[worker] + factors, received[0] + factors
    whole = sum((m + n + 1) * min(m, n) for m, n in shapes) * itemsize
    # Of each: names and data to every rank, and back; a barrier after each. Factors are broadcast one by one.
    return Load(sent, received, whole, 5 * (size - 1) + 6 * len(shapes))


def passes(gathered: int, reduced: int, size: int, replicas: int = 1) -> tuple[int, int]:
    """FSDP2's own bytes: bfloat16 weights gathered for the forward and the backward pass, float32 gradients reduced;
    of `replicas` also the all-reduce of the shards of gradients between them."""
    inside = 2 * all_gather_bytes(2 * gathered, size) + reduce_scatter_bytes(4 * reduced, size)
    return inside, all_reduce_bytes(math.ceil(4 * reduced / size), replicas)


@dataclass(frozen=True)
class Model:
    """name; shapes: of its protected matrices; others: number of all other parameters."""

    name: str
    shapes: list[Shape]
    others: int

    @classmethod
    def of(cls, name: str) -> Model:
        """A LLaMA of `KNOWN_MODELS`."""
        facts = KNOWN_MODELS[name]
        width, hidden, layers = facts["hidden_size"], facts["intermediate_size"], facts["num_hidden_layers"]
        kv = width * facts["num_key_value_heads"] // facts["num_attention_heads"]
        layer = [(width, width), (kv, width), (kv, width), (width, width), *[(hidden, width)] * 2, (width, hidden)]
        others = 2 * facts["vocab_size"] * width + (2 * layers + 1) * width
        return cls(name, layer * layers, others)

    @property
    def parameters(self) -> int:
        return sum(m * n for m, n in self.shapes) + self.others

    def ranks(self, protect: float) -> list[int]:
        return [int(protect * min(shape)) for shape in self.shapes]

    def factors(self, protect: float) -> tuple[int, int]:
        """Numbers that mini_trainer keeps in place of the weights, and those of them that it trains."""
        kept = [((m + n + 1) * min(m, n), (m + n + 1) * (min(m, n) - int(protect * min(m, n)))) for m, n in self.shapes]
        return sum(a for a, _ in kept) + self.others, sum(b for _, b in kept) + self.others


def main() -> None:
    from communication_table import check, tables

    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--check", action="store_true", help="compare with docs/distributed.md; status 1 if they differ")
    if made.parse_args().check:
        sys.exit(check(ROOT / "docs" / "distributed.md"))
    print(tables())


if __name__ == "__main__":
    main()

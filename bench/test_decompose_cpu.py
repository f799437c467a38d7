"""`rsvd`, `top_subspace` and `Subspaces.from_model` on the CPU against the decompositions that others use.

All in one run, interleaved, at torch's number of threads. Every row carries the error of every competitor, because a
time alone says nothing here; ratio: theirs / ours of the same round, median and quartiles.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import peers
import pytest
import torch
from accuracy import Bases, Factors, accuracy, model_energy
from interleave import Competitor, interleave
from profiled import product_shares
from tables import Row, Table
from torch import Tensor
from weights import Matrix, UnavailableError, bfloat16, decaying, hard, minilm, smollm2, smollm2_model

import sculpt_ops

Decompose = Callable[[Tensor, int], Factors]


def show(row: Row) -> list[str]:
    """Title, then one line a competitor; a line ends in AHEAD where `ahead` says so."""
    size = "{} x {}, rank {}".format(*row["shape"], row["rank"]) if "shape" in row else ""
    lines = ["", f"{row['op']}: {row['case']} {size}"]
    for entry in row["competitors"]:
        if "note" in entry:
            lines.append(f"    {entry['name']:<34} {entry['note']}")
            continue
        line = f"    {entry['name']:<34} {entry['ms']:9.1f} ms [{entry['ms_low']:.1f}, {entry['ms_high']:.1f}]"
        line += f"  {entry['ratio']:7.2f} [{entry['ratio_low']:.2f}, {entry['ratio_high']:.2f}]"
        line += "".join(f"  {key} {entry[key]:.4f}" for key in ("spectral", "frobenius", "energy") if key in entry)
        lines.append(line + ("  AHEAD" if ahead(entry, row["competitors"]) else ""))
    return lines + [f"    {what}: {value}" for what, value in row.get("facts", {}).items()]


def ahead(theirs: Row, entries: list[Row]) -> bool:
    """Whether a peer is faster than every call of ours that is as accurate: within 2 % in error, 0.5 % in energy."""

    def as_good(ours: Row) -> bool:
        errors = (ours[key] <= 1.02 * max(theirs[key], 1) for key in ("spectral", "frobenius") if key in theirs)
        return ours["ms"] <= theirs["ms"] and all(errors) and ours["energy"] >= 0.995 * theirs["energy"]

    return "energy" in theirs and not any(as_good(entry) for entry in entries if entry["name"].startswith("sculpt"))


TABLE = Table(
    file="decompose-cpu",
    heading="median ms [quartiles]  theirs / ours [quartiles]  errors over the optimum's, energy as a share of its",
    show=show,
    packages=peers.PACKAGES,
)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    with peers.same_threads():
        yield


def rsvd(matrix: Tensor, rank: int) -> Factors:
    return Factors(*sculpt_ops.rsvd(matrix, rank))


def top_subspace(matrix: Tensor, rank: int) -> Factors:
    found = sculpt_ops.top_subspace(matrix, rank)
    return Factors(found.left, None, found.right)


EXACT: dict[str, Decompose] = {"sculpt top_subspace": top_subspace}
OURS = {"sculpt rsvd": rsvd, **EXACT}
RANDOMIZED: dict[str, Decompose] = {
    "torch.svd_lowrank": peers.svd_lowrank,
    "scikit-learn randomized_svd": peers.scikit_learn,
    "scikit-learn randomized_svd, QR": partial(peers.scikit_learn, normalizer="QR"),
}
PROPACK: dict[str, Decompose] = {"scipy svds propack": partial(peers.scipy_svds, solver="propack")}
ITERATIVE = {"scipy svds arpack": partial(peers.scipy_svds, solver="arpack"), **PROPACK}
THIN: dict[str, Decompose] = {"torch.linalg.svd": peers.linalg_svd}
FULL: dict[str, Decompose] = {
    **THIN,
    "torch.linalg.svd, full_matrices": partial(peers.linalg_svd, full=True),
    "peft decompose_weight_matrix": peers.peft_decompose,
    "mini_trainer create_svd_dict": peers.mini_trainer_decompose,
}


@dataclass(frozen=True)
class Case:
    """slow: how many rounds the peers of ITERATIVE and FULL take part in, of `rounds` in all."""

    name: str
    make: Callable[[], Matrix]
    rank: int
    rounds: int
    slow: int


REAL = [
    Case("SmolLM2-135M q_proj 14", partial(smollm2, "layers.14.self_attn.q_proj"), 57, 15, 7),
    Case("SmolLM2-135M up_proj 14", partial(smollm2, "layers.14.mlp.up_proj"), 57, 15, 7),
    Case("all-MiniLM-L6-v2 query 3", partial(minilm, "layer.3.attention.self.query"), 38, 15, 7),
    Case("all-MiniLM-L6-v2 intermediate 3", partial(minilm, "layer.3.intermediate.dense"), 38, 15, 7),
]
HARD = [Case(kind, partial(hard, kind), 64, 9, 5) for kind in ("flat", "exponential", "clustered", "rank-deficient")]
BF16 = Case("SmolLM2-135M up_proj 14 in bf16", partial(bfloat16, REAL[1].make), 57, 15, 7)
FEED_FORWARD = Case("LLaMA-2 7B feed-forward", partial(decaying, 11008, 4096, "feed-forward"), 128, 5, 2)
ATTENTION = Case("LLaMA-2 7B attention", partial(decaying, 4096, 4096, "attention"), 128, 9, 2)
HALF = [
    *(replace(case, rank=288 if "SmolLM2" in case.name else 192, rounds=9, slow=5) for case in REAL),
    *(replace(case, rank=512, rounds=7, slow=3) for case in HARD),
    Case("feed-forward decay", partial(decaying, 1024, 4096, "feed-forward"), 512, 7, 5),
    Case("attention decay", partial(decaying, 2048, 2048, "attention"), 1024, 7, 5),
]


def named(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name.replace(" ", "-"))


def available(make: Callable[[], Any], row: Row, rows: list[Row]) -> Any:
    """What `make` gives; without the weights the table gets a row that says so, and the test ends."""
    try:
        return make()
    except UnavailableError as error:
        rows.append(row | {"competitors": [{"name": "weights", "note": str(error)}]})
        pytest.skip(str(error))


def compare(
    benchmark: Any,
    rows: list[Row],
    op: str,
    case: Case,
    peers_called: dict[str, Decompose],
    floors: Callable[[Tensor], dict[str, Callable[[], Any]]] = lambda matrix: {},
) -> tuple[Row, Tensor]:
    """Times our `op` against the peers and the floors and adds the row, with everybody's accuracy."""
    row: Row = {"op": op, "case": case.name, "rank": case.rank}
    matrix = available(case.make, row, rows)
    small = torch.randn(96, 64)

    def competitor(name: str, call: Decompose) -> Competitor:
        # A peer has no bf16 path: it gets the copy in float32 that its user would have to make.
        return Competitor(
            name,
            lambda: call(matrix.values if name in OURS else matrix.values.float(), case.rank),
            warm=lambda: call(small, 8),
            rounds=case.slow if name in ITERATIVE | FULL else None,
        )

    ours = competitor(op, OURS[op])
    others = [competitor(name, call) for name, call in peers_called.items()]
    extra = [Competitor(f"floor: {name}", call, warm=call) for name, call in floors(matrix.values).items()]
    entries = interleave(benchmark, ours, [*others, *extra], case.rounds)
    for entry, one in zip(entries, [ours, *others], strict=False):
        if not one.note:
            entry |= accuracy(matrix, one.result)
    rows.append(row := row | {"shape": list(matrix.values.shape), "competitors": entries})
    return row, matrix.values


@named([*REAL, BF16, *HARD])
def test_rsvd(benchmark: Any, rows: list[Row], case: Case) -> None:
    compare(benchmark, rows, "sculpt rsvd", case, RANDOMIZED | EXACT | ITERATIVE | THIN)


def test_rsvd_feed_forward(benchmark: Any, rows: list[Row]) -> None:
    """11008 x 4096, rank 128. Exact peers are left out: half a minute a call."""
    compare(benchmark, rows, "sculpt rsvd", FEED_FORWARD, RANDOMIZED)


def six_passes(matrix: Tensor) -> dict[str, Callable[[], Any]]:
    """What two power iterations read: the matrix six times, each time times a factor of rank + oversample columns."""
    factors = [torch.randn(size, ATTENTION.rank + peers.OVERSAMPLE) for size in (matrix.shape[1], matrix.shape[0])]

    def library() -> None:
        for _ in range(3):
            matrix @ factors[0]
            matrix.mT @ factors[1]

    def ours() -> None:
        for _ in range(3):
            torch.ops.sculpt._product(matrix, factors[0])
            torch.ops.sculpt._product(matrix, factors[1], transpose=True)

    return {"six products of torch": library, "six products of sculpt": ours}


def test_rsvd_attention(benchmark: Any, rows: list[Row]) -> None:
    """4096 x 4096, rank 128: with the floor, and what share of the time goes into products with the matrix."""
    called = RANDOMIZED | EXACT | PROPACK
    row, matrix = compare(benchmark, rows, "sculpt rsvd", ATTENTION, called, six_passes)
    for name, call in (("sculpt rsvd", rsvd), ("torch.svd_lowrank", peers.svd_lowrank)):
        with_matrix, in_all = product_shares(partial(call, matrix, ATTENTION.rank), matrix)
        share = f"{with_matrix:.0%} in products with the matrix, {in_all:.0%} in all products"
        row.setdefault("facts", {})[f"time of {name}"] = share


def test_top_subspace_attention(benchmark: Any, rows: list[Row]) -> None:
    """Half of 4096 x 4096. PEFT and mini_trainer make the same call as torch.linalg.svd, about 10 s of it."""
    compare(benchmark, rows, "sculpt top_subspace", replace(ATTENTION, rank=2048, rounds=3, slow=3), THIN)


@named(HALF)
def test_top_subspace(benchmark: Any, rows: list[Row], case: Case) -> None:
    compare(benchmark, rows, "sculpt top_subspace", case, FULL)


def test_whole_model(benchmark: Any, rows: list[Row]) -> None:
    """All 210 matrices of SmolLM2-135M at protect=0.5, as each package's user sets it up; peers change a fresh copy."""
    row: Row = {"op": "Subspaces.from_model", "case": "SmolLM2-135M, 210 matrices, half of each protected"}
    model = available(smollm2_model, row, rows)
    ours = Competitor("sculpt Subspaces.from_model", lambda: sculpt_ops.Subspaces.from_model(model, protect=0.5))
    peft = Competitor("peft get_peft_model, OSF", peers.peft_model, prepare=lambda: copy.deepcopy(model))
    mini = Competitor("mini_trainer OSFT", peers.mini_trainer_model, prepare=lambda: peers.mini_trainer_unset(model))
    entries = interleave(benchmark, ours, [peft, mini], rounds=3)
    bases = (our_bases, peers.peft_bases, peers.mini_trainer_bases)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for entry, one, bases_of in zip(entries, (ours, peft, mini), bases, strict=True):
        if not one.note:
            entry |= model_energy(weights, dict(bases_of(one.result)))
    rows.append(row | {"competitors": entries})


def our_bases(subspaces: sculpt_ops.Subspaces) -> Iterator[tuple[str, Bases]]:
    for name, layer in subspaces.items():
        yield name, Bases(layer.left, layer.keep_left, layer.right, layer.keep_right)

"""The communication model against what is counted, byte by byte, and its tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from sculpt_ops import AdamW, Rank, Subspaces
from sculpt_ops.distributed.traffic import Collective, Traffic

from .ranks import Ranks

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import communication
import peers

DOCUMENT = Path(__file__).parents[2] / "docs" / "distributed.md"

# (out, in). No number of rows but 24 and 32 can be split evenly; the 5 rows leave one of four ranks with fewer or none.
LAYER = ((24, 20), (13, 31), (31, 13), (32, 32), (27, 21), (5, 40))


@dataclass(frozen=True)
class Case:
    protect: float | Rank = 0.5
    sides: Any = "both"
    state: Any = "full"
    weight_decay: float = 0.0
    dtype: torch.dtype = torch.float32

    @property
    def ranks(self) -> list[int]:
        sizes = [min(shape) for shape in LAYER]
        if isinstance(self.protect, Rank):
            return [min(self.protect.rank, size) for size in sizes]
        return [int(self.protect * size) for size in sizes]


CASES = {
    "defaults": Case(),
    "a quarter": Case(0.25),
    "most": Case(0.75),
    "left": Case(sides="left"),
    "right": Case(sides="right"),
    "decay": Case(weight_decay=0.1),
    "subspace": Case(state="subspace"),
    "subspace, right, decay": Case(sides="right", state="subspace", weight_decay=0.1),
    "bfloat16": Case(dtype=torch.bfloat16),
    "bfloat16, decay": Case(dtype=torch.bfloat16, weight_decay=0.1),
    # In place but for the matrix with the fewest rows, or all.
    "rank 2": Case(Rank(2)),
    "rank 1, decay": Case(Rank(1), weight_decay=0.1),
    "rank 1, left": Case(Rank(1), sides="left"),
    "rank 2, subspace": Case(Rank(2), state="subspace"),
    # The narrow space on the right is kept, that on the left protected or kept.
    "rank 18": Case(Rank(18)),
}


def sharded(layers: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(n, m, bias=False, dtype=dtype) for _ in range(layers) for m, n in LAYER)
    for module in model:
        fully_shard(module)
    return model


def counted(layers: int, case: Case) -> tuple[list[Collective], list[Collective]]:
    """Collectives of the set-up and of a second step, on this rank."""
    model = sharded(layers, case.dtype)
    with Traffic() as setting_up:
        subspaces = Subspaces.from_model(model, case.protect, sides=case.sides, targets="*")
    settings = {"state": case.state, "weight_decay": case.weight_decay}
    optimizer = AdamW(model.named_parameters(), subspaces=subspaces, **settings)
    for _ in range(2):
        for module in model:
            module(torch.ones(2, module.in_features, dtype=case.dtype)).square().sum().backward()
        with Traffic() as step:
            optimizer.step()
        optimizer.zero_grad()
    return setting_up.collectives, step.collectives


def counted_of_all(layers: int, names: Sequence[str]) -> dict[str, tuple[list[Collective], list[Collective]]]:
    return {name: counted(layers, CASES[name]) for name in names}


# With six layers one case by owners, one in place and one of both: what else there is depends on no number of layers.
@pytest.mark.parametrize(
    ("layers", "names"), [(2, tuple(CASES)), (6, ("decay", "rank 1, left", "rank 2"))], ids=["2-layers", "6-layers"]
)
def test_a_step_sends_what_the_model_says(ranks: Ranks, layers: int, names: Sequence[str]) -> None:
    per_rank = ranks.run(counted_of_all, layers, names)
    for name in names:
        case = CASES[name]
        wanted = communication.step(
            LAYER * layers,
            case.ranks * layers,
            ranks.size,
            sides=case.sides,
            state=case.state,
            grad_bytes=case.dtype.itemsize,
            decay=bool(case.weight_decay),
        )
        steps = [found[name][1] for found in per_rank]
        assert [sum(call.bytes for call in step) for step in steps] == wanted.each, name
        assert [len(step) for step in steps] == [wanted.collectives] * ranks.size, name
        assert {call.op for step in steps for call in step} <= {"all_to_all", "all_reduce"}, name
        # From owner to rank and from rank to owner: what is sent arrives.
        assert sum(wanted.sent) == sum(wanted.received), name


def test_a_set_up_sends_every_shard_to_its_owner_once(ranks: Ranks) -> None:
    for case in (Case(), Case(dtype=torch.bfloat16), Case(Rank(2)), Case(0.75)):
        wanted = communication.set_up(LAYER * 2, case.ranks * 2, ranks.size, weight_bytes=case.dtype.itemsize)
        found = [setting_up for setting_up, _ in ranks.run(counted, 2, case)]
        # All else are a few numbers of each matrix, as Python objects.
        moved = [sum(call.bytes for call in calls if call.op != "all_gather") for calls in found]
        assert moved == wanted.each
        assert [len(calls) for calls in found] == [wanted.collectives] * ranks.size
        assert {call.op for calls in found for call in calls} <= {"all_to_all", "broadcast", "all_gather"}


def test_fewer_calls_do_not_come_with_more_layers(ranks: Ranks) -> None:
    case = Case()
    calls = [communication.step(LAYER * n, case.ranks * n, ranks.size).collectives for n in (2, 6, 100)]
    # On two ranks the 31 x 13 matrices are projected in place.
    assert calls == [10 if ranks.size == 2 else 8] * 3


def theirs(layers: int, protect: float) -> list[Collective]:
    """mini_trainer's projections of gradients and of weights, of factors sharded by rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    osft = peers.import_mini_trainer()
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))

    def shard(*shape: int, trained: bool) -> nn.Parameter:
        made = nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [Shard(0)]), requires_grad=trained)
        made.grad = distribute_tensor(torch.ones(shape), mesh, [Shard(0)]) if trained else None
        return made

    with Traffic() as traffic, torch.no_grad():
        for m, n in LAYER * layers:
            k = int(protect * min(m, n))
            low = min(m, n) - k
            # Made outside of what is counted.
            with Traffic() as made:
                factors = {
                    "U_high": shard(m, k, trained=False),
                    "S_high": shard(k, trained=False),
                    "V_high": shard(k, n, trained=False),
                    "U_low": shard(m, low, trained=True),
                    "S_low": shard(low, trained=True),
                    "V_low": shard(low, n, trained=True),
                    "rank_high": k,
                }
            del traffic.collectives[len(traffic.collectives) - len(made.collectives) :]
            osft.project_gradient_to_orthogonal_space(factors)
            osft.project_parameter_to_orthogonal_space(factors)
    return traffic.collectives


@pytest.mark.parametrize("protect", [0.5, 0.75])
def test_mini_trainer_sends_what_the_model_says(ranks: Ranks, protect: float) -> None:
    try:
        peers.import_mini_trainer()
    except ImportError as error:
        pytest.skip(f"mini_trainer: {error}")
    wanted = communication.theirs_step(LAYER, [int(protect * min(shape)) for shape in LAYER], ranks.size)
    for calls in ranks.run(theirs, 1, protect):
        # A ring of each matrix's coefficients for itself here, of all in one in its trainer: up to a byte more each.
        assert 0 <= sum(call.bytes for call in calls) - wanted.ring <= 2 * len(LAYER)
        gathers = sum(call.op == "all_gather" for call in calls)
        assert gathers == wanted.collectives - 2


def test_mini_trainer_gives_the_last_rank_all_that_is_left() -> None:
    shapes = [(4, 4)] * 10
    even, few = communication.theirs_set_up(shapes, 4), communication.theirs_set_up(shapes, 16)
    matrix, factors = 4 * 4 * 4, (4 + 4 + 1) * 4 * 4
    # 2, 2, 2 and 4; with fewer matrices than ranks all go to the last one.
    assert even.sent == [8 * matrix, 2 * factors, 2 * factors, 4 * factors]
    assert few.sent == [10 * matrix, *[0] * 14, 10 * factors]
    assert even.ring == few.ring == 10 * factors


def test_the_model_of_fsdp_is_what_its_hooks_send(ranks: Ranks) -> None:
    # float32 gathers here, so twice the bytes of bfloat16; every length can be split.
    shapes = ((8, 12), (16, 8), (8, 16))
    for gathered, reduced in ranks.run(passes_of, shapes):
        numbers = sum(m * n for m, n in shapes)
        inside, between = communication.passes(numbers, numbers, ranks.size)
        assert gathered / 2 + reduced == inside
        assert between == 0


def passes_of(shapes: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    model = nn.Sequential(*(nn.Linear(n, m, bias=False) for m, n in shapes))
    for module in model:
        fully_shard(module)
    fully_shard(model)
    with Traffic() as traffic:
        model(torch.ones(2, 12)).sum().backward()
    gathered, reduced = traffic.of("all_gather"), traffic.of("reduce_scatter")
    return sum(call.bytes for call in gathered), sum(call.bytes for call in reduced)


def test_known_models_have_their_published_sizes() -> None:
    small, large = communication.Model.of("llama-2-7b"), communication.Model.of("llama-2-70b")
    assert (len(small.shapes), small.parameters) == (224, 6_738_415_616)
    assert (len(large.shapes), large.parameters) == (560, 68_976_648_192)


def test_the_document_holds_the_tables() -> None:
    import communication_table

    assert communication_table.check(DOCUMENT) == 0

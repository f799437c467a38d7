"""What a step sends: at most what the projections need, in a number of collectives that the layers do not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from sculpt_ops import AdamW, Subspaces
from sculpt_ops.distributed.exchange import BUCKETS
from sculpt_ops.distributed.sharding import moves_to_owner
from sculpt_ops.distributed.traffic import Traffic

from .ranks import Ranks

# (m, n): tall, wide and square, of the same cost each, so that owners have equal shares.
SHAPES = ((64, 32), (32, 64), (48, 48))


def step(layers: int, protect: float, options: dict[str, Any]) -> tuple[int, int, int, int]:
    """Bytes that all ranks sent in the second step, collectives of this one, the bound, matrices with a way to go."""
    torch.manual_seed(0)
    shapes = [shape for shape in SHAPES for _ in range(layers)]
    model = nn.ModuleList(nn.Linear(n, m, bias=False) for m, n in shapes)
    for linear in model:
        fully_shard(linear)
    settings = dict(options)
    sides = settings.pop("sides", "both")
    subspaces = Subspaces.from_model(model, protect, sides=sides, targets="*")
    optimizer = AdamW(model.named_parameters(), subspaces=subspaces, weight_decay=0.0, **settings)
    size = torch.distributed.get_world_size()
    bound = moved = 0
    for layer in subspaces.values():
        m, n = layer.shape
        width = 0 if layer.left_basis is None else layer.left_basis.columns.shape[1]
        # Twice, gradient and step, in float32, on every rank.
        bound += 2 * size * int(4 * min(2 * width * n, 2 * m * n / size))
        moved += moves_to_owner(m, n, width, size)
    for _ in range(2):
        for linear in model:
            linear(torch.randn(4, linear.in_features)).square().sum().backward()
        with Traffic() as traffic:
            optimizer.step()
        optimizer.zero_grad()
    sent = torch.tensor([float(traffic.bytes)])
    torch.distributed.all_reduce(sent)
    return int(sent), len(traffic.collectives), bound, moved


@pytest.mark.parametrize(
    ("protect", "options"),
    [
        (0.5, {}),
        (0.25, {}),
        (0.05, {}),
        (0.5, {"sides": "left"}),
        (0.1, {"sides": "left", "project": "update"}),
        (0.5, {"state": "subspace"}),
    ],
    ids=str,
)
def test_a_step_sends_no_more_than_its_projections_need(ranks: Ranks, protect: float, options: dict[str, Any]) -> None:
    for layers in (2, 8):
        sent, collectives, bound, _ = ranks.run(step, layers, protect, options)[0]
        assert 0 < sent <= bound
        # There and back for every bucket by owners; one reduction a projection for all that is projected in place.
        assert collectives <= 2 * BUCKETS + 2


def test_small_ranks_stay_where_they_are(ranks: Ranks) -> None:
    assert ranks.run(step, 2, 0.04, {})[0][3] == 0
    # Of 64 x 32 the rank is a quarter of the rows: on two ranks both ways cost the same.
    assert ranks.run(step, 2, 0.5, {})[0][3] == {2: 4, 4: 6}[ranks.size]


def test_a_right_basis_moves_nothing(ranks: Ranks) -> None:
    assert ranks.run(step, 2, 0.5, {"sides": "right"}) == [(0, 0, 0, 0)] * ranks.size

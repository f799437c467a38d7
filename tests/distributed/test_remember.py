"""What is remembered under DistributedDataParallel is what one process remembers of all rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sculpt_ops import Remember, RememberInputs, Subspaces

from .models import Stack, batch
from .ranks import Ranks

Found = dict[str, tuple[tuple[int, int], list[Tensor], float]]


def after_two_tasks(*, ddp: bool) -> Found:
    """Protected dimensions, projectors and the share of the last change that is protected, by name."""
    inner = Stack()
    model: nn.Module = nn.parallel.DistributedDataParallel(inner) if ddp else inner
    how = [Remember(2), RememberInputs(0.9)]
    previous: Subspaces | None = None
    for task in range(3):
        rows = [batch(task, own=ddp)[0]]
        previous = Subspaces.from_model(
            model, 0.1, targets="blocks.*.weight", remember=how, previous=previous, batches=rows
        )
        generator = torch.Generator().manual_seed(task)
        with torch.no_grad():
            for block in inner.blocks:
                assert isinstance(block, nn.Linear)
                m, n = block.weight.shape
                block.weight += 0.1 * torch.randn(m, 2, generator=generator) @ torch.randn(2, n, generator=generator)
    assert previous is not None
    found: Found = {}
    for name, layer in previous.items():
        bases = [basis for basis in (layer.left_basis, layer.right_basis) if basis is not None]
        projectors = [basis.protected(torch.eye(basis.length).double()) for basis in bases]
        found[name] = layer.protected_dims, projectors, previous.remembered_share()[name]
    return found


def test_ranks_remember_as_one_process_does(ranks: Ranks) -> None:
    alone = after_two_tasks(ddp=False)
    for found in ranks.run(after_two_tasks_under_ddp):
        assert found.keys() == alone.keys()
        for name, (dims, projectors, share) in alone.items():
            assert found[name][0] == dims
            assert share > 1 - 1e-4
            assert found[name][2] == pytest.approx(share, abs=1e-4)
            for ours, theirs in zip(projectors, found[name][1], strict=True):
                assert (ours - theirs).norm() < 1e-4


def after_two_tasks_under_ddp() -> Found:
    return after_two_tasks(ddp=True)

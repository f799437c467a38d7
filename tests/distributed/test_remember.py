"""What is remembered on several ranks is what one process remembers of all rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sculpt_ops import Remember, RememberInputs, Subspaces

from .models import Stack, batch, sharded
from .ranks import Ranks

pytest.importorskip("safetensors.torch", reason="saving subspaces needs safetensors")

Found = dict[str, tuple[tuple[int, int], list[Tensor], float | None]]


def after_two_tasks(kind: str, how: list[Remember | RememberInputs], path: Path | None = None) -> Found:
    """Protected dimensions, projectors and the share of the last change that is protected, by name; of sharded layers
    those of this rank. kind: "alone", "ddp", or as `sharded` has it. path: what is saved there is gone on from."""
    inner = Stack()
    model: nn.Module = inner
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(inner)
    elif kind != "alone":
        model = sharded(inner, kind)
    previous: Subspaces | None = None
    for task in range(3):
        rows = [batch(task, own=kind != "alone")[0]]
        previous = Subspaces.from_model(
            model, 0.1, targets="blocks.*.weight", remember=how, previous=previous, batches=rows
        )
        if path is not None:
            previous.save(path)
            previous = Subspaces.load(path, model)
        generator = torch.Generator().manual_seed(task)
        with torch.no_grad():
            for block in inner.blocks:
                assert isinstance(block, nn.Linear)
                weight = block.weight
                m, n = weight.shape
                change = 0.1 * torch.randn(m, 2, generator=generator) @ torch.randn(2, n, generator=generator)
                if isinstance(weight, DTensor):
                    local = weight.to_local()
                    start = own_start(weight)
                    local += change[start : start + len(local)]
                else:
                    weight += change
    assert previous is not None
    found: Found = {}
    for name, layer in previous.items():
        if not layer.is_here:
            continue
        bases = [basis for basis in (layer.left_basis, layer.right_basis) if basis is not None]
        projectors = [basis.protected(torch.eye(basis.length).double()) for basis in bases]
        found[name] = layer.protected_dims, projectors, previous.remembered_share().get(name)
    return found


def own_start(weight: DTensor) -> int:
    """The first row of a DTensor that is split by rows over the last dimension of its mesh."""
    mesh = weight.device_mesh
    share = -(-weight.shape[0] // mesh.size(mesh.ndim - 1))
    return min(weight.shape[0], share * mesh.get_local_rank(mesh.ndim - 1))


BOTH = [Remember(2), RememberInputs(0.9)]


def test_replicas_remember_as_one_process_does(ranks: Ranks) -> None:
    alone = after_two_tasks("alone", BOTH)
    for found in ranks.run(after_two_tasks, "ddp", BOTH):
        assert found.keys() == alone.keys()
        compare(found, alone)
        assert all(share is not None and share > 1 - 1e-4 for _, _, share in found.values())


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("kind", ["rows", "hybrid"])
def test_shards_remember_inputs_as_one_process_does(four_ranks: Ranks, tmp_path: Path, kind: str, saved: bool) -> None:
    how = [RememberInputs(0.9)]
    alone = after_two_tasks("alone", how)
    everyone = four_ranks.run(after_two_tasks, kind, how, tmp_path / f"{kind}.safetensors" if saved else None)
    assert set().union(*everyone) == alone.keys()
    for found in everyone:
        compare(found, alone)


def compare(found: Found, alone: Found) -> None:
    for name, (dims, projectors, share) in found.items():
        assert dims == alone[name][0]
        # Not known of shards.
        assert share is None or share == pytest.approx(alone[name][2], abs=1e-4)
        for ours, theirs in zip(projectors, alone[name][1], strict=True):
            assert (ours - theirs).norm() < 1e-4


def test_what_shards_remember_goes_on_elsewhere(four_ranks: Ranks, tmp_path: Path) -> None:
    """Saved by four ranks, read by one process, which has all of it."""
    path = tmp_path / "rows.safetensors"
    four_ranks.run(after_two_tasks, "rows", [RememberInputs(0.9)], path)
    loaded = Subspaces.load(path, Stack())
    assert loaded.memory_of_tasks is not None
    for name, remembered in loaded.remembered.items():
        inputs = remembered.inputs
        assert inputs is not None
        assert not inputs.is_meta
        right = loaded[name].right_basis
        assert right is not None
        assert (right.protected(inputs) - inputs).norm() < 1e-5

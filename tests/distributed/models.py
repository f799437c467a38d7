"""A small model on one rank, and the same one sharded or replicated; both trained on the same data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from sculpt_ops import AdamW, Subspaces

# (in, out): matrices wide, tall and square. No length but 12 and 32 can be split evenly, and 5 rows leave one of four
# ranks without any.
SIZES = ((12, 13), (13, 7), (7, 32), (32, 31), (31, 31))
TARGETS = ("blocks.*.weight", "head.weight")


class Stack(nn.Module):
    """Linear layers, every other one with a bias, a LayerNorm, and a head that belongs to no block."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(nn.Linear(n, m, bias=i % 2 == 0) for i, (n, m) in enumerate(SIZES))
        self.norm = nn.LayerNorm(31)
        self.head = nn.Linear(31, 5)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def sharded(model: Stack, how: str = "rows", mesh: DeviceMesh | None = None) -> Stack:
    """`fully_shard` of every block, then of the rest. how: "rows"; "columns" where they can be split evenly; "hybrid",
    over two ranks and the same on the other two."""
    size = dist.get_world_size()
    if how == "hybrid":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(1 if how == "columns" and parameter.dim() == 2 and parameter.shape[1] % size == 0 else 0)

    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh, shard_placement_fn=placement)
    return model


def whole(tensor: Tensor) -> Tensor:
    """Of a DTensor all of it; collective."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def batch(step: int, *, own: bool = False) -> tuple[Tensor, Tensor]:
    """Inputs and targets, the same on every rank; of its `own` each rank has an equal share of them."""
    generator = torch.Generator().manual_seed(100 + step)
    rows = torch.randn(16, 12, generator=generator), torch.randn(16, 5, generator=generator)
    if own:
        rows = tuple(part.chunk(dist.get_world_size())[dist.get_rank()] for part in rows)  # type: ignore[assignment]
    return rows


def backward(model: nn.Module, step: int, *, own: bool = False) -> None:
    """Gradients of the mean over all rows, whichever rank has them."""
    inputs, targets = batch(step, own=own)
    F.mse_loss(model(inputs), targets).backward()


def set_gradients(model: nn.Module, step: int) -> None:
    """Random ones, the same on every rank: a tenth of the time of a forward and backward pass on four."""
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in model.parameters():
        grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if isinstance(parameter, DTensor):
            grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.grad = grad


@dataclass(frozen=True)
class Case:
    """How to train. subspaces, optimizer: arguments of `Subspaces.from_model` and `AdamW`. how: see `sharded`, or
    "ddp". accumulate: gradients to a step. tasks: each with subspaces of its own. passes: gradients come from forward
    and backward passes. own: each rank has its share of the data."""

    protect: Any = 0.5
    subspaces: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    how: str = "rows"
    clip: float | None = None
    accumulate: int = 1
    tasks: int = 1
    passes: bool = False
    own: bool = False

    def model(self) -> nn.Module:
        model = Stack(self.dtype)
        return nn.parallel.DistributedDataParallel(model) if self.how == "ddp" else sharded(model, self.how)


def protect(model: nn.Module, case: Case) -> Subspaces:
    return Subspaces.from_model(model, case.protect, targets=TARGETS, **case.subspaces)


def optimizer_of(model: nn.Module, subspaces: Subspaces | None, case: Case) -> AdamW:
    return AdamW(model.named_parameters(), **({"lr": 1e-2, "weight_decay": 0.1} | case.optimizer), subspaces=subspaces)


@dataclass(frozen=True)
class Outcome:
    """Weights with their masters, the norms that clipping saw, what is left in the protected space, and the matrices
    that were projected where their shards lie."""

    weights: dict[str, Tensor]
    norms: list[float]
    leaks: dict[str, float]
    in_place: list[str]


def train(model: nn.Module, case: Case, *, own: bool = False, steps: int = 4) -> Outcome:
    subspaces = protect(model, case)
    optimizer = optimizer_of(model, subspaces, case)
    norms: list[float] = []
    for task in range(case.tasks):
        if task:
            subspaces = protect(model, case)
            optimizer.set_subspaces(subspaces)
        norms += take_steps(model, optimizer, case, range(steps * task, steps * task + steps), own=own)
    leaks = {name: leak.total for name, leak in subspaces.leak(read=optimizer.master_weight).items()}
    in_place = [name for name, layer in subspaces.items() if subspaces.in_place(name) is not layer]
    return Outcome(weights_of(model, optimizer), norms, leaks, in_place)


def take_steps(model: nn.Module, optimizer: AdamW, case: Case, steps: range, *, own: bool = False) -> list[float]:
    norms = []
    for step in steps:
        for part in range(case.accumulate):
            if case.passes:
                backward(model, case.accumulate * step + part, own=own)
            else:
                set_gradients(model, case.accumulate * step + part)
            if case.accumulate > 1:
                optimizer.compress_gradients()
        if case.clip is not None:
            norms.append(float(whole(optimizer.clip_grad_norm_(case.clip))))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def table(subspaces: Subspaces) -> list[str]:
    """The summary but for the bytes, which are those of a rank."""
    return [line for line in subspaces.summary().splitlines() if "MiB" not in line]


def weights_of(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """By canonical name."""
    named = ((name.removeprefix("module."), parameter) for name, parameter in model.named_parameters())
    return {name: whole(optimizer.master_weight(parameter)) for name, parameter in named}


def distances(weights: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, float]:
    """||a - b|| / ||b|| of every weight."""
    assert weights.keys() == others.keys()
    return {n: float((weights[n] - other).norm() / other.norm().clamp(min=1e-30)) for n, other in others.items()}

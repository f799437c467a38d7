"""The methods whose costs the training table compares, each set up as its user would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Literal

import peers
import torch
from torch import Tensor, nn

import sculpt_ops

Family = Literal["torch", "sculpt", "peft", "mini_trainer"]

# What mini_trainer's trainer clips at and transformers' by default.
CLIP = 1.0
SHARES = (0.25, 0.5, 0.75)


class Training:
    """A model made ready to train. Base class: any torch optimizer, nothing protected.

    subspaces: what the leak is measured against; None takes those of the start weights.
    """

    subspaces: sculpt_ops.Subspaces | None = None

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer

    def step(self) -> None:
        """All that follows the backward pass."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def bases(self) -> int:
        """Bytes kept beside parameters, gradients and optimizer states."""
        return 0 if self.subspaces is None else self.subspaces.memory()

    def saved(self) -> int:
        """Bytes of the tensors that a resumed run needs: model, optimizer states, and the bases not in either."""
        stored = tensors_of([self.model.state_dict(), self.optimizer.state_dict()])
        return nbytes(stored) + (0 if self.subspaces is None else self.bases())

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The matrices the model computes with, by the name of the parameter they were before."""
        yield from self.model.named_parameters()


class Ours(Training):
    def __init__(self, model: nn.Module, optimizer: sculpt_ops.AdamW, subspaces: sculpt_ops.Subspaces) -> None:
        super().__init__(model, optimizer)
        self.adamw = optimizer
        self.subspaces = subspaces

    def step(self) -> None:
        self.adamw.clip_grad_norm_(CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield name, self.adamw.master_weight(parameter)


class InBackward(Ours):
    """Weights are stepped inside the backward pass, where a norm over all gradients cannot be known: no clipping."""

    def __init__(self, model: nn.Module, optimizer: sculpt_ops.AdamW, subspaces: sculpt_ops.Subspaces) -> None:
        super().__init__(model, optimizer, subspaces)
        self.handle = sculpt_ops.fuse_into_backward(model, optimizer)

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class Guarded(Training):
    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, subspaces: sculpt_ops.Subspaces) -> None:
        super().__init__(model, optimizer)
        self.subspaces = subspaces
        self.guard = subspaces.guard(optimizer)

    def bases(self) -> int:
        return super().bases() + self.guard.nbytes


class Peft(Training):
    """PEFT's OSF. Trains the factors of the free directions and freezes every parameter without a basis."""

    def bases(self) -> int:
        return nbytes(buffer for name, buffer in self.model.named_buffers() if "_osf_" in name)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from peers.peft_weights(self.model)


class MiniTrainer(Training):
    """mini_trainer's OSFT; its frozen factors are parameters. Trains all parameters without a basis."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from peers.mini_trainer_weights(self.model)


@dataclass(frozen=True)
class Method:
    """A row. protect: the protected share of each matrix. prepare: makes (model, lr) ready; what set-up time is of.

    load: imports its packages, before the memory baseline is taken. convert: makes the model its own class, which is
    part of opening it and not of set-up time.
    """

    name: str
    family: Family
    protect: float | None
    prepare: Callable[[nn.Module, float], Training]
    dtype: torch.dtype = torch.float32
    load: Callable[[], object] | None = None
    convert: Callable[[nn.Module], nn.Module] | None = None


def plain(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Method:
    def prepare(model: nn.Module, lr: float) -> Training:
        return Training(model, torch.optim.AdamW(model.parameters(), lr=lr, **options))

    return Method(name, "torch", None, prepare, dtype)


def ours(
    name: str,
    protect: float,
    *,
    dtype: torch.dtype = torch.float32,
    basis_dtype: torch.dtype | None = None,
    kind: type[Ours] = Ours,
    **options: Any,
) -> Method:
    def prepare(model: nn.Module, lr: float) -> Training:
        subspaces = sculpt_ops.Subspaces.from_model(model, protect=protect, basis_dtype=basis_dtype)
        optimizer = sculpt_ops.AdamW(model.named_parameters(), lr=lr, subspaces=subspaces, **options)
        return kind(model, optimizer, subspaces)

    return Method(f"sculpt {name}", "sculpt", protect, prepare, dtype)


def guarded(protect: float) -> Method:
    def prepare(model: nn.Module, lr: float) -> Training:
        subspaces = sculpt_ops.Subspaces.from_model(model, protect=protect)
        return Guarded(model, torch.optim.AdamW(model.parameters(), lr=lr), subspaces)

    return Method("torch AdamW + sculpt guard", "sculpt", protect, prepare)


def peft(protect: float) -> Method:
    def prepare(model: nn.Module, lr: float) -> Training:
        made = peers.peft_model(model, protect)
        trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
        return Peft(made, torch.optim.AdamW(trained, lr=lr))

    return Method("PEFT OSF", "peft", protect, prepare, load=partial(import_module, "peft"))


def mini_trainer(protect: float) -> Method:
    """As `setup_training_components` and `take_gradient_step` of mini_trainer do it in one process."""

    def prepare(model: nn.Module, lr: float) -> Training:
        made = peers.mini_trainer_model(model)
        trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
        return MiniTrainer(made, peers.mini_trainer_optimizer(torch.optim.AdamW(trained, lr=lr), made))

    return Method(
        "mini_trainer OSFT",
        "mini_trainer",
        protect,
        prepare,
        load=peers.import_mini_trainer,
        convert=partial(peers.mini_trainer_unset, protect=protect),
    )


BF16 = torch.bfloat16
METHODS = (
    plain("torch AdamW"),
    plain("torch AdamW fused", fused=True),
    *(ours("full", protect) for protect in SHARES),
    *(ours("subspace", protect, state="subspace") for protect in SHARES),
    ours("full, project gradient", 0.5, project="gradient"),
    ours("full, project update", 0.5, project="update"),
    ours("full, bf16 bases", 0.5, basis_dtype=BF16),
    ours("subspace, bf16 bases", 0.5, basis_dtype=BF16, state="subspace"),
    ours("subspace, fp16 bases", 0.75, basis_dtype=torch.float16, state="subspace"),
    ours("subspace, in backward", 0.5, state="subspace", kind=InBackward),
    guarded(0.5),
    *(peft(protect) for protect in SHARES),
    *(mini_trainer(protect) for protect in SHARES),
    plain("torch AdamW, bf16 weights", BF16),
    *(
        ours(f"subspace, bf16 weights, {master}", 0.5, dtype=BF16, state="subspace", master=master)
        for master in ("split", "stochastic", "none")
    ),
    plain("torch AdamW, again"),
)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested mappings and sequences."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_of(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_of(part)


def nbytes(tensors: Any) -> int:
    """Bytes of the memory behind `tensors`, what several share (tied weights) counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())

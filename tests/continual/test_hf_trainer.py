"""The options of the optimizer through `transformers.Trainer`: clipping, accumulation, steps in the backward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sculpt_ops import AdamW, Subspaces
from sculpt_ops.continual import RunResult, Task, TrainConfig, train
from sculpt_ops.continual.encoding import Collator, encode_task

pytest.importorskip("transformers", reason="the trainer needs pip install sculpt-ops[train]")
from transformers import PrinterCallback

from sculpt_ops.continual.hf_trainer import SubspaceTrainer, optimizer_options, training_arguments

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

# Makes a trainer of a copy of the tiny model from settings.
Make = Callable[..., SubspaceTrainer]


@pytest.fixture
def make(llama: LlamaForCausalLM, toy_tasks: list[Task], tokenizer: Any, tmp_path: Path) -> Make:
    rows = encode_task(toy_tasks[0], tokenizer, 64, seq2seq=False).train

    def build(**settings: Any) -> SubspaceTrainer:
        defaults = {"lr": 1e-2, "batch_size": 8, "max_steps": 3, "cpu": True}
        config = TrainConfig("unused", ["unused"], "unused", **{**defaults, **settings})
        model = copy.deepcopy(llama).to(getattr(torch, config.dtype))
        trainer = SubspaceTrainer(
            model=model,
            args=training_arguments(config, str(tmp_path), 0),
            train_dataset=rows,
            data_collator=Collator(model, tokenizer),
            subspaces=None if config.protect is None else Subspaces.from_model(model, protect=0.5),
            options=optimizer_options(config),
            fuse_backward=config.fuse_backward,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    return build


def change(trainer: SubspaceTrainer, start: torch.nn.Module) -> dict[str, torch.Tensor]:
    before = dict(start.named_parameters())
    return {name: weight.detach() - before[name].detach() for name, weight in trainer.model.named_parameters()}


def assert_same_change(a: SubspaceTrainer, b: SubspaceTrainer, start: torch.nn.Module) -> None:
    """To rounding: Adam's first steps are of the size of lr, however small a gradient and its error are."""
    changes = change(a, start), change(b, start)
    for name, step in changes[0].items():
        assert float(step.norm()) > 0
        assert float((step - changes[1][name]).norm()) < 1e-3 * float(step.norm()), name


def free_norm(model: torch.nn.Module, subspaces: Subspaces) -> float:
    """Norm of all gradients, of protected weights the part outside the protected directions, in float64."""
    total = 0.0
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        free = weight.grad.double()
        if name in subspaces:
            free = free - subspaces[name].protected_left(free)
            free = free - subspaces[name].protected_right(free.mT).mT
        total += float(free.square().sum())
    return total**0.5


@pytest.mark.parametrize("state", ["full", "subspace"])
def test_the_norm_that_is_clipped_and_logged_is_that_after_projection(make: Make, state: str) -> None:
    trainer = make(state=state, max_grad_norm=1e-3, protect=0.5)
    norms: list[float] = []
    clip = trainer._clip_grad_norm

    def spy(model: torch.nn.Module) -> torch.Tensor:
        norms.append(free_norm(model, trainer.subspaces))
        return clip(model)

    trainer._clip_grad_norm = spy
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(logged) == 3
    assert logged == pytest.approx(norms, rel=1e-5)
    assert min(norms) > 1e-2


def test_without_clipping_no_norm_is_taken(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdamW, "clip_grad_norm_", None)
    trainer = make(max_grad_norm=0.0)
    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", None)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 3
    assert all("grad_norm" not in entry for entry in entries)


@pytest.mark.parametrize("norm", [0.0, 0.1])
def test_gradients_between_passes_are_compressed_and_the_steps_the_same(
    make: Make, llama: LlamaForCausalLM, norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"state": "subspace", "batch_size": 2, "gradient_accumulation_steps": 4, "max_grad_norm": norm}
    held: list[int] = []
    pass_once = SubspaceTrainer.training_step

    def spy(self: SubspaceTrainer, model: torch.nn.Module, *rest: Any, **named: Any) -> torch.Tensor:
        held.append(sum(w.grad is not None for name, w in model.named_parameters() if name in self.subspaces))
        return pass_once(self, model, *rest, **named)

    monkeypatch.setattr(SubspaceTrainer, "training_step", spy)
    compressed, full = make(**settings), make(**settings)
    full.callback_handler.callbacks = [c for c in full.callback_handler.callbacks if "Compress" not in type(c).__name__]
    compressed.train()
    assert held == [0] * 12
    full.train()
    assert held[12:] == [0, 14, 14, 14] * 3
    assert_same_change(compressed, full, llama)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"state": "full"}, 3),
        ({"state": "full", "protect": None}, 3),
        ({"state": "subspace"}, 3),
        # 4 passes an epoch: a step of 3 and one of the rest, which is not to reach into the next epoch.
        ({"state": "subspace", "batch_size": 4, "gradient_accumulation_steps": 3}, 4),
    ],
)
def test_steps_in_the_backward_pass_are_the_same_steps(
    settings: dict[str, Any], steps: int, make: Make, llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**settings, "max_grad_norm": 0.0, "max_steps": steps, "lr_scheduler_type": "linear"}
    held: list[int] = []
    step = AdamW.step

    def spy(self: AdamW, *rest: Any) -> Any:
        held.append(sum(p.grad is not None for group in self.param_groups for p in group["params"]))
        return step(self, *rest)

    monkeypatch.setattr(AdamW, "step", spy)
    apart, fused = make(**settings), make(**settings, fuse_backward=True)
    apart.train()
    assert min(held) > 0
    held.clear()
    fused.train()
    if "gradient_accumulation_steps" not in settings:
        assert held == [0] * steps
    assert_same_change(apart, fused, llama)
    # The weights live on into the next task: no hook of this one's may.
    assert not any(weight._post_accumulate_grad_hooks for weight in fused.model.parameters())


def test_hooks_are_gone_after_a_fault_too(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(fuse_backward=True, max_grad_norm=0.0)
    monkeypatch.setattr(trainer, "training_step", None)
    with pytest.raises(TypeError):
        trainer.train()
    assert trainer.optimizer is not None
    assert not any(weight._post_accumulate_grad_hooks for weight in trainer.model.parameters())


def state_of(trainer: SubspaceTrainer, name: str) -> dict[str, torch.Tensor]:
    parameter = dict(trainer.model.named_parameters())[name]
    state: dict[str, torch.Tensor] = trainer.optimizer.state[parameter]
    return state


def test_options_reach_the_optimizer(make: Make) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    moments = {}
    for settings in (
        {"state": "full"},
        {"state": "subspace"},
        {"moment_dtype": "bfloat16"},
        {"dtype": "bfloat16", "master": "split"},
        {"dtype": "bfloat16", "master": "stochastic", "moment_dtype": "bfloat16"},
        {"decay_to": "start", "weight_decay": 0.1},
    ):
        trainer = make(**settings, max_steps=1)
        trainer.train()
        state = state_of(trainer, name)
        moments[str(settings)] = (tuple(state["exp_avg"].shape), state["exp_avg"].dtype)
        assert ("low" in state) == ("split" in settings.values())
        assert ("start" in state) == ("start" in settings.values())
    full, low, free = (64, 32), torch.bfloat16, (48, 16)
    assert list(moments.values()) == [
        *[(full, torch.float32), (free, torch.float32), (full, low)],
        *[(full, torch.float32), (full, low), (full, torch.float32)],
    ]


def test_the_seed_of_stochastic_rounding_is_the_runs_own(make: Make) -> None:
    changes = []
    for seed in (0, 0, 1):
        trainer = make(dtype="bfloat16", master="stochastic", seed=seed)
        optimizer = trainer.create_optimizer()
        weight = trainer.model.lm_head.weight
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        changes.append(weight.detach().clone())
    assert torch.equal(changes[0], changes[1])
    assert not torch.equal(changes[0], changes[2])


# Largest shares seen after three steps: 1.2e-6 (16-bit bases), 8e-3 (stochastic rounding of the weights).
FP32, BF16 = 3e-6, 2e-2


@pytest.mark.parametrize(
    ("change", "leak"),
    [
        ({"state": "subspace"}, FP32),
        ({"state": "subspace", "basis_dtype": "bfloat16"}, FP32),
        ({"basis_dtype": "float16", "protect": 0.75, "sides": "left"}, FP32),
        ({"moment_dtype": "bfloat16", "state": "subspace"}, FP32),
        ({"decay_to": "start", "weight_decay": 0.1}, FP32),
        ({"fuse_backward": True, "max_grad_norm": 0.0}, FP32),
        ({"fuse_backward": True, "max_grad_norm": 0.0, "state": "subspace", "gradient_accumulation_steps": 2}, FP32),
        ({"bf16": True, "state": "subspace", "gradient_checkpointing": True, "gradient_accumulation_steps": 2}, FP32),
        # The rounding of bfloat16 weights, 2^-9 of a weight, is part of their change.
        ({"dtype": "bfloat16", "master": "split", "state": "subspace", "basis_dtype": "bfloat16"}, BF16),
        ({"dtype": "bfloat16", "master": "stochastic", "moment_dtype": "bfloat16"}, BF16),
        ({"dtype": "bfloat16", "master": "split", "protect": None}, None),
    ],
)
def test_whole_runs(change: dict[str, Any], leak: float | None, short: dict[str, Any], tmp_path: Path) -> None:
    result = train(TrainConfig(**{**short, **change}, output=tmp_path / "out"), quiet=True)
    for task in result.learned:
        assert task.steps == 3
        assert 0 < task.losses[-1][1] < task.losses[0][1]
        assert (leak is None) == (not task.leak)
        assert all(share < leak for share in task.leak.values() if leak is not None)
    loaded = RunResult.load(tmp_path / "out")
    settings = {name: value for name, value in change.items() if name != "protect"}
    assert settings.items() <= loaded.config.items()

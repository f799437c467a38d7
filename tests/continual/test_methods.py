"""Every method by what defines it, and all of them in whole runs that are stopped and go on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sculpt_ops import Subspaces
from sculpt_ops.continual import Task, TrainConfig, train
from sculpt_ops.continual.config import METHODS
from sculpt_ops.continual.encoding import Collator, EncodedTask, encode_task
from sculpt_ops.continual.methods import Method, TaskContext, make_method
from sculpt_ops.continual.methods.adapters import svd_by_eigenvectors
from sculpt_ops.targets import resolve_targets

pytest.importorskip("transformers", reason="the trainer needs pip install sculpt-ops[train]")

ADAPTERS = ("lora", "o-lora", "peft-osf")
WEIGHT = "model.layers.0.mlp.up_proj.weight"
Weights = dict[str, Tensor]


@pytest.fixture
def encoded(toy_tasks: list[Task], tokenizer: Any) -> list[EncodedTask]:
    return [encode_task(task, tokenizer, 64, False) for task in toy_tasks]


@pytest.fixture
def begin(encoded: list[EncodedTask], llama: Any, tokenizer: Any) -> Callable[..., tuple[Method, TaskContext]]:
    """A method before its first task, and what it is told of it."""

    def made(name: str, **options: Any) -> tuple[Method, TaskContext]:
        if name in ADAPTERS:
            pytest.importorskip("peft", reason="the adapters are PEFT's")
        config = TrainConfig(model="m", tasks=["a", "b"], output="o", method=name, **options)
        method = make_method(config)
        method.prepare(llama)
        return method, TaskContext(0, encoded, llama, Collator(llama, tokenizer), config)

    return made


def loss_of(context: TaskContext) -> Tensor:
    loss: Tensor = context.model(**context.collate(context.rows[:4])).loss
    return loss


def learn(method: Method, context: TaskContext, steps: int = 4, lr: float = 1e-2) -> Subspaces | None:
    """A few steps of torch's AdamW, up to the end of the task."""
    subspaces = method.begin_task(context)
    steps_of(method, context, steps, lr)
    method.end_task(context)
    return subspaces


def steps_of(method: Method, context: TaskContext, steps: int = 4, lr: float = 1e-2) -> None:
    trained = [p for p in context.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    for _ in range(steps):
        penalty = method.penalty(context.model)
        loss = loss_of(context)
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights_of(model: Any) -> Weights:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def changed(before: Weights, model: Any) -> set[str]:
    return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}


def test_the_names_are_those_of_the_settings() -> None:
    for name in METHODS:
        if name not in ADAPTERS:
            make_method(TrainConfig(model="m", tasks=["a"], output="o", method=name))
    with pytest.raises(ValueError, match="method: got 'ewc' in several processes, wanted one of sculpt, plain"):
        make_method(TrainConfig(model="m", tasks=["a"], output="o", method="ewc"), parallel=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "magic"}, "method: got 'magic', wanted one of sculpt, random"),
        ({"method": "peft-osf", "protect": None}, "protect: got none with method 'peft-osf', wanted a share"),
        ({"method": "replay", "replay_share": 2.0}, r"replay_share: got 2.0, wanted a share in \(0, 1\]"),
        ({"method": "interpolate", "interpolation": 0.0}, "interpolation: got 0.0, wanted more than 0"),
        ({"method": "lora", "lora_rank": 0}, "lora_rank: got 0, wanted more than 0"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainConfig(model="m", tasks=["a"], output="o", **settings)


@pytest.mark.parametrize("protect", [0.25, 0.75])
def test_random_bases_have_the_same_ranks_and_know_nothing_of_the_weights(begin: Any, protect: float) -> None:
    method, context = begin("random", protect=protect, others="freeze")
    ours = Subspaces.from_model(context.model, protect)
    drawn = method.begin_task(context)
    assert drawn is not None
    again = begin("random", protect=protect)[0].begin_task(context)
    for name, layer in drawn.items():
        weight = context.model.get_parameter(name).detach().double()
        assert layer.rank == ours[name].rank
        assert layer.protected_dims == ours[name].protected_dims
        for basis, real, other in zip(layer.tensors(), ours[name].tensors(), again[name].tensors(), strict=True):
            assert basis.shape == real.shape
            gram = basis.double().mT @ basis.double()
            assert (gram - torch.eye(len(gram))).norm() < 1e-5
            assert torch.equal(basis, other)
        assert layer.left_basis is not None
        assert layer.right_basis is not None
        free = weight - layer.left_basis.protected(weight)
        free = free - layer.right_basis.protected(free.mT.contiguous()).mT
        assert layer.energy == pytest.approx(1 - float(free.norm() / weight.norm()) ** 2, abs=1e-5)
    # Frozen as by the real ones, and bound to the same weights.
    assert {name for name, p in context.model.named_parameters() if p.requires_grad} == set(drawn)
    assert drawn.parameter(WEIGHT) is context.model.get_parameter(WEIGHT)
    later = method.begin_task(replace(context, index=1))
    assert later is not None
    assert not torch.equal(next(later[WEIGHT].tensors()), next(drawn[WEIGHT].tensors()))


def test_first_keeps_the_bases_of_the_first_weights(begin: Any) -> None:
    method, context = begin("first", protect=0.25)
    first = learn(method, context)
    assert first is not None
    second = method.begin_task(replace(context, index=1))
    resumed, _ = begin("first", protect=0.25)
    resumed.load_state(method.state())
    third = resumed.begin_task(replace(context, index=1))
    for again in (second, third):
        assert again is not None
        for name, layer in first.items():
            for a, b in zip(layer.tensors(), again[name].tensors(), strict=True):
                assert torch.equal(a, b)
        # The start of the change is that of the task, and not of the first one.
        assert max(leak.change for leak in again.leak().values()) < 1e-4
    anew = Subspaces.from_model(context.model, 0.25)
    assert not torch.allclose(next(anew[WEIGHT].tensors()).abs(), next(first[WEIGHT].tensors()).abs(), atol=1e-3)


def test_interpolation_takes_the_change_back_by_a_share(begin: Any) -> None:
    method, context = begin("interpolate", interpolation=0.25)
    start = weights_of(context.model)
    method.begin_task(context)
    steps_of(method, context)
    end = weights_of(context.model)
    method.end_task(context)
    for name, weight in context.model.named_parameters():
        torch.testing.assert_close(weight.detach(), start[name] + 0.25 * (end[name] - start[name]))


def test_per_task_starts_from_the_first_weights(begin: Any) -> None:
    method, context = begin("per-task")
    start = weights_of(context.model)
    learn(method, context)
    assert changed(start, context.model)
    method.begin_task(replace(context, index=1))
    assert not changed(start, context.model)


def test_replay_adds_rows_of_each_earlier_task(begin: Any) -> None:
    method, context = begin("replay", replay_share=0.25, seed=3)
    assert method.train_rows(context) == context.rows
    rows = method.train_rows(replace(context, index=1))
    own, earlier = context.tasks[1].train, context.tasks[0].train
    assert rows[: len(own)] == own
    added = rows[len(own) :]
    assert len(added) == round(0.25 * len(earlier))
    assert all(row in earlier for row in added)
    assert begin("replay", replay_share=0.25, seed=3)[0].train_rows(replace(context, index=1)) == rows
    other, _ = begin("replay", replay_share=0.25, seed=4)
    assert other.train_rows(replace(context, index=1, config=replace(context.config, seed=4))) != rows


def test_multitask_learns_all_at_once(begin: Any) -> None:
    method, context = begin("multitask")
    assert method.train_rows(context) == [row for task in context.tasks for row in task.train]
    assert method.train_rows(replace(context, index=1)) == []


def test_ewc_is_the_formula(begin: Any) -> None:
    """lambda / 2 times the sum over tasks of F (w - w*)², F the mean of squared gradients row by row."""
    method, context = begin("ewc", ewc_lambda=7.0, ewc_rows=len(begin("ewc")[1].rows))
    model = context.model
    method.begin_task(context)
    assert method.penalty(model) is None
    learn(method, context)
    wanted = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in model.named_parameters()}
    for row in context.rows:
        model.zero_grad()
        model(**context.collate([row])).loss.backward()
        for name, weight in model.named_parameters():
            assert weight.grad is not None
            wanted[name] += weight.grad.double().square() / len(context.rows)
    model.zero_grad()
    anchor = weights_of(model)
    penalty = method.penalty(model)
    assert penalty is not None
    assert float(penalty.detach()) == 0.0
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01)
    penalty = method.penalty(model)
    assert penalty is not None
    grads = torch.autograd.grad(penalty, list(model.parameters()))
    for (name, weight), grad in zip(model.named_parameters(), grads, strict=True):
        formula = 7.0 * wanted[name] * (weight.detach() - anchor[name]).double()
        assert (grad.double() - formula).norm() <= 1e-4 * formula.norm()
    # A second task adds its own, around the weights at its end.
    method.end_task(replace(context, index=1))
    state = method.state()
    assert torch.equal(state[f"anchor:{WEIGHT}"], model.get_parameter(WEIGHT))
    assert float(state[f"fisher:{WEIGHT}"].sum()) > float(wanted[WEIGHT].sum())
    resumed, _ = begin("ewc", ewc_lambda=7.0)
    resumed.load_state(state)
    resumed.begin_task(context)
    with torch.no_grad():
        model.get_parameter(WEIGHT).add_(0.01)
    torch.testing.assert_close(resumed.penalty(model), method.penalty(model))


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_in_the_weights_after_the_task(begin: Any, name: str) -> None:
    method, context = begin(name, **({"protect": 0.5} if name == "peft-osf" else {}))
    model = context.model
    start, names = weights_of(model), [n for n, _ in model.named_parameters()]
    before = loss_of(context).detach()
    method.begin_task(context)
    torch.testing.assert_close(loss_of(context).detach(), before)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert not set(trained) & set(names)
    steps_of(method, context)
    with_adapters = loss_of(context).detach()
    assert with_adapters < before - 0.1
    method.end_task(context)
    assert [n for n, _ in model.named_parameters()] == names
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(loss_of(context).detach(), with_adapters, rtol=1e-5, atol=1e-5)
    assert changed(start, model) == set(resolve_targets(model, None))
    # The next task starts from there.
    method.begin_task(replace(context, index=1))
    torch.testing.assert_close(loss_of(context).detach(), with_adapters, rtol=1e-5, atol=1e-5)
    method.end_task(replace(context, index=1))


def test_lora_is_one_adapter_for_all_tasks(begin: Any) -> None:
    method, context = begin("lora", lora_rank=2)
    start = weights_of(context.model)
    for index in range(3):
        at = replace(context, index=index % 2)
        learn(method, at)
        change = (context.model.get_parameter(WEIGHT).detach() - start[WEIGHT]).double()
        singular = torch.linalg.svdvals(change)
        assert singular[2] < 1e-4 * singular[0]
    # As a resumed run takes it up.
    resumed, _ = begin("lora", lora_rank=2)
    resumed.load_state(method.state())
    resumed.begin_task(context)
    base = context.model.get_submodule(WEIGHT.removesuffix(".weight")).get_base_layer().weight
    assert (base - start[WEIGHT]).norm() < 1e-4 * float(start[WEIGHT].norm())
    resumed.end_task(context)


def test_o_lora_adds_an_adapter_a_task_orthogonal_to_the_others(begin: Any) -> None:
    ranks, overlaps = [], []
    for strength in (0.0, 10.0):
        method, context = begin("o-lora", lora_rank=2, olora_lambda=strength)
        start = weights_of(context.model)
        learn(method, context)
        second = replace(context, index=1)
        method.begin_task(second)
        a = {n: p for n, p in context.model.named_parameters() if ".lora_A." in n}
        earlier = method.state()
        assert {key.partition(":")[2] for key in earlier} == set(a)
        penalty = method.penalty(context.model)
        assert penalty is not None
        written = strength * sum((earlier[f"0:{n}"] @ p.T).abs().sum() for n, p in a.items())
        torch.testing.assert_close(penalty, torch.as_tensor(written))
        kept = {key: value.clone() for key, value in earlier.items()}
        steps_of(method, second, steps=30)
        overlaps.append(sum(float((earlier[f"0:{n}"] @ p.detach().T).norm()) for n, p in a.items()))
        assert all(torch.equal(kept[key], earlier[key]) for key in kept)
        method.end_task(second)
        assert len(method.state()) == 2 * len(a)
        singular = torch.linalg.svdvals((context.model.get_parameter(WEIGHT).detach() - start[WEIGHT]).double())
        ranks.append(int((singular > 1e-4 * singular[0]).sum()))
        context.model.load_state_dict(start, strict=False)
    assert ranks == [4, 4]
    assert overlaps[1] < 0.5 * overlaps[0]


def test_o_lora_draws_every_tasks_adapter_afresh(begin: Any) -> None:
    def drawn(method: Method, context: TaskContext) -> Weights:
        method.begin_task(context)
        return {n: p.detach().clone() for n, p in context.model.named_parameters() if ".lora_A." in n}

    method, context = begin("o-lora", lora_rank=2, seed=3)
    start, second = weights_of(context.model), replace(context, index=1)
    first = drawn(method, context)
    method.end_task(context)
    state = dict(method.state())
    later = drawn(method, second)
    method.end_task(second)
    assert not any(torch.equal(first[name], later[name]) for name in first)
    # Two rows drawn at random in 32 dimensions and more: along the first ones this would be its norm squared.
    overlap = sum(float((first[name] @ later[name].T).norm()) for name in first)
    assert overlap < 0.5 * sum(float((first[name] @ first[name].T).norm()) for name in first)
    # A run that is resumed in the second task, wherever the generator stands.
    context.model.load_state_dict(start, strict=False)
    resumed, again = begin("o-lora", lora_rank=2, seed=3)
    resumed.load_state(state)
    torch.manual_seed(77)
    taken_up = drawn(resumed, replace(again, index=1))
    assert all(torch.equal(later[name], taken_up[name]) for name in later)


def test_peft_osf_protects_the_top_directions_of_each_task(begin: Any) -> None:
    method, context = begin("peft-osf", protect=0.5)
    for index in range(2):
        ours = Subspaces.from_model(context.model, 0.5)
        method.begin_task(replace(context, index=index))
        steps_of(method, replace(context, index=index), steps=1, lr=1e-3)
        # The gradient is projected and the step is not: a first step of Adam has the size of lr everywhere.
        leaks = []
        for name, module in context.model.named_modules():
            if hasattr(module, "osf_svd_params"):
                layer = ours[f"{name}.weight"]
                change = module.get_delta_weight("default").detach().double()
                assert layer.left is not None
                assert change.norm() > 0
                leaks.append(float(layer.protected_left(change.float()).norm() / change.norm()))
        assert 0.01 < max(leaks) < 0.8
        method.end_task(replace(context, index=index))


RUNS: dict[str, dict[str, Any]] = {
    "random": {"protect": 0.25, "remember": "rank:2"},
    "first": {"protect": 0.25},
    "plain": {},
    "interpolate": {"interpolation": 0.5},
    "lora": {"lora_rank": 2},
    "o-lora": {"lora_rank": 2},
    "peft-osf": {"protect": 0.5},
    "replay": {"replay_share": 0.25},
    "ewc": {"ewc_rows": 4},
    "multitask": {},
    "per-task": {},
    "sculpt": {"protect": 0.25, "remember": "rank:2+inputs:0.5", "others": "freeze"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_from_every_kind_of_state(
    name: str, short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second task, before and after a checkpoint: to the bit what it would have been."""
    if name in ADAPTERS:
        pytest.importorskip("peft", reason="the adapters are PEFT's")
    from sculpt_ops.continual import hf_trainer

    settings = {**short, **RUNS[name], "method": name, "max_steps": 3}
    whole = train(TrainConfig(**settings, output=tmp_path / "whole"), quiet=True)
    assert whole.complete
    assert whole.config["method"] == name
    steps = hf_trainer.StepClock.on_step_end
    for save_every in (0, 1):
        output = tmp_path / f"cut {save_every}"
        done = 0

        def cut(self: Any, *arguments: Any, **options: Any) -> None:
            nonlocal done
            done += 1
            steps(self, *arguments, **options)
            # Multitask makes no steps in the second task.
            if done == (2 if name == "multitask" else 5):
                raise KeyboardInterrupt

        monkeypatch.setattr(hf_trainer.StepClock, "on_step_end", cut)
        with pytest.raises(KeyboardInterrupt):
            train(TrainConfig(**settings, output=output, save_every=save_every), quiet=True)
        monkeypatch.setattr(hf_trainer.StepClock, "on_step_end", steps)
        resumed = train(TrainConfig(**settings, output=output, save_every=save_every, resume=True), quiet=True)
        assert [p.prediction for p in resumed.predictions] == [p.prediction for p in whole.predictions]
        one, other = ((folder / "model" / "model.safetensors").read_bytes() for folder in (tmp_path / "whole", output))
        assert one == other
        assert not (output / "checkpoint").exists()
        shutil.rmtree(output)


@pytest.mark.parametrize("name", ["sculpt", "lora", "replay"])
def test_encoder_decoders_learn_by_them(name: str, short: dict[str, Any], t5_folder: Path, tmp_path: Path) -> None:
    if name in ADAPTERS:
        pytest.importorskip("peft", reason="the adapters are PEFT's")
    settings = {**short, **RUNS[name], "method": name, "model": t5_folder}
    result = train(TrainConfig(**settings, output=tmp_path / "out"), quiet=True)
    assert result.complete
    assert result.learned[0].losses[-1][1] < result.learned[0].losses[0][1]


@pytest.mark.parametrize("shape", [(12, 12), (20, 8), (8, 20)])
def test_a_decomposition_by_eigenvectors_is_the_svd(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = svd_by_eigenvectors(matrix)
    assert found is not None
    U, S, Vh = found
    wanted = torch.linalg.svd(matrix, full_matrices=False)
    assert [tuple(part.shape) for part in (U, S, Vh)] == [tuple(part.shape) for part in wanted]
    torch.testing.assert_close(S, wanted.S, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((U * S) @ Vh, matrix, rtol=1e-5, atol=1e-6)
    for basis in (U, Vh.mT):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(min(shape)), rtol=0.0, atol=2e-6)
    # Signs apart the same vectors.
    torch.testing.assert_close((U.mT @ wanted.U).abs(), torch.eye(min(shape)), rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("least", [0.0, 1e-9, 3e-6])
def test_a_matrix_without_full_rank_is_left_to_the_svd(least: float) -> None:
    """Its last vectors would be noise over noise, or not numbers."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(size, 8, generator=generator, dtype=torch.float64)).Q for size in (20, 8))
    spectrum = torch.tensor([1.0, 0.9, 0.5, 0.4, 0.3, 0.2, 0.1, least], dtype=torch.float64)
    matrix = ((U * spectrum) @ V.mT).float()
    assert svd_by_eigenvectors(matrix) is None
    assert svd_by_eigenvectors(matrix.mT) is None

"""What a run derives before each task: subspaces of the weights as they stand, and of what earlier tasks taught."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from sculpt_ops import Subspaces
from sculpt_ops.continual import RunResult, Task, TrainConfig, train
from sculpt_ops.continual.encoding import encode_task
from sculpt_ops.continual.estimate import estimate
from sculpt_ops.continual.methods.sculpt import Sculpt
from sculpt_ops.continual.own_text import check_generates, generate_rows
from sculpt_ops.layer import project_each_
from sculpt_ops.ranks import Importance, Rank
from sculpt_ops.remember import Remembered, join

transformers = pytest.importorskip("transformers", reason="the trainer needs pip install sculpt-ops[train]")

Weights = dict[str, torch.Tensor]


def test_subspaces_are_those_of_the_weights_before_each_task(
    short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, Weights]] = []
    starts: list[Any] = []
    derive = Subspaces.from_model

    def spy(model: torch.nn.Module, **arguments: Any) -> Any:
        starts.append(arguments["previous"])
        subspaces = derive(model, **arguments)
        seen.append((subspaces, {name: weight.detach().clone() for name, weight in model.named_parameters()}))
        return subspaces

    monkeypatch.setattr(Subspaces, "from_model", spy)
    monkeypatch.setattr("sculpt_ops.subspaces.search_starts", dict)
    train(TrainConfig(**short, output=tmp_path / "out", protect=Rank(4), sides="left"), quiet=True)
    assert len(seen) == 2
    assert starts == [None, dict(seen[0][0])]
    for subspaces, at_start in seen:
        for name, layer in subspaces.items():
            left = torch.linalg.svd(at_start[name]).U[:, :4]
            torch.testing.assert_close(layer.left @ layer.left.T, left @ left.T, atol=1e-4, rtol=0)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(seen[0][1][name], seen[1][1][name])


def test_a_schedule_protects_more_with_every_task(short: dict[str, Any], tmp_path: Path) -> None:
    result = train(TrainConfig(**short, output=tmp_path / "out", protect="schedule"), quiet=True)
    assert result.config["protect"] == "schedule"
    assert result.learned[0].leak_over_time == []
    assert set(result.learned[0].leak.values()) == {0.0}
    assert len(result.learned[1].leak_over_time) == 3
    for task, share in zip(result.learned, (0.0, 0.5), strict=True):
        assert {layer["rank"] / min(layer["shape"]) for layer in task.layers.values()} == {share}


def test_importance_is_measured_on_rows_of_the_task_before(
    short: dict[str, Any], toy_tasks: list[Task], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    derive = Subspaces.from_model

    def spy(model: torch.nn.Module, **arguments: Any) -> Any:
        given.append(arguments.pop("batches"))
        assert arguments["protect"] == Importance(0.2, 0.6)
        with torch.no_grad():  # the cosines of random weights are noise around 0
            for name, weight in model.named_parameters():
                if "proj" in name:
                    weight.add_(torch.eye(*weight.shape))
        return derive(model, batches=given[-1], **arguments)

    monkeypatch.setattr(Subspaces, "from_model", spy)
    for name, value in {"MEASURED_ROWS": 5, "BATCH_ROWS": 3}.items():
        monkeypatch.setattr(f"sculpt_ops.continual.methods.sculpt.{name}", value)
    result = train(TrainConfig(**short, output=tmp_path / "out", protect=Importance(0.2, 0.6)), quiet=True)
    assert result.config["protect"] == "importance:0.2:0.6"
    rows = encode_task(toy_tasks[0], tokenizer, short["max_length"], seq2seq=False).train
    training = {tuple(row.prompt + row.answer) for row in rows}
    for batches in given:
        kept = [zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True) for batch in batches]
        seen = {tuple(ids[mask].tolist()) for rows_of in kept for ids, mask in rows_of}
        assert len(seen) == 5
        assert len(batches) == 2
        assert seen <= training
    ranks = {layer["rank"] for layer in result.learned[1].layers.values()}
    assert len(ranks) > 1


def test_what_a_task_has_taught_is_protected_in_the_next(short: dict[str, Any], tmp_path: Path) -> None:
    shares = {}
    for remember in ("rank:1.0", "rank:2", "rank:1.0+inputs:0.9", "inputs:0.9"):
        config = TrainConfig(**short, output=tmp_path / remember, protect=0.25, remember=remember)
        first, second = train(config, quiet=True).learned
        assert first.remembered == {}
        shares[remember] = list(second.remembered.values())
        assert RunResult.load(config.output).learned[1].remembered == second.remembered
        assert second.leak_over_time
    assert min(shares["rank:1.0"]) > 1 - 1e-4
    assert min(shares["rank:1.0+inputs:0.9"]) > 1 - 1e-4
    assert 0.3 < sum(shares["rank:2"]) / len(shares["rank:2"]) < 0.99
    # Adam's change does not lie among the inputs alone.
    assert 0.5 < sum(shares["inputs:0.9"]) / len(shares["inputs:0.9"]) < 1.0


def outside(change: torch.Tensor, remembered: Remembered) -> torch.Tensor:
    """What of `change` is not remembered, in float64."""
    rest = change.double()
    if spans := remembered.spans("left"):
        basis = join(spans)
        rest = rest - basis @ (basis.mT @ rest)
    if spans := remembered.spans("right"):
        basis = join(spans)
        rest = rest - rest @ basis @ basis.mT
    return rest


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("protect", [0.0, 0.25])
@pytest.mark.parametrize("remember", ["rank:2", "inputs:0.5", "rank:2+inputs:0.5"])
def test_what_is_remembered_of_a_task_never_becomes_less(
    remember: str,
    protect: float,
    short: dict[str, Any],
    toy_tasks: list[Task],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of every earlier change, under the subspaces of every later task: the share that is protected, and the share that
    is remembered. With protect 0 they are the same."""
    starts: list[Weights] = []
    protected: dict[tuple[int, str], list[float]] = {}
    kept: dict[tuple[int, str], list[float]] = {}
    begin = Sculpt.begin_task

    def watched(method: Sculpt, context: Any) -> Any:
        subspaces = begin(method, context)
        assert subspaces is not None
        weights = dict(context.model.named_parameters())
        starts.append({name: weights[name].detach().clone() for name in subspaces})
        for task, (before, after) in enumerate(pairwise(starts)):
            for name, layer in subspaces.items():
                change = after[name] - before[name]
                free = change.clone()
                project_each_([(free, layer)])
                for shares, rest in ((protected, free), (kept, outside(change, subspaces.remembered[name]))):
                    shares.setdefault((task, name), []).append(float((change - rest).norm() / change.norm()))
        return subspaces

    monkeypatch.setattr(Sculpt, "begin_task", watched)
    tasks = [*toy_tasks, *(replace(task, name=f"{task.name} again") for task in toy_tasks)]
    settings = {**short, "tasks": tasks, "max_steps": 6, "lr": 1e-3, "eval_items": 1, "eval_options": False}
    result = train(TrainConfig(**settings, output=tmp_path / "out", protect=protect, remember=remember), quiet=True)
    falls = {
        what: max(one - other for shares in found.values() for one, other in pairwise(shares))
        for what, found in (("protected", protected), ("remembered", kept))
    }
    # With a larger protect less may be protected later, as the top directions of the weights are others then.
    print(f"protect {protect}, remember {remember}: largest fall of the share {falls}")
    assert {len(shares) for shares in protected.values()} == {1, 2, 3}
    assert falls["remembered"] < 1e-5
    if protect == 0.0:
        assert falls["protected"] < 1e-5
        for key, shares in protected.items():
            assert shares == pytest.approx(kept[key], abs=1e-5)
    if remember != "inputs:0.5":
        for task, learned in enumerate(result.learned[1:]):
            first = {name: protected[task, name][0] for name in learned.remembered}
            assert learned.remembered == pytest.approx(first, abs=1e-5)
            assert learned.remembered_earlier[:-1] == [None] * task
    elif protect == 0.0:
        # From sketches of one side, which is all that is protected.
        for later, learned in enumerate(result.learned):
            exact = [
                median(shares[later - 1 - of] for (task, _), shares in kept.items() if task == of)
                for of in range(later)
            ]
            assert learned.remembered_earlier == pytest.approx(exact, rel=0.1)


def test_abilities_are_measured_before_and_after(short: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the old dog has a deep blue sky and the new cat has green grass ; " * 6)
    rows = [{"question": "what is it ?", "options": "\nA. grass\nB. deep blue\nC. snow", "answer": "B. deep blue"}] * 3
    (tmp_path / "choices.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = [tmp_path / "text.txt", tmp_path / "choices.jsonl"]
    settings = {**short, "output": tmp_path / "out", "ability": sources, "ability_items": 2}
    result = train(TrainConfig(**settings), quiet=True)
    before, after = result.ability["before"], result.ability["after"]
    assert before.keys() == after.keys() == {"text perplexity", "choices accuracy", "choices items"}
    assert before["choices items"] == 2
    assert before["text perplexity"] > 50
    assert before["text perplexity"] != after["text perplexity"]
    assert RunResult.load(tmp_path / "out").ability == result.ability
    with pytest.raises(ValueError, match=r"missing\.txt"):
        train(TrainConfig(**{**settings, "ability": [tmp_path / "missing.txt"], "output": tmp_path / "no"}), quiet=True)


def test_left_to_itself_a_run_protects_inputs_whichever_side_they_lie_on(
    short: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    """GPT-2 stores its matrices (in, out)."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    result = train(TrainConfig(**{**short, "model": tmp_path / "model"}, output=tmp_path / "out"), quiet=True)
    first, second = result.learned
    assert set(first.leak.values()) == {0.0}
    assert len(second.leak_left) == 8
    assert 0.0 < min(second.leak_left.values()) < max(second.leak_left.values()) < 1e-6
    assert set(second.leak_right.values()) == {0.0}


def test_what_a_text_feeds_the_layers_is_kept_from_the_first_task_on(
    short: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    text = tmp_path / "known.txt"
    text.write_text("the old cat says meow . the sky is deep blue . " * 40)
    settings = {**short, "remember": "inputs:0.9", "others": "freeze"}
    plain = train(TrainConfig(**settings, output=tmp_path / "without"), quiet=True)
    result = train(TrainConfig(**settings, output=tmp_path / "with", remember_text=text), quiet=True)
    for before, task in zip((plain.learned[0], result.learned[0]), result.learned, strict=True):
        for name, layer in task.layers.items():
            assert layer["protected"][1] > before.layers[name]["protected"][1], name
    # What the text feeds the first layer does not change while its own weights do.
    start = transformers.AutoModelForCausalLM.from_pretrained(short["model"])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "with" / "model")
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "without" / "model")
    ids = torch.tensor([tokenizer(text.read_text())["input_ids"][:40]])
    fed = start.model.layers[0].input_layernorm(start.model.embed_tokens(ids))
    moved = [
        float(
            (each.model.layers[0].self_attn.q_proj(fed) - start.model.layers[0].self_attn.q_proj(fed)).detach().norm()
        )
        for each in (model, other)
    ]
    assert 0.0 < moved[0] < 0.5 * moved[1]


def test_a_text_that_the_model_writes_is_kept_too(short: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    settings = {**short, "remember": "inputs:0.9", "others": "freeze"}
    plain = train(TrainConfig(**settings, output=tmp_path / "without"), quiet=True)
    settings |= {"remember_text": "generated", "output": tmp_path / "with"}
    result = train(TrainConfig(**settings), quiet=True)
    for name, layer in result.learned[0].layers.items():
        assert layer["protected"][1] > plain.learned[0].layers[name]["protected"][1], name
    text = (tmp_path / "with" / "generated.txt").read_text()
    assert len(text.split("\n\n")) == 32
    again = train(TrainConfig(**{**settings, "output": tmp_path / "again"}), quiet=True)
    assert (tmp_path / "again" / "generated.txt").read_text() == text
    assert again.accuracy == result.accuracy
    assert again.learned[1].losses == result.learned[1].losses
    # A run that goes on with what it has kept does not ask the changed model for a text.
    (tmp_path / "again" / "generated.txt").unlink()
    assert train(TrainConfig(**{**settings, "output": tmp_path / "again", "resume": True}), quiet=True).complete
    assert not (tmp_path / "again" / "generated.txt").exists()


def test_generated_rows(short: dict[str, Any], tokenizer: Any) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(short["model"]).train()
    random_state = torch.get_rng_state()
    rows = generate_rows(model, tokenizer, rows=11, length=24, seed=3, bf16=False)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    assert [len(row.prompt) + len(row.answer) for row in rows] == [24] * 11
    assert all(len(row.answer) == 3 for row in rows)
    texts = [tuple(row.prompt + row.answer) for row in rows]
    assert len(set(texts)) == 11
    assert not {token for text in texts for token in text[:-1]} & {tokenizer.eos_token_id}
    assert texts == [tuple(r.prompt + r.answer) for r in generate_rows(model, tokenizer, 11, 24, seed=3, bf16=False)]
    assert texts != [tuple(r.prompt + r.answer) for r in generate_rows(model, tokenizer, 11, 24, seed=4, bf16=False)]
    with pytest.raises(ValueError, match="remember_text: got 'generated' with FSDP, wanted a text file"):
        check_generates(model, sharded=True)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"remember": "rank:2"}, "remember_text: got 'known.txt' with remember rank:2, wanted one with inputs"),
        ({"protect": None}, "remember_text: got 'known.txt' with remember none"),
        ({}, "remember_text: there is no file known.txt"),
        ({"remember_text": "generated", "protect": None}, "remember_text: got 'generated' with remember none"),
    ],
)
def test_a_text_that_cannot_be_remembered_is_refused(
    change: dict[str, Any], complaint: str, short: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=complaint):
        train(TrainConfig(**{**short, "remember_text": "known.txt", **change}, output=tmp_path / "out"), quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_generates_nothing_and_an_encoder_decoder_writes_no_text(
    short: dict[str, Any], t5_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**short, "remember_text": "generated", "output": tmp_path / "out"}
    monkeypatch.chdir(tmp_path)
    Path("generated").write_text("a file that has the word's name")
    first, _ = estimate(TrainConfig(**settings)).tasks
    assert first.ranks is None
    for run in (estimate, train):
        with pytest.raises(ValueError, match="remember_text: got 'generated' with the encoder-decoder T5"):
            run(TrainConfig(**{**settings, "model": t5_folder}))
    assert not (tmp_path / "out").exists()

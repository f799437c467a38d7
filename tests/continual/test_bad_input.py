"""One clear error for every kind of wrong input, before any training, and nothing written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sculpt_ops.continual import Task, TrainConfig, prepare, train
from sculpt_ops.continual.estimate import estimate

pytest.importorskip("transformers", reason="the trainer needs pip install sculpt-ops[train]")
import transformers

from .conftest import make_llama


def refused(output: Path, **settings: Any) -> str:
    """The message of the error that a run with these settings ends in."""
    with pytest.raises(ValueError, match=r".") as caught:
        train(TrainConfig(**settings, output=output), quiet=True)
    assert not output.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("train.jsonl", "", "train.jsonl: no rows"),
        ("train.jsonl", '{"question": "why", "answer": "green"}', "train.jsonl, line 1: `prompt` is None, wanted text"),
        ("test.jsonl", '{"prompt": "why"}', "test.jsonl, line 1: `answer` is None, wanted text"),
        ("test.jsonl", '["why", "green"]', "test.jsonl, line 1: got list, wanted an object"),
        ("test.jsonl", '{"prompt": "why", "answer": "mauve"}', "the answer 'mauve' is none of the options"),
        ("test.jsonl", "why, green", "test.jsonl, line 1: not JSON"),
        ("options.json", "{}", "options.json: wanted a list of answers"),
        ("options.json", '["green", "blue", " green"]', "options.json: the option 'green' is there twice"),
        ("options.json", '["green", " "]', "options.json: the option '' is empty"),
        ("metric.json", '["exact"]', "metric: got ['exact'], wanted one of exact"),
    ],
)
def test_a_wrong_task(
    file: str,
    text: str,
    complaint: str,
    short: dict[str, Any],
    toy_tasks: list[Task],
    write_task: Callable[[Task], Path],
    tmp_path: Path,
) -> None:
    folders = [write_task(task) for task in toy_tasks]
    (folders[0] / file).write_text(text)
    assert complaint in refused(tmp_path / "out", **{**short, "tasks": folders})


def test_a_task_that_is_not_utf_8(
    short: dict[str, Any], toy_tasks: list[Task], write_task: Callable[[Task], Path], tmp_path: Path
) -> None:
    folder = write_task(toy_tasks[0])
    (folder / "train.jsonl").write_bytes(b'{"prompt": "caf\xe9", "answer": "green"}')
    assert "train.jsonl: not UTF-8 (byte 15" in refused(tmp_path / "out", **{**short, "tasks": [folder]})


def test_an_unknown_task(short: dict[str, Any], tmp_path: Path) -> None:
    message = refused(tmp_path / "out", **{**short, "order": ["smells"]})
    assert message == "order: no task smells, there are colours, sounds"
    message = refused(tmp_path / "out", **{**short, "order": ["colours", "colours"]})
    assert message == "order: the task colours is there twice"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"sides": "left"}, "remember: RememberInputs: given with sides='left', which leaves the inputs of"),
        ({"targets": "*.embed_tokens.weight"}, "model.embed_tokens.weight is in a Embedding, wanted a Linear"),
        ({"method": "lora", "targets": "*.nope"}, "targets: '*.nope' matches no parameter"),
        ({"method": "peft-osf", "protect": 0.01}, "protect: got 0.01 with method 'peft-osf', wanted at least one of"),
        ({"ability": ["nowhere.txt"]}, "ability: there is no file nowhere.txt"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type: got 'cosin'"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type: got 'cosine_with_min_lr'"),
        ({"seed": -5}, "seed: got -5, wanted 0 or more"),
        ({"lr": float("inf")}, "lr: got inf, wanted a finite number"),
    ],
)
def test_settings_that_do_not_go_with_the_model_or_each_other(
    change: dict[str, Any], complaint: str, short: dict[str, Any], tmp_path: Path
) -> None:
    settings = {name: value for name, value in short.items() if name not in ("protect", "remember", "others")} | change
    if change.get("method") in ("lora", "peft-osf"):
        pytest.importorskip("peft", reason="adapters need pip install peft")
    assert complaint in refused(tmp_path / "out", **settings)
    if "seed" not in change and "lr" not in change:
        with pytest.raises(ValueError, match=r".") as caught:
            estimate(TrainConfig(**settings, output=tmp_path / "out"))
        assert complaint in str(caught.value)


def test_weights_that_are_broken(short: dict[str, Any], model_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(model_folder, tmp_path / "model")
    whole, tensors = (model / "model.safetensors").read_bytes(), load_file(model / "model.safetensors")
    (model / "model.safetensors").write_bytes(whole[:-100])
    assert f"model: cannot open {model}: " in refused(tmp_path / "out", **{**short, "model": model})
    query = "model.layers.0.self_attn.q_proj.weight"
    without = {name: tensor for name, tensor in tensors.items() if name != query}
    save_file(without, model / "model.safetensors", metadata={"format": "pt"})
    assert f"has no weights for {query}" in refused(tmp_path / "out", **{**short, "model": model})
    tensors[query][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert f"has NaN or Inf in {query}" in refused(tmp_path / "out", **{**short, "model": model})


def test_a_tokenizer_of_another_model(
    short: dict[str, Any], tmp_path: Path, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    folder = tmp_path / "model"
    make_llama(len(tokenizer) // 2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    message = refused(tmp_path / "out", **{**short, "model": folder})
    assert f"the model has embeddings for {len(tokenizer) // 2}" in message


def test_an_answer_longer_than_the_context(short: dict[str, Any], tmp_path: Path) -> None:
    message = refused(tmp_path / "out", **{**short, "max_length": 3})
    assert message.startswith("max_length: got 3, wanted ")
    assert "max_length: got 129, the model has positions for 128" in refused(
        tmp_path / "out", **{**short, "max_length": 129}
    )


def test_a_prompt_longer_than_the_context_is_cut(short: dict[str, Any], toy_tasks: list[Task], tmp_path: Path) -> None:
    settings = {**short, "max_length": 9}
    result = train(TrainConfig(**settings, output=tmp_path / "out"), quiet=True)
    assert result.complete
    (note,) = [note for note in result.notes if note.startswith("colours: ")]
    assert "prompts are longer than max_length 9 leaves room for, and lose their middle" in note
    assert note in estimate(TrainConfig(**settings, output=tmp_path / "other")).table()


def test_a_tokenizer_without_a_padding_token(
    short: dict[str, Any], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_model = prepare.open_model

    def without(*arguments: Any) -> Any:
        model, tokenizer = open_model(*arguments)
        tokenizer.pad_token = None
        return model, tokenizer

    straight = train(TrainConfig(**short, output=tmp_path / "with"), quiet=True)
    monkeypatch.setattr(prepare, "open_model", without)
    result = train(TrainConfig(**short, output=tmp_path / "without"), quiet=True)
    # The end-of-sequence token is padded with, and hidden by the mask.
    assert result.predictions == straight.predictions
    assert [task.losses for task in result.learned] == [task.losses for task in straight.learned]


def test_a_tokenizer_without_an_end(short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_model = prepare.open_model

    def without(*arguments: Any) -> Any:
        model, tokenizer = open_model(*arguments)
        tokenizer.eos_token = None
        return model, tokenizer

    monkeypatch.setattr(prepare, "open_model", without)
    assert "has no end-of-sequence token" in refused(tmp_path / "out", **short)


def test_a_chat_template_that_is_not_there(short: dict[str, Any], tmp_path: Path) -> None:
    assert "has no chat template" in refused(tmp_path / "out", **short, chat_template=True)


def test_a_model_without_known_targets(short: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    config = transformers.GPTNeoXConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    message = refused(tmp_path / "out", **{**short, "model": tmp_path / "model"})
    assert "no default targets for model type 'gpt_neox'" in message
    for nothing in ({"method": "plain"}, {"protect": None, "others": "freeze"}):
        plain = TrainConfig(**{**short, "model": tmp_path / "model"}, **nothing, output=tmp_path / "plain")
        shown = estimate(plain)
        assert (shown.matrices, shown.trained) == (0, shown.parameters)
        assert shown.memory is not None
    assert train(plain, quiet=True).complete


def test_frozen_targets(short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_model = prepare.open_model

    def frozen(*arguments: Any) -> Any:
        model, tokenizer = open_model(*arguments)
        return model.requires_grad_(False), tokenizer

    monkeypatch.setattr(prepare, "open_model", frozen)
    assert "frozen" in refused(tmp_path / "out", **short)


def test_targets_wrapped_by_lora(
    short: dict[str, Any], llama: torch.nn.Module, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    adapter = tmp_path / "adapter"
    wrapped = peft.get_peft_model(llama, peft.LoraConfig(target_modules=["q_proj"]))
    wrapped.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    assert "is an adapter (LoRA) beside a model" in refused(tmp_path / "out", **{**short, "model": adapter})
    monkeypatch.setattr(prepare, "open_model", lambda *arguments: (wrapped, tokenizer))
    assert "LoRA" in refused(tmp_path / "out", **short)

"""One clear error for every kind of wrong input, before any training, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sculpt_ops.continual import Task, TrainConfig, prepare, train

pytest.importorskip("transformers", reason="the trainer needs pip install sculpt-ops[train]")
import transformers


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


def test_an_unknown_task(short: dict[str, Any], tmp_path: Path) -> None:
    message = refused(tmp_path / "out", **{**short, "order": ["smells"]})
    assert message == "order: no task smells, there are colours, sounds"


def test_an_answer_longer_than_the_context(short: dict[str, Any], tmp_path: Path) -> None:
    message = refused(tmp_path / "out", **{**short, "max_length": 3})
    assert message.startswith("max_length: got 3, wanted ")
    assert "max_length: got 129, the model has positions for 128" in refused(
        tmp_path / "out", **{**short, "max_length": 129}
    )


def test_a_prompt_longer_than_the_context_is_cut(short: dict[str, Any], toy_tasks: list[Task], tmp_path: Path) -> None:
    assert train(TrainConfig(**{**short, "max_length": 9}, output=tmp_path / "out"), quiet=True).complete


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
    plain = TrainConfig(**{**short, "model": tmp_path / "model"}, protect=None, output=tmp_path / "plain")
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

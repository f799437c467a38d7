"""Greedy answers: the model's own, whatever the batch, and nothing left changed."""

from __future__ import annotations

import pytest
import torch

from sculpt_ops.continual import Task
from sculpt_ops.continual.encoding import EncodedTask, encode_task
from sculpt_ops.continual.evaluate import greedy_answers

transformers = pytest.importorskip("transformers", reason="the trainer needs pip install sculpt-ops[train]")


@pytest.fixture
def encoded(toy_tasks: list[Task], tokenizer: transformers.PreTrainedTokenizerFast) -> EncodedTask:
    return encode_task(toy_tasks[0], tokenizer, 64, seq2seq=False)


def by_hand(model: torch.nn.Module, ids: list[int], tokens: int, eos: int) -> list[int]:
    """One row, no padding, no cache."""
    new: list[int] = []
    while len(new) < tokens and eos not in new:
        new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


def test_batched_answers_are_those_of_single_rows(
    llama: transformers.LlamaForCausalLM, tokenizer: transformers.PreTrainedTokenizerFast, encoded: EncodedTask
) -> None:
    expected = []
    with torch.no_grad():
        for row in encoded.test:
            new = by_hand(llama.eval(), row.prompt, encoded.max_new_tokens, tokenizer.eos_token_id)
            expected.append(tokenizer.decode(new, skip_special_tokens=True).strip().split("\n")[0].strip())
    assert len(set(expected)) > 1
    seen: list[int] = []
    assert greedy_answers(llama, tokenizer, encoded, batch_size=5, advance=seen.append) == expected
    assert greedy_answers(llama, tokenizer, encoded, batch_size=1) == expected
    assert seen == [5, 3]


def test_a_checkpoints_own_sampling_settings_do_not_count(
    llama: transformers.LlamaForCausalLM, tokenizer: transformers.PreTrainedTokenizerFast, encoded: EncodedTask
) -> None:
    plain = greedy_answers(llama, tokenizer, encoded)
    own = transformers.GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=50.0, min_new_tokens=3)
    llama.generation_config = own
    assert greedy_answers(llama, tokenizer, encoded) == plain
    assert llama.generation_config is own


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(
    llama: transformers.LlamaForCausalLM,
    tokenizer: transformers.PreTrainedTokenizerFast,
    encoded: EncodedTask,
    training: bool,
) -> None:
    llama.train(training)
    llama.config.use_cache = False
    before = {name: weight.clone() for name, weight in llama.state_dict().items()}
    greedy_answers(llama, tokenizer, encoded)
    with pytest.raises(RuntimeError, match="stop"):
        greedy_answers(llama, tokenizer, encoded, advance=_stop)
    assert llama.training is training
    assert llama.config.use_cache is False
    assert all(torch.equal(weight, before[name]) for name, weight in llama.state_dict().items())


def _stop(items: int) -> None:
    raise RuntimeError("stop")


@pytest.mark.parametrize("text", [" green\n moo", "\n green\n\n moo", " green"])
def test_an_answer_is_the_first_line_with_text(
    text: str,
    llama: transformers.LlamaForCausalLM,
    tokenizer: transformers.PreTrainedTokenizerFast,
    encoded: EncodedTask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    script = iter(tokens)
    forward = llama.forward

    def scripted(*args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        output.logits[:] = 0.0
        output.logits[..., next(script)] = 1.0
        return output

    monkeypatch.setattr(llama, "forward", scripted)
    # One token more than needed: the end-of-sequence token ends the row before it.
    one = EncodedTask([], encoded.test[:1], max_new_tokens=len(tokens) + 1)
    assert greedy_answers(llama, tokenizer, one) == ["green"]

"""Options scored from a prompt that is computed once: the same figures as whole sequences by themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from sculpt_ops.continual import Example, Task
from sculpt_ops.continual.decoding import Opening, OptionTree, Prompts
from sculpt_ops.continual.encoding import Collator, EncodedTask, encode_task
from sculpt_ops.continual.evaluate import Answer, answer_task, greedy_answers

transformers = pytest.importorskip("transformers", reason="the trainer needs pip install sculpt-ops[train]")

VOCABULARY = 400
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(attention: str = "sdpa") -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(**SIZES)
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation=attention)


def mistral(window: int | None) -> transformers.PreTrainedModel:
    return transformers.MistralForCausalLM(transformers.MistralConfig(sliding_window=window, **SIZES))


def qwen2() -> transformers.PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes)
    )


def gpt2() -> transformers.PreTrainedModel:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4))


def t5() -> transformers.PreTrainedModel:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=2
    )
    return transformers.T5ForConditionalGeneration(config)


MODELS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "llama": llama,
    "llama, eager": lambda: llama("eager"),
    "mistral": lambda: mistral(None),
    "mistral, full window": lambda: mistral(8),
    "qwen2": qwen2,
    "gpt2": gpt2,
    "t5": t5,
}


def make(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    # At their usual scale new weights say nearly the same of every token, and no order of options could be wrong.
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(6)
    return model


@pytest.fixture(scope="module")
def task() -> Task:
    options = ["very negative", "negative", "very positive", "deep blue", "very negative indeed"]
    examples = [
        Example(f"which of these is it ?\n{'old ' * length}thing number {length}\nAnswer:", options[length % 5])
        for length in (9, 1, 4, 0, 2)
    ]
    return Task("kinds", examples, examples, options)


@pytest.fixture(scope="module")
def encode(
    task: Task, tokenizer: transformers.PreTrainedTokenizerFast
) -> Callable[[transformers.PreTrainedModel], EncodedTask]:
    return lambda model: encode_task(task, tokenizer, 64, bool(model.config.is_encoder_decoder))


@torch.no_grad()
def likelihood(model: transformers.PreTrainedModel, prompt: list[int], option: list[int]) -> float:
    """By the definition: the whole sequence by itself, no padding, no cache."""
    if model.config.is_encoder_decoder:
        logits = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([option])).logits[0]
    else:
        logits = model(input_ids=torch.tensor([prompt + option])).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(option)[:, None]).sum())


@torch.no_grad()
def written(model: transformers.PreTrainedModel, prompt: list[int], most: int, eos: int) -> list[int]:
    new: list[int] = []
    while len(new) < most and eos not in new:
        if model.config.is_encoder_decoder:
            inputs = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([[2, *new]])}
        else:
            inputs = {"input_ids": torch.tensor([prompt + new])}
        new.append(int(model(**inputs).logits[0, -1].argmax()))
    return [token for token in new if token != eos]


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_whole_sequences(
    name: str,
    encode: Callable[[transformers.PreTrainedModel], EncodedTask],
    tokenizer: transformers.PreTrainedTokenizerFast,
) -> None:
    model = make(name)
    encoded = encode(model)
    tree = OptionTree(encoded.options)
    collator = Collator(model, tokenizer)
    expected = torch.tensor(
        [[likelihood(model, row.prompt, option) for option in encoded.options] for row in encoded.test]
    )
    with torch.no_grad():
        opening = Opening(model, collator, encoded.test)
        # The opening is what all prompts begin with; a full window and an encoder cannot go on from it.
        assert (opening.tokens > 8) == (name not in ("mistral, full window", "t5"))
        prompts = Prompts(model, collator, encoded.test, opening)
        scores = tree.scores(prompts.option_logits(tree))
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
        # Nothing of the options is left in the cache.
        torch.testing.assert_close(tree.scores(prompts.option_logits(tree)), scores)
        new = prompts.greedy(range(len(encoded.test)), 6, tokenizer.eos_token_id)
    assert new == [written(model, row.prompt, 6, tokenizer.eos_token_id) for row in encoded.test]


@pytest.mark.parametrize("name", ["llama", "mistral, full window", "t5"])
def test_answers_do_not_depend_on_the_batch(
    name: str,
    task: Task,
    encode: Callable[[transformers.PreTrainedModel], EncodedTask],
    tokenizer: transformers.PreTrainedTokenizerFast,
) -> None:
    model = make(name)
    encoded = encode(model)
    answers = answer_task(model, tokenizer, task, encoded)
    assert answers == answer_task(model, tokenizer, task, encoded, batch_size=2)
    assert [answer.text for answer in answers] == greedy_answers(model, tokenizer, encoded, batch_size=1)
    for answer, row in zip(answers, encoded.test, strict=True):
        scores = [likelihood(model, row.prompt, option) for option in encoded.options]
        assert task.options is not None
        assert answer.option == task.options[scores.index(max(scores))]
    plain = answer_task(model, tokenizer, task, encoded, options=False)
    assert plain == [replace(answer, option=None) for answer in answers]


def learn(model: transformers.PreTrainedModel, tokenizer: object, encoded: EncodedTask) -> None:
    batch = Collator(model, tokenizer)(encoded.train)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_model_that_answers_with_options_is_asked_no_further(
    task: Task,
    encode: Callable[[transformers.PreTrainedModel], EncodedTask],
    tokenizer: transformers.PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = llama()
    encoded = encode(model)
    learn(model, tokenizer, encoded)
    computed: list[int] = []
    forward = model.forward

    def counted(*args: object, **kwargs: object) -> object:
        computed.append(kwargs["input_ids"].numel())
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    answers = answer_task(model, tokenizer, task, encoded)
    assert answers == [Answer(example.answer, example.answer) for example in task.test]
    # The opening once, the rest of the prompts, the options: no token for the greedy answers.
    longest = max(len(row.prompt) for row in encoded.test)
    tree = OptionTree(encoded.options)
    assert len(computed) == 3
    assert computed[1] == len(task.test) * (longest - computed[0])
    assert computed[2] == len(task.test) * (len(tree.prefixes) - 1)
    # "very negative", "very positive" and "very negative indeed" share what they begin with.
    assert len(tree.prefixes) - 1 < sum(len(option) - 1 for option in encoded.options)


def test_options_that_begin_another_are_told_apart_by_their_end() -> None:
    tree = OptionTree([[5, 1], [5, 6, 1], [7, 1]])
    logits = torch.full((1, len(tree.prefixes), 10), -20.0)
    logits[0, tree.prefixes[()], 5] = 0.0
    logits[0, tree.prefixes[5,], 6] = 0.0
    logits[0, tree.prefixes[5, 6], 1] = 0.0
    assert tree.scores(logits).argmax(-1).tolist() == [1]
    assert tree.follow(logits[0].argmax(-1).tolist(), eos=1) == [5, 6]
    logits[0, tree.prefixes[5,], 1] = 5.0
    assert tree.scores(logits).argmax(-1).tolist() == [0]
    assert tree.follow(logits[0].argmax(-1).tolist(), eos=1) == [5]
    logits[0, tree.prefixes[()], 8] = 5.0
    assert tree.follow(logits[0].argmax(-1).tolist(), eos=1) is None


def test_a_generation_task_gets_whole_texts_and_scores(
    task: Task, tokenizer: transformers.PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = [replace(example, answer=f"first\n{example.answer}") for example in task.test]
    told = Task("told", examples, examples, metric="choice")
    torch.manual_seed(0)
    model = llama()
    encoded = encode_task(told, tokenizer, 64, seq2seq=False)
    learn(model, tokenizer, encoded)
    answers = answer_task(model, tokenizer, told, encoded)
    assert answers == [Answer(example.answer, None, 1.0) for example in examples]

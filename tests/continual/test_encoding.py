"""What the model is trained on: the answer, all of it, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch

from sculpt_ops.continual import Example, Task
from sculpt_ops.continual.encoding import IGNORED, Collator, Encoded, encode_task

transformers = pytest.importorskip("transformers", reason="the trainer needs pip install sculpt-ops[train]")

ROWS = [Encoded([5, 6, 7, 8, 9], [10, 11, 1]), Encoded([5, 6], [12, 1]), Encoded([7], [13, 14, 15, 1])]


class FullLabels(transformers.LlamaForCausalLM):
    """A model whose forward knows no logits_to_keep, as older architectures."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None):  # type: ignore[no-untyped-def]
        return super().forward(input_ids, attention_mask, position_ids, labels=labels)


def tiny(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {**sizes, "num_key_value_heads": 2}),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {**sizes, "num_key_value_heads": 2}),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {**sizes, "num_key_value_heads": 2}),
        "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel, {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    }
    config, model, settings = kinds[name]
    return model(config(vocab_size=40, max_position_embeddings=32, bos_token_id=0, eos_token_id=1, **settings)).eval()


def answers(labels: torch.Tensor) -> list[list[int]]:
    return [row[row != IGNORED].tolist() for row in labels]


def test_the_labels_are_the_answers_and_stand_at_the_end(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    batch = Collator(tiny("llama"), tokenizer)(ROWS)
    assert answers(batch["labels"]) == [row.answer for row in ROWS]
    assert (batch["labels"][:, -1] == tokenizer.eos_token_id).all()
    assert batch["labels"].shape == (3, batch["logits_to_keep"]) == (3, 5)
    for row, ids, mask, positions in zip(
        ROWS, batch["input_ids"], batch["attention_mask"], batch["position_ids"], strict=True
    ):
        assert ids[mask.bool()].tolist() == row.prompt + row.answer
        assert positions[mask.bool()].tolist() == list(range(len(row.prompt) + len(row.answer)))
        assert mask.tolist() == sorted(mask.tolist())


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gpt2"])
def test_the_sliced_loss_is_the_loss_over_the_full_sequence(
    name: str, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    model = tiny(name)
    batch = Collator(model, tokenizer)(ROWS)
    sliced = model(**batch)
    assert sliced.logits.shape[1] == batch["logits_to_keep"] < batch["input_ids"].shape[1]
    # Row by row, unpadded, by the definition: the mean over answer tokens of -log p(token | all before it).
    total = torch.zeros(())
    for row in ROWS:
        logits = model(input_ids=torch.tensor([row.prompt + row.answer])).logits[0]
        predicted = logits[len(row.prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(predicted, torch.tensor(row.answer), reduction="sum")
    torch.testing.assert_close(sliced.loss, total / sum(len(row.answer) for row in ROWS), rtol=1e-5, atol=1e-6)


def test_a_model_that_cannot_slice_gets_full_labels(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    sliced = tiny("llama")
    full = FullLabels(sliced.config).eval()
    full.load_state_dict(sliced.state_dict())
    batch = Collator(full, tokenizer)(ROWS)
    assert "logits_to_keep" not in batch
    assert batch["labels"].shape == batch["input_ids"].shape
    assert answers(batch["labels"]) == [row.answer for row in ROWS]
    torch.testing.assert_close(full(**batch).loss, sliced(**Collator(sliced, tokenizer)(ROWS)).loss)


def test_t5_reads_the_prompt_and_writes_the_answer(
    t5_folder: str, tokenizer: transformers.PreTrainedTokenizerFast, toy_tasks: list[Task]
) -> None:
    model = transformers.T5ForConditionalGeneration.from_pretrained(t5_folder).eval()
    task = encode_task(toy_tasks[0], tokenizer, 64, seq2seq=True)
    batch = Collator(model, tokenizer)(task.train[:4])
    assert answers(batch["labels"]) == [row.answer for row in task.train[:4]]
    decoded = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert decoded == [example.prompt for example in toy_tasks[0].train[:4]]
    assert (batch["labels"][:, 0] != IGNORED).all()
    single = [model(**Collator(model, tokenizer)([row])).loss * len(row.answer) for row in task.train[:4]]
    tokens = sum(len(row.answer) for row in task.train[:4])
    torch.testing.assert_close(model(**batch).loss, sum(single) / tokens, rtol=1e-5, atol=1e-6)


def task_of(rows: Sequence[tuple[str, str]]) -> Task:
    examples = [Example(prompt, answer) for prompt, answer in rows]
    return Task("t", examples, examples)


def test_prompt_and_answer_are_tokenized_as_the_text_they_make(
    tokenizer: transformers.PreTrainedTokenizerFast, toy_tasks: list[Task]
) -> None:
    for example, row in zip(
        toy_tasks[0].train, encode_task(toy_tasks[0], tokenizer, 64, seq2seq=False).train, strict=True
    ):
        assert row.prompt == tokenizer(example.prompt)["input_ids"]
        text = tokenizer(f"{example.prompt} {example.answer}")["input_ids"]
        assert row.prompt + row.answer == [*text, tokenizer.eos_token_id]


def test_a_long_prompt_loses_its_middle_and_the_answer_survives(
    tokenizer: transformers.PreTrainedTokenizerFast,
) -> None:
    long = f"what colour has the {'old ' * 100}sky ?\nAnswer:"
    task = encode_task(
        task_of([(long, "deep blue"), ("what colour has grass ?\nAnswer:", "green")]), tokenizer, 32, False
    )
    whole, (cut, short) = tokenizer(long)["input_ids"], task.train
    assert len(cut.prompt) == 32 - max(len(cut.answer), len(short.answer))
    head = (len(cut.prompt) + 1) // 2
    assert cut.prompt == whole[:head] + whole[len(whole) - (len(cut.prompt) - head) :]
    assert tokenizer.decode(cut.answer, skip_special_tokens=True) == " deep blue"
    assert short.prompt == tokenizer("what colour has grass ?\nAnswer:")["input_ids"]


def test_the_cut_does_not_depend_on_the_rows_own_answer(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    long = f"what colour has the {'old ' * 100}sky ?\nAnswer:"
    task = encode_task(task_of([(long, "deep blue"), (long, "green")]), tokenizer, 32, seq2seq=False)
    assert task.train[0].prompt == task.train[1].prompt
    assert task.max_new_tokens == max(len(row.answer) for row in task.train) + 1


def test_an_answer_too_long_for_max_length_is_refused(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"max_length: got 4, wanted \d+ or more for task t"):
        encode_task(task_of([("a", "deep blue green white black")]), tokenizer, 4, seq2seq=False)


CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# As that of LLaMA-2-chat.
BRACKETS = (
    "{% for message in messages %}{% if message.role == 'user' %}<s>[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }} </s>{% endif %}{% endfor %}"
)


@pytest.fixture
def chatting(tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.PreTrainedTokenizerFast:
    return copy.deepcopy(tokenizer)


@pytest.mark.parametrize(
    ("template", "cue", "answer"),
    [(CHATML, "<|user|>\n{}</s>\n<|assistant|>\n", "green"), (BRACKETS, "<s>[INST] {} [/INST]", " green")],
)
def test_a_chat_template_goes_around_the_prompt_alone(
    chatting: transformers.PreTrainedTokenizerFast, template: str, cue: str, answer: str
) -> None:
    prompt = "what colour has grass ?\nAnswer:"
    task = Task("t", [Example(prompt, "green")], [Example(prompt, "green")], ["green", "deep blue"])
    with pytest.raises(ValueError, match=r"chat_template: got True, the tokenizer .* has no chat template"):
        encode_task(task, chatting, 128, seq2seq=False, chat_template=True)
    chatting.chat_template = template
    encoded = encode_task(task, chatting, 128, seq2seq=False, chat_template=True)
    (row,) = encoded.train
    # One beginning-of-sequence token at most: the template writes its own.
    assert chatting.decode(row.prompt) == cue.format(prompt)
    assert chatting.decode(row.answer) == f"{answer}</s>"
    assert [chatting.decode(option) for option in encoded.options] == [
        f"{answer}</s>",
        f"{answer.replace('green', 'deep blue')}</s>",
    ]


def test_a_template_that_hides_the_answer_is_refused(chatting: transformers.PreTrainedTokenizerFast) -> None:
    chatting.chat_template = "{{ messages[0].content }}{% if add_generation_prompt %} now:{% endif %}"
    with pytest.raises(ValueError, match="the answer does not follow the cue"):
        encode_task(task_of([("a", "b")]), chatting, 128, seq2seq=False, chat_template=True)


def test_options_are_tokenized_as_answers(
    tokenizer: transformers.PreTrainedTokenizerFast, toy_tasks: list[Task]
) -> None:
    for seq2seq in (False, True):
        encoded = encode_task(toy_tasks[0], tokenizer, 64, seq2seq)
        options = dict(zip(toy_tasks[0].options or (), encoded.options, strict=True))
        assert options == {
            example.answer: row.answer for example, row in zip(toy_tasks[0].train, encoded.train, strict=True)
        }

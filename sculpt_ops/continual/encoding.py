"""Examples to token ids, and token ids to batches whose loss is taken on the answer alone."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .tasks import Example, Task, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .config import TrainConfig

IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt, already cut to length, and of its answer with the end-of-sequence token."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class EncodedTask:
    """max_new_tokens: one more than the longest answer, so that a right answer always ends by itself. options: token
    ids of the answers to choose from, each with the end-of-sequence token. multiline: whether an answer may have
    several lines. cut: prompts that were too long and lost their middle."""

    train: list[Encoded]
    test: list[Encoded]
    max_new_tokens: int
    options: list[list[int]] = field(default_factory=list)
    multiline: bool = False
    cut: int = 0


def encode_tasks(
    tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, config: TrainConfig
) -> tuple[list[EncodedTask], list[str]]:
    """Every task as `encode_task` gives it, and what a reader of the figures has to know: how many prompts are cut.

    ValueError for a tokenizer that has more tokens than the model.
    """
    seq2seq = bool(model.config.is_encoder_decoder)
    encoded = [encode_task(task, tokenizer, config.max_length, seq2seq, config.chat_template) for task in tasks]
    rows = [row for task in encoded for row in (*task.train, *task.test)]
    largest = max((max(row.prompt + row.answer) for row in rows), default=0)
    known = model.get_input_embeddings().num_embeddings
    if largest >= known:
        raise ValueError(f"model: its tokenizer gives token {largest}, the model has embeddings for {known}")
    notes = [
        f"{task.name}: {part.cut} of {len(part.train) + len(part.test)} prompts are longer than max_length "
        f"{config.max_length} leaves room for, and lose their middle"
        for task, part in zip(tasks, encoded, strict=True)
        if part.cut
    ]
    return encoded, notes


def encode_task(
    task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int, seq2seq: bool, chat_template: bool = False
) -> EncodedTask:
    """Tokenize a task's rows.

    A decoder-only model's prompt may take what the task's longest answer leaves of `max_length`, the same for every
    row: a limit that went by the row's own answer would tell its length. An encoder's may take all of it. A longer
    prompt loses its middle: the question stands at the start, the cue to answer at the end. ValueError if there is room
    for less than 2 tokens.

    chat_template: put every prompt into the tokenizer's chat template, as a user's turn that the answer follows;
    ValueError if it has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model: the tokenizer {type(tokenizer).__name__} has no end-of-sequence token")
    # The options after one prompt: the token in front of them, the cue's last, is the same for every row of a task.
    asked = [Example(task.test[0].prompt, option) for option in task.options or ()]
    chat = ChatTemplate(tokenizer) if chat_template else None
    pairs = [_tokenize(part, tokenizer, seq2seq, chat) for part in (task.train, task.test, asked)]
    longest = max(len(pair.answer) for part in pairs for pair in part)
    room = max_length - (0 if seq2seq else longest)
    if room < 2:
        least = max_length - room + 2
        raise ValueError(f"max_length: got {max_length}, wanted {least} or more for task {task.name}, with its answers")
    cut = sum(len(pair.prompt) > room for part in pairs[:2] for pair in part)
    train, test = ([Encoded(_cut_middle(pair.prompt, room), pair.answer) for pair in part] for part in pairs[:2])
    return EncodedTask(train, test, longest + 1, [pair.answer for pair in pairs[2]], task.metric != "exact", cut)


def encode_text(path: Path, tokenizer: PreTrainedTokenizerBase, length: int, windows: int) -> list[Encoded]:
    """As many windows of `length` tokens of a text file, spread evenly, each as a row.

    ValueError if there is no such file, or it has less than two tokens.
    """
    if not path.is_file():
        raise ValueError(f"remember_text: there is no file {path}")
    ids = tokenizer(read_text(path), verbose=False)["input_ids"]
    if len(ids) < 2:
        raise ValueError(f"remember_text: {path} has {len(ids)} tokens, wanted 2 or more")
    length = min(length, len(ids))
    last, windows = len(ids) - length, min(windows, -(-len(ids) // length))
    starts = [last * index // max(windows - 1, 1) for index in range(windows)]
    return [as_row(ids[start : start + length]) for start in starts]


def as_row(ids: list[int]) -> Encoded:
    """A text as a row of a task: its last eighth stands as the answer."""
    asked = len(ids) - max(1, len(ids) // 8)
    return Encoded(ids[:asked], ids[asked:])


class ChatTemplate:
    """A tokenizer's chat template, as far as one question and its answer need it.

    gap: what the template puts between its cue to answer and the answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise ValueError(f"chat_template: got True, the tokenizer {type(tokenizer).__name__} has no chat template")
        self.tokenizer = tokenizer
        answer = "answer"
        asked, told = self.render("question"), self._apply([("user", "question"), ("assistant", answer)])
        if not told.startswith(asked) or answer not in told[len(asked) :]:
            raise ValueError("chat_template: got True, in the tokenizer's the answer does not follow the cue to answer")
        self.gap = told[len(asked) :].split(answer)[0]

    def render(self, prompt: str) -> str:
        """The text up to where the answer begins, special tokens written out."""
        return self._apply([("user", prompt)], add_generation_prompt=True)

    def _apply(self, turns: Sequence[tuple[str, str]], **options: bool) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))


def _tokenize(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, seq2seq: bool, chat: ChatTemplate | None
) -> list[Encoded]:
    if not examples:
        return []
    prompts = [example.prompt.rstrip() for example in examples]
    answers = [example.answer for example in examples]
    eos = tokenizer.eos_token_id
    gap = " "
    options = {"verbose": False}
    if chat is not None:
        prompts, gap = [chat.render(prompt) for prompt in prompts], chat.gap
        options["add_special_tokens"] = False  # The template has written them.
    if seq2seq:
        targets = tokenizer(text_target=answers, verbose=False)["input_ids"]
        inputs = tokenizer(prompts, **options)["input_ids"]
        return [Encoded(ids, [*_strip(target, eos), eos]) for ids, target in zip(inputs, targets, strict=True)]
    prompt_ids = [_strip(ids, eos) for ids in tokenizer(prompts, **options)["input_ids"]]
    texts = [f"{prompt}{gap}{answer}" for prompt, answer in zip(prompts, answers, strict=True)]
    text_ids = [_strip(ids, eos) for ids in tokenizer(texts, **options)["input_ids"]]
    alone = tokenizer([f"{gap}{answer}" for answer in answers], add_special_tokens=False, verbose=False)["input_ids"]
    # The answer in its sentence is tokenized as in pre-training; a merge over the boundary leaves no such answer, since
    # generation starts from the prompt's own tokens.
    return [
        Encoded(prompt, (text[len(prompt) :] if text[: len(prompt)] == prompt else answer) + [eos])
        for prompt, text, answer in zip(prompt_ids, text_ids, alone, strict=True)
    ]


def _strip(ids: list[int], eos: int) -> list[int]:
    """Without the end-of-sequence token that some tokenizers add by themselves."""
    return ids[:-1] if ids and ids[-1] == eos else ids


def _cut_middle(ids: list[int], room: int) -> list[int]:
    return ids if len(ids) <= room else ids[: room - room // 2] + ids[len(ids) - room // 2 :]


def pad(rows: Sequence[Sequence[int]], value: int, side: str) -> torch.Tensor:
    """Rows of different length as one int64 tensor, filled up with `value` on `side`, "left" or "right"."""
    width = max(len(row) for row in rows)
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([f + list(r) if side == "left" else list(r) + f for f, r in zip(fill, rows, strict=True)])


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token, or the end-of-sequence token where there is none (the attention mask hides either)."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


class Collator:
    """Encoded rows to a batch for `model`.

    Decoder-only: prompt and answer padded on the left, so that all answers end in the last column; `labels` cover the
    last K + 1 columns, K the longest answer, and `logits_to_keep` says so to the model, whose output layer then runs
    there alone (vocabularies are wide: at 512 tokens a row it is most of SmolLM2-135M's work). Models without that
    argument get labels of full length. Encoder-decoder: prompt padded on the right, answer as labels.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        # Of the class: autocast wraps the instance's forward and hides its arguments.
        arguments = inspect.signature(type(model).forward).parameters
        self.seq2seq = bool(model.config.is_encoder_decoder)
        self.sliced = "logits_to_keep" in arguments
        self.positions = "position_ids" in arguments
        self.pad = pad_token(tokenizer)

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Any]:
        if self.seq2seq:
            batch = self.prompts(rows)
            batch["labels"] = pad([row.answer for row in rows], IGNORED, "right")
            return batch
        batch = self._left_padded([row.prompt + row.answer for row in rows])
        labels = pad([[IGNORED] * len(row.prompt) + row.answer for row in rows], IGNORED, "left")
        if self.sliced:
            # One column more than the answers: the last prompt token is what the first answer token is predicted from.
            keep = min(labels.shape[1], 1 + max(len(row.answer) for row in rows))
            return {**batch, "labels": labels[:, -keep:].contiguous(), "logits_to_keep": keep}
        return {**batch, "labels": labels}

    def prompts(self, rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """The batch to generate answers from."""
        if not self.seq2seq:
            return self._left_padded([row.prompt for row in rows])
        mask = pad([[1] * len(row.prompt) for row in rows], 0, "right")
        return {"input_ids": pad([row.prompt for row in rows], self.pad, "right"), "attention_mask": mask}

    def _left_padded(self, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        mask = pad([[1] * len(row) for row in rows], 0, "left")
        batch = {"input_ids": pad(rows, self.pad, "left"), "attention_mask": mask}
        if self.positions:
            batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        return batch

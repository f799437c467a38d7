"""Real text as blocks of token ids, the same ones in the same order for every method."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sculpt_ops.continual import Example, read_task
from sculpt_ops.continual.encoding import encode_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Batches(NamedTuple):
    """One (rows, length) tensor of token ids a step, and those that the loss is compared on."""

    train: list[Tensor]
    held_out: list[Tensor]


def load_batches(
    task: Path, tokenizer: PreTrainedTokenizerBase, *, steps: int, held_out: int, rows: int, length: int
) -> Batches:
    """Blocks of a task's prompts and answers, one text after the other, in an order drawn from seed 0.

    Every token is trained on, so that a step is rows * length tokens for every method. ValueError if the texts end
    before the steps do.
    """
    texts = read_task(task)

    def blocks(examples: Sequence[Example], count: int) -> list[Tensor]:
        wanted = count * rows * length
        shuffled = list(examples)
        random.Random(0).shuffle(shuffled)
        # Four tokens a text are fewer than any prompt has.
        chosen = replace(texts, train=shuffled[: wanted // 4 + 1], test=shuffled[:1])
        pairs = encode_task(chosen, tokenizer, max_length=length, seq2seq=False).train
        ids = [token for pair in pairs for token in pair.prompt + pair.answer][:wanted]
        if len(ids) < wanted:
            raise ValueError(f"task: {texts.name} has {len(ids)} tokens, wanted {wanted} for {count} steps")
        return list(torch.tensor(ids).view(count, rows, length))

    return Batches(blocks(texts.train, steps), blocks(texts.test, held_out))

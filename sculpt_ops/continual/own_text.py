"""Text that a model writes itself: what it can do already, where there is no text of it to remember."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

from .config import GENERATED
from .encoding import Encoded, as_row
from .evaluate import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["check_generates", "generate_rows"]

# Continued at a time.
BATCH_ROWS = 8


def check_generates(model: PreTrainedModel, sharded: bool) -> None:
    """ValueError for a model that goes on with no text of its own, or whose weights no process has all of."""
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"remember_text: got {GENERATED!r} with the encoder-decoder {type(model).__name__}, wanted a text file"
        )
    if sharded:
        raise ValueError(f"remember_text: got {GENERATED!r} with FSDP, wanted a text file, or parallel ddp")


def generate_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int, length: int, seed: int, bf16: bool
) -> list[Encoded]:
    """So many rows of `length` tokens: a token drawn from the vocabulary, and what the model goes on with, drawn from
    its own distribution. After LLM-QAT (Liu et al. 2023, arXiv 2305.17888), which trains on such text for want of data.

    The same for the same seed; leaves the random numbers of others as they were.
    """
    known = model.get_input_embeddings().num_embeddings
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    words = sorted(token for token in tokenizer.get_vocab().values() if token < known and token not in special)
    chosen = random.Random(seed).choices(words, k=rows)
    begin = [tokenizer.bos_token_id] if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else []
    first = torch.tensor([[*begin, token] for token in chosen], device=model.device)
    new = max(1, length - first.shape[1])
    devices = [model.device] if model.device.type == "cuda" else []
    found: list[list[int]] = []
    with (
        torch.random.fork_rng(devices),
        evaluating(model),
        torch.autocast(model.device.type, torch.bfloat16, bf16),
    ):
        torch.manual_seed(seed)
        for part in first.split(BATCH_ROWS):
            out = model.generate(
                part,
                attention_mask=torch.ones_like(part),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=new,
                max_new_tokens=new,
                pad_token_id=tokenizer.eos_token_id,
            )
            found += out.tolist()
    return [as_row(ids) for ids in found]

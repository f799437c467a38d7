"""Greedy answers, compared whole with the expected ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from .distributed import World
from .encoding import Collator, EncodedTask, pad_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: EncodedTask,
    *,
    batch_size: int = 16,
    bf16: bool = False,
    advance: Callable[[int], None] = lambda items: None,
    world: World | None = None,
) -> list[str]:
    """What the model answers to each test prompt of `task`, in order: its first line with text, stripped.

    Deterministic; a row ends at the end-of-sequence token or after task.max_new_tokens. The model's training mode,
    generation settings and use_cache are as before afterwards. advance: called with the number of items done.
    world: processes that share the batches out; each gets all answers, the same as one process would.
    """
    world = world or World(model.device)
    collator = Collator(model, tokenizer)
    # Rows of similar length share a batch: less padding to compute.
    order = sorted(range(len(task.test)), key=lambda index: len(task.test[index].prompt))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    answers: dict[int, str] = {}
    with _generating(model, tokenizer, task.max_new_tokens), torch.autocast(model.device.type, torch.bfloat16, bf16):
        for start in range(0, len(batches), world.size):
            # Sharded weights are gathered in every forward pass: a rank that is left without a batch repeats the last.
            indices = batches[min(start + world.rank, len(batches) - 1)]
            batch = collator.prompts([task.test[index] for index in indices])
            # generate() works the positions out from the mask itself, for every new token.
            inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            output = model.generate(**inputs, synced_gpus=world.sharded)
            new = output if collator.seq2seq else output[:, inputs["input_ids"].shape[1] :]
            for index, text in zip(indices, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                # Untrained models like to begin on a new line, which is not to count against them.
                answers[index] = text.strip().split("\n")[0].strip()
            advance(sum(map(len, batches[start : start + world.size])))
    for shared in world.share("evaluation", answers):
        answers |= shared
    return [answers[index] for index in range(len(order))]


@contextmanager
def _generating(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Iterator[None]:
    """The model in evaluation mode with plain greedy settings: checkpoints bring sampling and penalties along."""
    from transformers import GenerationConfig

    own = model.generation_config
    training, use_cache = model.training, model.config.use_cache
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad_token(tokenizer),
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
        use_cache=True,
    )
    model.config.use_cache = True
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.config.use_cache = use_cache
        model.train(training)

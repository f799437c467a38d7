"""Answers to a task's items: greedy, compared whole with the expected ones, and the likeliest of the options."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ..dtensor import is_fsdp
from .decoding import Opening, OptionTree, Prompts
from .distributed import World
from .encoding import Collator, EncodedTask
from .score import score
from .tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Answer", "answer_task", "greedy_answers"]


@dataclass(frozen=True)
class Answer:
    """What a model answers to one item.

    text: the greedy answer. option: the option whose tokens, the end-of-sequence token with them, have the largest
    summed log-probability; None where they were not asked for. score: by the task's metric, None for exact match.
    """

    text: str
    option: str | None = None
    score: float | None = None


def answer_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    encoded: EncodedTask,
    *,
    batch_size: int = 16,
    bf16: bool = False,
    advance: Callable[[int], None] = lambda items: None,
    world: World | None = None,
    options: bool = True,
) -> list[Answer]:
    """Answers to the test items of `task`, in order; `encoded` is the same task in tokens.

    options: score the task's options as well, where it has any, and read greedy answers that are options from the same
    pass. The other arguments and what is left as it was are those of `greedy_answers`.
    """
    found = _answers(model, tokenizer, encoded, batch_size, bf16, advance, world, options and bool(task.options))
    return [
        Answer(
            text,
            None if option is None or task.options is None else task.options[option],
            None if task.metric == "exact" else score(task.metric, example.prompt, text, example.answer),
        )
        for (text, option), example in zip(found, task.test, strict=True)
    ]


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
    """What the model answers to each test prompt of `task`, in order: its first line with text, stripped; all of it
    where task.multiline.

    Deterministic; a row ends at the end-of-sequence token or after task.max_new_tokens. The model's training mode
    and use_cache are as before afterwards. advance: called with the number of items done. world: processes that share
    the batches out; each gets all answers, the same as one process would.
    """
    return [text for text, _ in _answers(model, tokenizer, task, batch_size, bf16, advance, world, options=False)]


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: EncodedTask,
    batch_size: int,
    bf16: bool,
    advance: Callable[[int], None],
    world: World | None,
    options: bool,
) -> list[tuple[str, int | None]]:
    world = world or World(model.device)
    collator = Collator(model, tokenizer)
    tree = OptionTree(task.options) if options else None
    # Rows of similar length share a batch: less padding to compute.
    order = sorted(range(len(task.test)), key=lambda index: len(task.test[index].prompt))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    answers: dict[int, tuple[str, int | None]] = {}
    with evaluating(model), torch.autocast(model.device.type, torch.bfloat16, bf16):
        opening = Opening(model, collator, task.test)
        for start in range(0, len(batches), world.size):
            # Sharded weights are gathered in every forward pass: a rank that is left without a batch repeats the last.
            indices = batches[min(start + world.rank, len(batches) - 1)]
            prompts = Prompts(model, collator, [task.test[index] for index in indices], opening)
            answers |= zip(indices, _batch(prompts, tokenizer, task, tree, world), strict=True)
            advance(sum(map(len, batches[start : start + world.size])))
    for shared in world.share("evaluation", answers):
        answers |= shared
    return [answers[index] for index in range(len(order))]


def _batch(
    prompts: Prompts, tokenizer: PreTrainedTokenizerBase, task: EncodedTask, tree: OptionTree | None, world: World
) -> list[tuple[str, int | None]]:
    """Text and option of every row."""
    eos = int(tokenizer.eos_token_id)
    rows = len(prompts.mask)
    tokens: list[list[int] | None] = [None] * rows
    chosen: list[int | None] = [None] * rows
    if tree is not None:
        logits = prompts.option_logits(tree)
        chosen = tree.scores(logits).argmax(-1).tolist()
        tokens = [tree.follow(best, eos) for best in logits.argmax(-1).tolist()]
        del logits
    left = [row for row, answer in enumerate(tokens) if answer is None]

    def over(answer: list[int]) -> bool:
        # What comes after the first line with text does not count: nothing more to write.
        return not task.multiline and "\n" in tokenizer.decode(answer, skip_special_tokens=True).lstrip()

    def anyone(going_on: bool) -> bool:
        if not world.sharded:
            return going_on
        flag = torch.tensor(int(going_on), device=world.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    for row, answer in zip(left, prompts.greedy(left, task.max_new_tokens, eos, over, anyone), strict=True):
        tokens[row] = answer
    texts = [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    if not task.multiline:
        # Untrained models like to begin on a new line, which is not to count against them.
        texts = [text.split("\n")[0].strip() for text in texts]
    return list(zip(texts, chosen, strict=True))


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    training, use_cache = model.training, model.config.use_cache
    # Gradient checkpointing turns the cache off where the model trains.
    model.config.use_cache = True
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        # A sharded root stays gathered after a forward pass, for the backward pass that does not come here: an
        # optimizer made next would be given its gathered weights.
        if is_fsdp(model):
            model.reshard()
        model.config.use_cache = use_cache
        model.train(training)

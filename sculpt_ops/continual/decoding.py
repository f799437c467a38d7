"""A batch of prompts in a model's cache: each is computed once, whatever is then asked of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch

from .encoding import Collator, Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Opening", "OptionTree", "Prompts"]

# Below, a forward pass of its own costs more than it saves.
SHORTEST_OPENING = 8


class OptionTree:
    """The answers to choose from, as a tree of tokens: what they begin with in common is there once.

    options: token ids, the end-of-sequence token last in each. prefixes: every beginning of one that is shorter than
    it, numbered; the first is the empty one, the prompt's end.
    """

    def __init__(self, options: Sequence[Sequence[int]]) -> None:
        self.options = [tuple(option) for option in options]
        self.prefixes: dict[tuple[int, ...], int] = {(): 0}
        for option in self.options:
            for length in range(1, len(option)):
                self.prefixes.setdefault(option[:length], len(self.prefixes))

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Summed log-probability of every option, (rows, options), from logits (rows, prefixes, vocabulary)."""
        steps = [
            (number, self.prefixes[option[:length]], token)
            for number, option in enumerate(self.options)
            for length, token in enumerate(option)
        ]
        option, prefix, token = torch.tensor(steps, device=logits.device).T
        normaliser = torch.stack([row.float().logsumexp(-1) for row in logits])
        likelihood = logits[:, prefix, token].float() - normaliser[:, prefix]
        return likelihood.new_zeros(len(logits), len(self.options)).index_add_(1, option, likelihood)

    def follow(self, best: Sequence[int], eos: int) -> list[int] | None:
        """The greedy answer, from the best token after each prefix; None where it leaves the tree."""
        answer: tuple[int, ...] = ()
        while (token := best[self.prefixes[answer]]) != eos:
            answer = (*answer, token)
            if answer not in self.prefixes:
                return None
        return list(answer)


class Opening:
    """What all of a task's prompts begin with, read once: the question and its options are a third to a half of a short
    prompt. tokens: how many; 0 where the model cannot go on from it."""

    def __init__(self, model: PreTrainedModel, collator: Collator, rows: Sequence[Encoded]) -> None:
        # At least one token of every prompt is left: the first answer token is predicted from it.
        shortest = min(len(row.prompt) for row in rows)
        first, last = min(row.prompt for row in rows), max(row.prompt for row in rows)
        shared = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))]
        shared = shared[: shortest - 1]
        self.tokens, self.cache = 0, None
        if len(rows) < 2 or len(shared) < SHORTEST_OPENING or not _takes_own_masks(model, collator):
            return
        slice_ = {"logits_to_keep": 1} if collator.sliced else {}
        output = model(input_ids=torch.tensor([shared], device=model.device), use_cache=True, **slice_)
        cache = getattr(output, "past_key_values", None)
        # The window of a sliding one would count the padding that comes between the opening and the rest.
        if cache is not None and not any(cache.is_sliding):
            self.tokens, self.cache = len(shared), cache

    def repeated(self, rows: int) -> Any:
        """A cache of the opening for so many rows; None where there is no opening."""
        cache = copy.deepcopy(self.cache)
        if cache is not None:
            cache.batch_repeat_interleave(rows)
        return cache


class Prompts:
    """`rows` read by `model`; a decoder's cache then holds the prompts, an encoder-decoder's what is made of them.

    opening: of the task that the rows are of. first: logits (rows, vocabulary) of the first answer token.
    """

    def __init__(
        self, model: PreTrainedModel, collator: Collator, rows: Sequence[Encoded], opening: Opening | None = None
    ) -> None:
        self.model, self.collator = model, collator
        skip = opening.tokens if opening else 0
        batch = collator.prompts([Encoded(row.prompt[skip:], row.answer) for row in rows])
        inputs: dict[str, Any] = {name: ids.to(model.device) for name, ids in batch.items()}
        if opening is not None and skip:
            inputs["past_key_values"] = opening.repeated(len(rows))
            inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (skip, 0), value=1)
            inputs["position_ids"] += skip
        self.mask: torch.Tensor = inputs["attention_mask"]
        self.lengths = self.mask.sum(1)
        if collator.seq2seq:
            inputs["decoder_input_ids"] = self.mask.new_full((len(rows), 1), _decoder_start(model))
        elif collator.sliced:
            inputs["logits_to_keep"] = 1
        output = model(**inputs, use_cache=True)
        self.first: torch.Tensor = output.logits[:, -1]
        self.cache: Any = getattr(output, "past_key_values", None)
        if self.cache is None:
            raise ValueError(f"model: {type(model).__name__} returns no past_key_values to go on from")
        self.encoded = output.encoder_last_hidden_state if collator.seq2seq else None

    def option_logits(self, tree: OptionTree) -> torch.Tensor:
        """Logits (rows, prefixes, vocabulary) after every prefix of `tree`; leaves the cache as it was."""
        if len(tree.prefixes) == 1:
            return self.first[:, None]
        # A sliding window would be applied to the packed columns.
        packed = _takes_own_masks(self.model, self.collator) and not any(self.cache.is_sliding)
        after = self._packed(tree) if packed else self._one_by_one(tree)
        return torch.cat([self.first[:, None], after], 1)

    def _packed(self, tree: OptionTree) -> torch.Tensor:
        """All prefixes in one forward pass, as further columns that see the prompt and their own beginning."""
        prefixes = [prefix for prefix in tree.prefixes if prefix]
        device, rows = self.mask.device, len(self.mask)
        sees = torch.tensor([[a[: len(b)] == b for b in prefixes] for a in prefixes], device=device)
        visible = torch.cat(
            [self.mask.bool()[:, None].expand(-1, len(prefixes), -1), sees.expand(rows, -1, -1)], -1
        ).unsqueeze(1)
        # Eager attention adds its mask; the other would have to be of the dtype that autocast computes in.
        if self.model.config._attn_implementation == "eager":
            visible = torch.where(visible, 0.0, torch.finfo(self.model.dtype).min).to(self.model.dtype)
        depth = torch.tensor([len(prefix) - 1 for prefix in prefixes], device=device)
        output = self.model(
            input_ids=torch.tensor([prefix[-1] for prefix in prefixes], device=device).expand(rows, -1),
            attention_mask=visible,
            position_ids=self.lengths[:, None] + depth,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache.crop(-len(prefixes))
        logits: torch.Tensor = output.logits
        return logits

    def _one_by_one(self, tree: OptionTree) -> torch.Tensor:
        found: dict[tuple[int, ...], torch.Tensor] = {}
        for option in sorted(tree.options, key=len, reverse=True):
            if option[:-1] in found or len(option) == 1:
                continue
            # Cropping a sliding window that is full would need what has already left it.
            before = (copy.deepcopy(self.cache) if any(self.cache.is_sliding) else None), self.mask, self.lengths
            tokens = torch.tensor(option[:-1], device=self.mask.device).expand(len(self.lengths), -1)
            logits = self.extend(tokens)
            kept, self.mask, self.lengths = before
            if kept is None:
                self.cache.crop(-tokens.shape[1])
            else:
                self.cache = kept
            found |= {option[: length + 1]: logits[:, length] for length in range(tokens.shape[1])}
        return torch.stack([found[prefix] for prefix in tree.prefixes if prefix], 1)

    def extend(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (rows, K, vocabulary) after each of `tokens` (rows, K), which join the cache."""
        if self.encoded is not None:
            from transformers.modeling_outputs import BaseModelOutput

            inputs = {
                "encoder_outputs": BaseModelOutput(last_hidden_state=self.encoded),
                "decoder_input_ids": tokens,
            }
        else:
            self.mask = torch.cat([self.mask, torch.ones_like(tokens)], 1)
            inputs = {"input_ids": tokens}
            if self.collator.positions:
                inputs["position_ids"] = self.lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
            self.lengths = self.lengths + tokens.shape[1]
        output = self.model(**inputs, attention_mask=self.mask, past_key_values=self.cache, use_cache=True)
        logits: torch.Tensor = output.logits
        return logits

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        if list(rows) == list(range(len(self.mask))):
            return
        index = torch.tensor(rows, device=self.mask.device)
        self.cache.batch_select_indices(index)
        self.mask, self.lengths, self.first = self.mask[index], self.lengths[index], self.first[index]
        if self.encoded is not None:
            self.encoded = self.encoded[index]

    def greedy(
        self,
        rows: Sequence[int],
        most: int,
        eos: int,
        over: Callable[[list[int]], bool] = lambda tokens: False,
        anyone: Callable[[bool], bool] = lambda going_on: going_on,
    ) -> list[list[int]]:
        """The greedy answers of `rows`, without the end-of-sequence token; nothing can be asked afterwards.

        most: tokens of an answer. over: whether an answer is complete as it is. anyone: whether any rank goes on, where
        a forward pass needs them all.
        """
        answers: list[list[int]] = [[] for _ in rows]
        going: list[int] = list(range(len(rows)))
        tokens: torch.Tensor | None = None
        for _ in range(most):
            # A rank that is done still takes part in the others' forward passes, with any row.
            if not anyone(bool(going)):
                break
            if tokens is None:
                self.select(rows or [0])
                tokens = self.first.argmax(-1)
            else:
                tokens = self.extend(tokens[:, None])[:, -1].argmax(-1)
            kept = []
            for place, (row, token) in enumerate(zip(list(going), tokens.tolist(), strict=False)):
                if token != eos:
                    answers[row].append(token)
                    if not over(answers[row]):
                        kept.append(place)
            going = [going[place] for place in kept]
            self.select(kept or [0])
            tokens = tokens[kept or [0]]
        return answers


def _takes_own_masks(model: PreTrainedModel, collator: Collator) -> bool:
    """Whether positions and visible columns can be given one by one: not with relative positions (T5), not with flash
    attention."""
    return collator.positions and getattr(model.config, "_attn_implementation", None) in ("sdpa", "eager")


def _decoder_start(model: PreTrainedModel) -> int:
    start = model.generation_config.decoder_start_token_id
    return int(model.config.decoder_start_token_id if start is None else start)

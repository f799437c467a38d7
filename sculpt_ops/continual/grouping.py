"""Training batches of rows of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from .encoding import Encoded

__all__ = ["GroupedByLength"]


class GroupedByLength(Sampler[int]):
    """Row numbers in an order in which neighbours are of similar length, and otherwise random: as
    `transformers.Trainer` groups, but the order of an epoch depends on seed and epoch alone, so that a resumed epoch
    goes on with the rows it had left.

    rows_per_step: rows of an optimizer step. In batches of 8 at 512 tokens a row, 1.02 to 1.12 times the tokens that
    there are are computed on the public benchmark, in random order 1.08 to 2.05 times; at 112 tokens 1.00 to 1.02 in
    place of 1.00 to 1.18.
    """

    def __init__(self, rows: Sequence[Encoded], rows_per_step: int, seed: int = 0) -> None:
        self.lengths = [len(row.prompt) + len(row.answer) for row in rows]
        self.rows_per_step, self.seed, self.epoch = rows_per_step, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        from transformers.trainer_pt_utils import get_length_grouped_indices

        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.rows_per_step, generator=generator))

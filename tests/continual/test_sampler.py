"""Batches of similar length: all rows, little padding, and the same order whenever the epoch is."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from sculpt_ops.continual.encoding import Collator, Encoded
from sculpt_ops.continual.sampler import LengthGrouped

transformers = pytest.importorskip("transformers", reason="the trainer needs pip install sculpt-ops[train]")

ROWS = [Encoded([5] * random.Random(number).randint(1, 40), [6, 1]) for number in range(203)]
LENGTHS = [len(row.prompt) + len(row.answer) for row in ROWS]


def padded(order: list[int], batch: int) -> int:
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    return sum(len(rows) * max(len(ROWS[row].prompt) for row in rows) for rows in batches)


def test_all_rows_once_and_little_padding() -> None:
    order = list(LengthGrouped(LENGTHS, 8, seed=0))
    assert sorted(order) == list(range(len(ROWS)))
    tokens = sum(len(row.prompt) for row in ROWS)
    assert padded(order, 8) < 1.2 * tokens
    assert padded(random.Random(0).sample(range(len(ROWS)), len(ROWS)), 8) > 1.5 * tokens


def test_the_order_is_that_of_seed_and_epoch() -> None:
    sampler = LengthGrouped(LENGTHS, 8, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first != second
    again = LengthGrouped(LENGTHS, 8, seed=3)
    again.set_epoch(1)
    assert list(again) == second
    assert list(LengthGrouped(LENGTHS, 8, seed=4)) != first


def test_trainer_sets_the_epoch(
    llama: transformers.LlamaForCausalLM, tokenizer: transformers.PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    seen: list[int] = []
    collate = Collator(llama, tokenizer)

    class Trainer(transformers.Trainer):
        def _get_train_sampler(self, train_dataset: object = None) -> LengthGrouped:
            return LengthGrouped(LENGTHS, 8, seed=0)

    def record(rows: list[Encoded]) -> dict[str, object]:
        seen.extend(len(row.prompt) for row in rows)
        return collate(rows)

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=2,
        per_device_train_batch_size=8,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    Trainer(model=llama, args=arguments, train_dataset=ROWS, data_collator=record).train()
    sampler = LengthGrouped(LENGTHS, 8, seed=0)
    expected = list(sampler)
    sampler.set_epoch(1)
    expected += list(sampler)
    assert seen == [len(ROWS[row].prompt) for row in expected]

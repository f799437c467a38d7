"""The tasks as folders of JSONL: rows drawn with a fixed seed, texts cut, held-out rows from the training rows."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from protocol import TEXT_TOKENS, Protocol
from sources import read_source
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sculpt_ops.continual.tasks import Example

PARTS = ("entry", "dev", "final")
TEXT_OF = "BoolQA/BoolQA"
MEASURED_PASSAGES, KNOWN_PASSAGES = 100, 150


def make_tasks(roots: Sequence[Path], model: Path, folder: Path, protocol: Protocol) -> None:
    """`folder`/entry, /dev and /final, a task folder in each per data set of `roots`; those that are there stay. A
    smaller protocol's rows are the first of a larger one's."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    for name, path in protocol.datasets.items():
        if all((folder / part / name / "options.json").exists() for part in PARTS):
            continue
        task = read_source(roots, path)
        shuffle = random.Random(0)
        train, test = list(task.train), list(task.test)
        shuffle.shuffle(train)
        shuffle.shuffle(test)
        held, rest = train[: protocol.entry_items], train[protocol.entry_items :]
        train = rest[: protocol.train_items]
        for part, measured in zip(PARTS, (held, held[: protocol.dev_items], test[: protocol.test_items]), strict=True):
            _write(folder / part / name, "train", train, tokenizer)
            _write(folder / part / name, "test", measured, tokenizer)
            (folder / part / name / "options.json").write_text(json.dumps(task.options), encoding="utf-8")


def make_texts(roots: Sequence[Path], measured: Path, known: Path) -> None:
    """Passages of Wikipedia that no task here is about, of the benchmark's BoolQA: of its test rows for the model's
    perplexity, of its training rows others to be remembered."""
    source = read_source(roots, TEXT_OF)
    passages = _passages(source.test)[:MEASURED_PASSAGES]
    others = [passage for passage in _passages(source.train) if passage not in set(passages)][:KNOWN_PASSAGES]
    for file, text in ((measured, passages), (known, others)):
        file.write_text("\n\n".join(text), encoding="utf-8")


def _passages(rows: Sequence[Example]) -> list[str]:
    return list(dict.fromkeys(row.group.strip() for row in rows if row.group is not None))


def _write(folder: Path, part: str, rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": _cut(row.prompt, tokenizer), "answer": row.answer}) + "\n" for row in rows]
    (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")


def _cut(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The benchmark's prompts have two lines of instruction, the text, and a line that asks for the answer."""
    lines = prompt.split("\n")
    ids = tokenizer(" ".join(lines[2:-1]))["input_ids"][:TEXT_TOKENS]
    return "\n".join([*lines[:2], tokenizer.decode(ids), lines[-1]])

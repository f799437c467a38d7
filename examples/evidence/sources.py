"""Data sets of three public repositories, as tasks whose prompts are two lines of question and options, the text, and
the cue to answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sculpt_ops.continual.benchmark import read_benchmark_task
from sculpt_ops.continual.tasks import Example, Task, read_json

__all__ = ["read_source"]

INTENTS = "data_full.json"
TWEETS = {
    "emotion": "Which emotion does the following text express?",
    "offensive": "Is the following text offensive?",
}


def read_source(roots: Sequence[Path], path: str) -> Task:
    """The data set at `path` of the first of `roots` that has it.

    TYPE/DATASET in the folder CL_Benchmark of cmnfriend/O-LoRA; datasets/NAME of cardiffnlp/tweeteval;
    data/data_full.json/DOMAIN of clinc/oos-eval, the intents of that domain. ValueError if no root has it.
    """
    folder, _, name = path.rpartition("/")
    for root in roots:
        if (root / folder).name == INTENTS and (root / folder).exists():
            return _intents(root / folder, name)
        if (root / path / "mapping.txt").exists():
            return _tweets(root / path)
        if (root / path / "labels.json").exists():
            return read_benchmark_task(root / path)
    raise ValueError(f"--data: none of {', '.join(map(str, roots))} has {path}")


def _example(question: str, options: Sequence[str], text: str, answer: str) -> Example:
    lines = (
        f"{question} Choose one from the option.",
        f"Option: {', '.join(options)}",
        " ".join(text.split()),
        "Answer:",
    )
    return Example("\n".join(lines), answer)


def _tweets(folder: Path) -> Task:
    def lines(name: str) -> list[str]:
        return (folder / name).read_text(encoding="utf-8").strip().split("\n")

    options = [line.split("\t")[1].strip() for line in lines("mapping.txt")]
    train, test = (
        [
            _example(TWEETS[folder.name], options, text, options[int(label)])
            for text, label in zip(lines(f"{part}_text.txt"), lines(f"{part}_labels.txt"), strict=True)
        ]
        for part in ("train", "test")
    )
    return Task(folder.name, train, test, options)


def _intents(file: Path, domain: str) -> Task:
    intents = read_json(file.parent / "domains.json")[domain]
    options = [intent.replace("_", " ") for intent in intents]
    rows = read_json(file)
    train, test = (
        [
            _example("Which intent does the following text express?", options, text, intent.replace("_", " "))
            for text, intent in rows[part]
            if intent in intents
        ]
        for part in ("train", "test")
    )
    return Task(domain, train, test, options)

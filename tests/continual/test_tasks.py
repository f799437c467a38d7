"""Reading tasks, splitting them, and what a reader is told about both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sculpt_ops.continual import Example, Task, load_tasks, read_jsonl_task
from sculpt_ops.continual.benchmark import LONG_TASKS, STANDARD_TASKS, benchmark_note, read_benchmark_task
from sculpt_ops.continual.tasks import hold_out, split

TRAIN = [{"prompt": "2 + 2 =", "answer": "4"}, {"prompt": "1 + 1 =", "answer": " 2 "}]


def write_jsonl(folder: Path, train: str | None = None, test: str | None = None, options: object = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = "\n".join(json.dumps(row) for row in TRAIN)
    (folder / "train.jsonl").write_text(rows if train is None else train)
    (folder / "test.jsonl").write_text(rows if test is None else test)
    if options is not None:
        (folder / "options.json").write_text(json.dumps(options))
    return folder


def write_benchmark(folder: Path, labels: list[str], **parts: list[dict[str, str]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "labels.json").write_text(json.dumps(labels))
    for part, rows in parts.items():
        (folder / f"{part}.json").write_text(json.dumps(rows))
    return folder


def test_a_jsonl_folder_is_a_task(tmp_path: Path) -> None:
    task = read_jsonl_task(write_jsonl(tmp_path / "sums", options=["2", "4"]))
    assert task == Task(
        "sums", [Example("2 + 2 =", "4"), Example("1 + 1 =", "2")], [*task.test], options=["2", "4"], note=None
    )
    assert len(task.test) == 2


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt": "x"', "not JSON"),
        ("[1]", "got list"),
        ('{"prompt": "x"}', "`answer` is None"),
        ('{"prompt": "x", "answer": 3}', "`answer` is 3"),
        ('{"prompt": " ", "answer": "y"}', "`prompt` is ' '"),
        ('{"prompt": "x", "answer": "a\\nb"}', "several lines"),
        ('{"prompt": "x", "answer": "5"}', "none of the options 2, 4"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: str, complaint: str) -> None:
    folder = write_jsonl(tmp_path / "sums", test=f"{json.dumps(TRAIN[0])}\n\n{line}\n", options=["2", "4"])
    with pytest.raises(ValueError, match="line 3") as caught:
        read_jsonl_task(folder)
    assert str(folder / "test.jsonl") in str(caught.value)
    assert complaint in str(caught.value)


def test_a_line_separator_inside_text_does_not_end_the_line(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "one\u2028two", "answer": "4"}, ensure_ascii=False)
    assert read_jsonl_task(write_jsonl(tmp_path / "sums", train=row)).train == [Example("one\u2028two", "4")]


def test_a_line_may_name_its_group(tmp_path: Path) -> None:
    rows = [{"prompt": f"p {n}", "answer": "4", "group": f"text {n // 3}"} for n in range(12)]
    lines = [json.dumps(row) for row in rows]
    task = read_jsonl_task(
        write_jsonl(tmp_path / "sums", "\n".join(lines), "\n".join([*lines[:2], json.dumps(TRAIN[0])]))
    )
    assert [example.group for example in task.train] == [f"text {n // 3}" for n in range(12)]
    assert task.note == "2 of the 3 test rows share their text with training rows"
    held = hold_out(task, 4)
    assert {example.group for example in held.train}.isdisjoint(example.group for example in held.test)
    with pytest.raises(ValueError, match="line 1: `group` is 3"):
        read_jsonl_task(write_jsonl(tmp_path / "bad", json.dumps({**rows[0], "group": 3})))


def test_a_folder_may_name_its_metric_and_then_have_long_answers(tmp_path: Path) -> None:
    folder = write_jsonl(tmp_path / "told", json.dumps({"prompt": "x", "answer": "a\nb"}))
    (folder / "metric.json").write_text('"choice"')
    task = read_jsonl_task(folder)
    assert (task.metric, task.train[0].answer) == ("choice", "a\nb")
    (folder / "metric.json").write_text('"bleu"')
    with pytest.raises(ValueError, match=r"told.metric\.json: metric: got 'bleu', wanted one of exact"):
        read_jsonl_task(folder)


def test_a_missing_half_is_named(tmp_path: Path) -> None:
    folder = write_jsonl(tmp_path / "sums")
    (folder / "test.jsonl").unlink()
    with pytest.raises(ValueError, match=r"test\.jsonl is missing"):
        read_jsonl_task(folder)


def test_folders_of_task_folders_are_read_by_name_or_in_the_order_given(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write_jsonl(tmp_path / name)
    assert [task.name for task in load_tasks([tmp_path])] == ["a", "b", "c"]
    assert [task.name for task in load_tasks([tmp_path], order=["c", "a"])] == ["c", "a"]
    assert [task.name for task in load_tasks([tmp_path / "c", str(tmp_path / "a")])] == ["c", "a"]
    with pytest.raises(ValueError, match=r"no task d, there are a, b, c"):
        load_tasks([tmp_path], order=["a", "d"])
    with pytest.raises(ValueError, match="the name a is there twice"):
        load_tasks([tmp_path, tmp_path / "a"])


def test_tasks_left_out_by_the_order_are_not_read(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "good")
    write_jsonl(tmp_path / "broken", train="{")
    assert [task.name for task in load_tasks([tmp_path], order=["good"])] == ["good"]


def test_an_unknown_layout_says_what_the_layouts_are(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"is no task folder and holds none.*train\.jsonl.*labels\.json"):
        load_tasks([tmp_path])
    with pytest.raises(ValueError, match="there is no folder"):
        load_tasks([tmp_path / "nowhere"])


def test_a_benchmark_instance_becomes_a_question(tmp_path: Path) -> None:
    rows = [{"label": "Sports", "sentence": "Title: Goal\nText: They won.\n"}]
    folder = write_benchmark(tmp_path / "TC" / "news", ["World", "Sports"], train=rows, test=rows)
    task = read_benchmark_task(folder)
    (example,) = task.train
    first, option, *sentence, cue = example.prompt.split("\n")
    assert first.endswith("Choose one from the option.")
    assert option == "Option: World, Sports"
    assert sentence == ["Title: Goal", "Text: They won."]
    assert cue == "Answer:"
    assert (example.answer, task.options, task.note) == ("Sports", ["World", "Sports"], None)
    assert load_tasks([tmp_path]) == [task]


def test_a_benchmark_fault_is_named(tmp_path: Path) -> None:
    rows = [{"label": "World", "sentence": "a"}, {"label": "Weather", "sentence": "b"}]
    with pytest.raises(ValueError, match=r"train\.json, instance 1: the answer 'Weather' is none of the options World"):
        read_benchmark_task(write_benchmark(tmp_path / "TC" / "news", ["World"], train=rows))
    with pytest.raises(ValueError, match="names the type, got XX"):
        read_benchmark_task(write_benchmark(tmp_path / "XX" / "news", ["World"], train=rows[:1]))
    with pytest.raises(ValueError, match=r"few.train\.json: 3 rows are too few to hold some out"):
        read_benchmark_task(write_benchmark(tmp_path / "TC" / "few", ["World"], train=rows[:1] * 3))
    with pytest.raises(ValueError, match=r"one.test\.json: 1 rows are too few"):
        read_benchmark_task(write_benchmark(tmp_path / "TC" / "one", ["World"], test=rows[:1]))
    with pytest.raises(ValueError, match=r"labels\.json: wanted a list of answers"):
        read_benchmark_task(write_benchmark(tmp_path / "TC" / "none", [], train=rows))
    with pytest.raises(ValueError, match=r"neither train\.json nor test\.json"):
        read_benchmark_task(write_benchmark(tmp_path / "SC" / "empty", ["World"]))


@pytest.mark.parametrize(("part", "sizes"), [("train", (750, 250)), ("test", (666, 334))])
def test_a_missing_half_is_split_off_and_said(tmp_path: Path, part: str, sizes: tuple[int, int]) -> None:
    rows = [{"label": "yes", "sentence": f"row {index}"} for index in range(1000)]
    task = read_benchmark_task(write_benchmark(tmp_path / "TC" / "half", ["yes"], **{part: rows}))
    assert (len(task.train), len(task.test)) == sizes
    assert {example.prompt for example in task.train}.isdisjoint(example.prompt for example in task.test)
    assert task.note == f"only {part}.json is there: shuffled (seed 0), {sizes[0]} rows to train, {sizes[1]} to test"


def test_multirc_is_split_by_passage(tmp_path: Path) -> None:
    rows = [
        {"label": "True", "sentence": f"paragraph: {index // 5}\nquestion: {index}\ncandidate answer: x"}
        for index in range(100)
    ]
    task = read_benchmark_task(write_benchmark(tmp_path / "MultiRC" / "MultiRC", ["True"], train=rows))
    assert len(task.test) == 25
    assert {example.group for example in task.train}.isdisjoint(example.group for example in task.test)
    assert task.note is not None
    assert "by passage" in task.note


@given(
    groups=st.lists(st.none() | st.sampled_from("abcd"), min_size=1, max_size=40),
    held_out=st.integers(0, 45),
    seed=st.integers(0, 3),
)
def test_a_split_is_a_partition_that_keeps_groups_whole(groups: list[str | None], held_out: int, seed: int) -> None:
    examples = [Example(str(index), "x", group) for index, group in enumerate(groups)]
    kept, held = split(examples, held_out, seed)
    assert sorted((*kept, *held), key=lambda example: int(example.prompt)) == examples
    assert len(held) >= min(held_out, len(examples))
    assert {e.group for e in kept if e.group}.isdisjoint(e.group for e in held)
    assert (kept, held) == split(examples, held_out, seed)
    if not any(groups):
        assert len(held) == min(held_out, len(examples))


def test_held_out_rows_come_from_training_and_never_from_the_test() -> None:
    task = Task("t", [Example(f"train {i}", "x") for i in range(10)], [Example("test", "x")], note="as found")
    dev = hold_out(task, 4)
    assert {*dev.train, *dev.test} == set(task.train)
    assert (len(dev.train), len(dev.test)) == (6, 4)
    assert dev.note == "as found; measured on 4 training rows held out (seed 0), not on the test rows"
    with pytest.raises(ValueError, match="dev_items: got 10, task t has 10 training rows"):
        hold_out(task, 10)


def test_a_part_of_the_benchmark_is_not_called_the_whole() -> None:
    assert benchmark_note(STANDARD_TASKS) is None
    assert benchmark_note(LONG_TASKS[::-1]) is None
    assert benchmark_note(["my task", "agnews"]) is None
    assert benchmark_note(["agnews", "dbpedia", "amazon"]) == (
        "3 of the 4 tasks of the published benchmark; it lacks yahoo."
    )
    note = benchmark_note([name for name in LONG_TASKS if name not in ("MNLI", "QQP")])
    assert note == "13 of the 15 tasks of the published benchmark; it lacks MNLI, QQP."


ROWS = {
    "agnews": (4000, 7600),
    "amazon": (5000, 7600),
    "dbpedia": (5000, 2600),
    "yelp": (4500, 500),
    "IMDB": (1500, 500),
    "BoolQA": (2000, 3270),
    "COPA": (400, 100),
    "WiC": (2000, 638),
    "CB": (250, 56),
    "RTE": (2000, 277),
}


def test_the_real_benchmark(benchmark_folder: Path) -> None:
    tasks = {task.name: task for task in load_tasks([benchmark_folder])}
    assert {name: (len(tasks[name].train), len(tasks[name].test)) for name in ROWS} == ROWS
    passages = [{example.group for example in rows} for rows in (tasks["MultiRC"].train, tasks["MultiRC"].test)]
    assert passages[0].isdisjoint(passages[1])
    shared = {name: task.note for name, task in tasks.items() if "share their text" in (task.note or "")}
    assert shared.keys() == {"BoolQA", "RTE"}
    assert shared["BoolQA"] == "339 of the 3270 test rows share their text with training rows"
    assert {name for name, task in tasks.items() if task.note} - shared.keys() == {"dbpedia", "yelp", "IMDB", "MultiRC"}
    for name in ("MultiRC", "BoolQA", "RTE"):
        held = hold_out(tasks[name], 100)
        assert {example.group for example in held.train}.isdisjoint(example.group for example in held.test)
        assert None not in {example.group for example in held.test}
    for task in tasks.values():
        assert task.options is not None
        assert all(f"Option: {', '.join(task.options)}\n" in example.prompt for example in task.test)
        assert {example.answer for example in task.train} == set(task.options)


def test_reading_does_not_depend_on_the_folder_of_the_moment(
    write_task: Callable[[Task], Path], toy_tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_task(toy_tasks[0])
    monkeypatch.chdir(folder)
    assert load_tasks(["."]) == [toy_tasks[0]]

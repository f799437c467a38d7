"""TRACE's layout and metrics, and the published sequences of both benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sculpt_ops.continual import Example, load_tasks
from sculpt_ops.continual.benchmark import LONG_TASKS, SEQUENCES, load_sequence
from sculpt_ops.continual.trace import METRICS, TRACE_TASKS, read_trace_task

ROWS = [{"prompt": "Stance:\n", "answer": "A"}, {"prompt": "Stance: ", "answer": " C "}]


def write(folder: Path, **parts: object) -> Path:
    folder.mkdir(parents=True)
    for part, rows in ({"train": ROWS, "eval": ROWS, "test": ROWS} | parts).items():
        (folder / f"{part}.json").write_text(json.dumps(rows))
    return folder


def test_a_folder_is_a_task_with_the_papers_metric(tmp_path: Path) -> None:
    pytest.importorskip("rouge_score", reason="needs pip install sculpt-ops[trace]")
    pytest.importorskip("rapidfuzz", reason="needs pip install sculpt-ops[trace]")
    long = [{"prompt": "Summary:", "answer": "one\ntwo"}]
    for name in TRACE_TASKS:
        write(tmp_path / name, **({"train": long, "test": long} if name in METRICS else {}))
    tasks = {task.name: task for task in load_tasks([tmp_path])}
    assert {name: task.metric for name, task in tasks.items() if task.metric != "exact"} == {
        "MeetingBank": "rouge-l",
        "Py150": "edit",
        "ScienceQA": "choice",
        "20Minuten": "sari",
    }
    assert tasks["FOMC"].train == [Example("Stance:\n", "A"), Example("Stance: ", "C")]
    assert tasks["FOMC"].options == ["A", "C"]
    assert tasks["NumGLUE-cm"].options is None
    assert tasks["MeetingBank"].test == [Example("Summary:", "one\ntwo")]
    sequence = load_sequence("trace", tmp_path)
    assert (sequence.name, tuple(task.name for task in sequence.tasks), sequence.note) == ("trace", TRACE_TASKS, None)


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ({}, "wanted a list of instances"),
        ([], "wanted a list of instances"),
        ([{"prompt": "x"}], "test.json, instance 0: wanted `prompt` and `answer`"),
        ([*ROWS, {"prompt": "x", "answer": " "}], "instance 2: the prompt or the answer is empty"),
        ([{"prompt": "x", "answer": "a\nb"}], "instance 0: the answer has several lines"),
    ],
)
def test_a_bad_instance_is_named(tmp_path: Path, rows: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        read_trace_task(write(tmp_path / "NumGLUE-cm", test=rows))


def test_a_missing_half_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "FOMC")
    (folder / "test.json").unlink()
    with pytest.raises(ValueError, match=r"test\.json is missing"):
        read_trace_task(folder)
    with pytest.raises(ValueError, match=r"FOMC.test\.json is missing"):
        load_tasks([tmp_path])


def write_benchmark(root: Path, *names: str) -> Path:
    for name in names:
        folder = root / "TC" / name
        folder.mkdir(parents=True)
        (folder / "labels.json").write_text('["yes"]')
        for part in ("train", "test"):
            (folder / f"{part}.json").write_text('[{"label": "yes", "sentence": "x"}]')
    return root


def test_a_sequence_keeps_its_order(tmp_path: Path) -> None:
    folder = write_benchmark(tmp_path, "agnews", "amazon", "dbpedia", "yahoo", "another")
    for name, order in (
        ("standard-1", ["dbpedia", "amazon", "yahoo", "agnews"]),
        ("standard-2", ["dbpedia", "amazon", "agnews", "yahoo"]),
        ("standard-3", ["yahoo", "amazon", "agnews", "dbpedia"]),
    ):
        sequence = load_sequence(name, folder)
        assert [task.name for task in sequence.tasks] == order
        assert (sequence.name, sequence.missing, sequence.note) == (name, (), None)


def test_a_sequence_that_lacks_a_task_is_partial_and_says_which(tmp_path: Path) -> None:
    folder = write_benchmark(tmp_path, "agnews", "dbpedia")
    sequence = load_sequence("standard-1", folder)
    assert [task.name for task in sequence.tasks] == ["dbpedia", "agnews"]
    assert sequence.missing == ("amazon", "yahoo")
    assert sequence.note == "standard-1 (partial): 2 of 4 tasks; it lacks amazon, yahoo"
    with pytest.raises(ValueError, match="sequence: got 'short', wanted one of standard-1"):
        load_sequence("short", folder)
    with pytest.raises(ValueError, match="holds no task of trace"):
        load_sequence("trace", folder)


def test_both_long_sequences_are_of_the_same_tasks() -> None:
    assert set(SEQUENCES["long-paper"]) == set(SEQUENCES["long"]) == set(LONG_TASKS)
    assert len(SEQUENCES["long-paper"]) == len(SEQUENCES["long"]) == 15


def test_the_real_data_makes_partial_sequences(benchmark_folder: Path) -> None:
    sequence = load_sequence("standard-3", benchmark_folder)
    assert [task.name for task in sequence.tasks] == ["amazon", "agnews", "dbpedia"]
    assert sequence.name == "standard-3 (partial)"
    assert load_sequence("long", benchmark_folder).missing == ("MNLI", "QQP", "SST-2", "yahoo")

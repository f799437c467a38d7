"""The report: every figure from the results, every caveat said."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sculpt_ops.continual import Prediction, RunResult, TrainConfig, write_report
from sculpt_ops.continual.metrics import difference, wilson_interval
from sculpt_ops.continual.plots import draw_leak
from sculpt_ops.continual.result import LearnedTask

pytest.importorskip("matplotlib", reason="the report needs pip install sculpt-ops[train]")

TASKS = ["colours", "sounds", "sums"]
SHARES = [[0.2, 0.1, 0.3], [0.8, 0.2, 0.3], [0.6, 0.6, 0.4], [0.5, 0.7, 0.9]]
WEIGHT = "model.layers.{}.mlp.up_proj.weight"


def made(
    protect: float | None,
    shares: Sequence[Sequence[float]] = SHARES,
    seed: int = 0,
    items: int = 50,
    name: str | None = None,
) -> RunResult:
    """A run with given accuracies; items are right in an order of their own, drawn by seed."""
    tasks = TASKS[: len(shares[0])]
    generator = np.random.default_rng(seed)
    predictions = []
    for row, accuracies in enumerate(shares):
        for task, share in zip(tasks, accuracies, strict=True):
            right = generator.permutation(items) < round(share * items)
            predictions += [
                Prediction(row, task, item, "yes", "yes" if ok else "no") for item, ok in enumerate(right.tolist())
            ]
    remember = "inputs:0.95" if protect == 0.0 else None
    settings: dict[str, Any] = {"protect": protect, "remember": remember, "seed": seed, "name": name}
    config = TrainConfig(model="/models/tiny", tasks=tasks, output=f"/runs/{seed}", **settings)
    layers = {WEIGHT.format(i): {"shape": [64, 32], "rank": 16 + i, "energy": 0.9} for i in range(2)} if protect else {}
    learned = [
        LearnedTask(
            name=task,
            train_items=100,
            test_items=items,
            note="only test.json is there" if task == "sounds" else None,
            steps=3,
            derive_seconds=2.0,
            train_seconds=4.0,
            step_seconds=[9.0, 0.25, 0.5],
            losses=[(3, 0.5)],
            peak_memory_bytes=(index + 1) * 2**29,
            layers=layers,
            leak=dict.fromkeys(layers, 1e-07 * (1 + index)),
        )
        for index, task in enumerate(tasks)
    ]
    return RunResult(
        name=config.title,
        tasks=tasks,
        output=f"/runs/{seed}",
        config=config.to_dict(),
        versions={"torch": "2.13.0", "device": "CPU"},
        notes=["3 of the 15 tasks of the published benchmark; it lacks WiC."],
        learned=learned,
        predictions=predictions,
        evaluation_seconds=[1.0] * len(shares),
    )


def followed(result: RunResult, share: float) -> RunResult:
    """The run with a leak measured every third step; the left side leaks twice as much as the right."""
    learned = [
        replace(
            task,
            leak_left={name: 2 * leak for name, leak in task.leak.items()},
            leak_right=task.leak,
            leak_over_time=[(step, share / step, 4 * share / step) for step in (3, 6, 9)],
            leak_seconds=0.5,
        )
        for task in result.learned
    ]
    return replace(result, learned=learned)


def rows(text: str, heading: str) -> dict[str, list[str]]:
    """The first table under a heading: first cell to the other cells."""
    lines = text.split(f"{heading}\n", 1)[1].split("\n\n")
    table = next(part for part in lines if part.strip().startswith("|")).strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {row[0]: row[1:] for row in cells}


def size_of_png(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_two_methods_side_by_side(tmp_path: Path) -> None:
    better = [[0.2, 0.1, 0.3], [0.8, 0.2, 0.3], [0.8, 0.6, 0.4], [0.7, 0.7, 0.9]]
    plain, protected = made(None), made(0.5, better)
    path = write_report([plain, protected], tmp_path / "new" / "report")
    text = path.read_text()
    result = rows(text, "## Result")
    assert result["plain"][0].startswith("70.0 (")
    assert result["plain"][1].startswith("-10.0 (")
    assert result["plain"][2].startswith("15.0 (")
    assert result["plain"][3].startswith("76.7 (")
    # Before sounds and sums 0.2 and 0.4, zero-shot 0.1 and 0.3.
    assert result["plain"][4].startswith("+10.0 (")
    cost = rows(text, "### Cost")
    assert cost["plain"] == ["0.5", "1.50", "-", "-"]
    assert result["protect 0.5, both"][0].startswith("76.7 (")
    assert cost["protect 0.5, both"] == ["0.5", "1.50", "3.0e-07", "6"]
    expected = difference(protected.correct, plain.correct).average_accuracy
    (gained,) = [row for name, row in rows(text, "paired over the same items").items() if name.startswith("protect")]
    assert gained[0] == f"{100 * expected.value:+.1f} ({100 * expected.low:+.1f} to {100 * expected.high:+.1f})"
    accuracy = rows(text, "### Accuracy of plain, %")
    assert accuracy["zero-shot"] == ["20.0", "10.0", "30.0"]
    assert accuracy["after sums"] == ["50.0", "70.0", "90.0"]
    low, high = wilson_interval(25, 50)
    assert accuracy["95 % interval at the end"][0] == f"{100 * low:.1f} to {100 * high:.1f}"
    assert rows(text, "### Protected in protect 0.5, both, over all tasks")["`model.layers.*.mlp.up_proj.weight`"] == [
        "64 x 32",
        "16 to 17",
        "90.0",
        "3.0e-07",
        "-",
        "-",
    ]
    assert rows(text, "## Tasks")["sounds"] == ["100", "50", "3", "only test.json is there"]
    settings = rows(text, "## Settings and versions")
    assert settings["protect"] == ["none", "0.5"]
    assert settings["torch"] == ["2.13.0", "same"]
    assert "**One seed** (0)" in text
    assert "3 of the 15 tasks of the published benchmark; it lacks WiC." in text
    for name in ("accuracy.png", "curves.png"):
        assert f"]({name})" in text
        width, height = size_of_png(path.parent / name)
        assert 400 < width < 4000
        assert 300 < height < 4000
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "accuracy.png",
        "curves.png",
        "report.md",
        "tradeoff.png",
    ]


def test_one_task_has_no_curves_and_no_forgetting(tmp_path: Path) -> None:
    text = write_report([made(None, [[0.1], [0.9]])], tmp_path).read_text()
    assert rows(text, "## Result")["plain"][1:3] == ["-", "-"]
    assert "curves.png" not in text
    assert sorted(file.name for file in tmp_path.iterdir()) == ["accuracy.png", "report.md"]
    assert "Difference" not in text


def test_the_leak_over_time_is_drawn_and_its_cost_said(tmp_path: Path) -> None:
    results = [made(None), followed(made(0.5, name="left|right"), 1e-7), followed(made(0.25), 0.1)]
    text = write_report(results, tmp_path).read_text()
    section = text.split("## Leak over time")[1].split("\n## ")[0]
    assert "](leak.png)" in section
    # 2 protected runs of 3 tasks, each 4 s of training with 0.5 s of measuring in them.
    assert "Measuring took 3 s beside 21 s of training" in section
    width, height = size_of_png(tmp_path / "leak.png")
    assert 400 < width < 4000
    assert 300 < height < 4000
    by_side = rows(text, "### Protected in protect 0.25, both, over all tasks")[f"`{WEIGHT.format('*')}`"]
    assert by_side[-3:] == ["3.0e-07", "6.0e-07", "3.0e-07"]


def test_a_leak_of_exactly_zero_or_none_measured_is_no_fault(tmp_path: Path) -> None:
    result = made(0.5)
    tasks = [replace(task, leak_over_time=[(1, 0.0, 0.0)]) for task in result.learned]
    undefined = replace(tasks[0], leak_over_time=[(1, None, None)])
    text = write_report([replace(result, learned=[undefined, *tasks[1:]])], tmp_path / "zero").read_text()
    assert "](leak.png)" in text
    assert rows(text, "### Protected in protect 0.5, both, over all tasks").popitem()[1][-2:] == ["-", "-"]


def test_many_tasks_take_several_rows_of_panels(tmp_path: Path) -> None:
    few, many = followed(made(0.5, [[0.1], [0.9]]), 1e-7), followed(made(0.5), 1e-7)
    many = replace(many, tasks=[f"{i}" for i in range(15)], learned=many.learned * 5)
    for name, result in (("few", few), ("many", many)):
        draw_leak([result], [name], tmp_path / f"{name}.png")
    (_, low), (_, high) = (size_of_png(tmp_path / f"{name}.png") for name in ("few", "many"))
    assert 3 * low < high < 4 * low


def test_runs_of_the_same_name_are_told_apart_and_seeds_are_listed(tmp_path: Path) -> None:
    text = write_report([made(None, seed=1), made(None, seed=2)], tmp_path).read_text()
    assert {"plain (1)", "plain (2)"} <= rows(text, "## Result").keys()
    assert "One seed" not in text
    assert "Seeds 1, 2." in text


def test_runs_on_other_items_get_no_paired_difference(tmp_path: Path) -> None:
    text = write_report([made(None), made(0.5, items=40)], tmp_path).read_text()
    assert "Difference" not in text
    assert "**Measured on other rows than plain: protect 0.5" in text
    assert "Measured on other rows" not in write_report([made(None), made(0.5)], tmp_path).read_text()


def test_a_name_with_a_bar_does_not_break_the_table(tmp_path: Path) -> None:
    text = write_report([made(None, name="a|b")], tmp_path).read_text()
    assert "| a\\|b | 70.0" in text


def test_what_cannot_be_compared_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    whole = made(None)
    cut = replace(whole, predictions=[p for p in whole.predictions if p.row < 3])
    for results, complaint in (
        ([], "results: got none"),
        ([whole, made(None, [[0.1], [0.9]])], "one report needs the same tasks"),
        ([whole, cut], "stopped after 2 of 3 tasks"),
    ):
        with pytest.raises(ValueError, match=complaint):
            write_report(results, tmp_path / "report")
    assert not (tmp_path / "report").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match=r"output: .*file is a file, wanted a folder"):
        write_report([whole], tmp_path / "file" / "deeper")


def test_results_survive_their_files(tmp_path: Path) -> None:
    result = followed(replace(made(0.5), output=str(tmp_path / "run")), 1e-7)
    result.save()
    loaded = RunResult.load(tmp_path / "run")
    assert replace(loaded, learned=[], predictions=[]) == replace(result, learned=[], predictions=[])
    assert loaded.predictions == result.predictions
    assert write_report([loaded], tmp_path / "a").read_text() == write_report([result], tmp_path / "b").read_text()
    one = replace(made(None, [[0.1], [0.9]]), output=str(tmp_path / "one"))
    one.save()
    assert '"backward_transfer": {\n   "value": null' in (tmp_path / "one" / "run.json").read_text()


def test_a_run_from_before_the_leak_was_followed_is_read(tmp_path: Path) -> None:
    result = replace(made(0.5), output=str(tmp_path / "run"))
    result.save()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    for task in record["learned"]:
        for name in ("leak_left", "leak_right", "leak_over_time", "leak_seconds"):
            del task[name]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    loaded = RunResult.load(tmp_path / "run")
    assert loaded.learned[0].leak == result.learned[0].leak
    assert loaded.learned[0].leak_over_time == []
    assert "## Leak over time" not in write_report([loaded], tmp_path).read_text()


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no run of `sculpt train`: there is no run\.json"):
        RunResult.load(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"predictions\.jsonl is missing or damaged"):
        RunResult.load(tmp_path)
    (tmp_path / "predictions.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"run\.json is missing or damaged"):
        RunResult.load(tmp_path)


def test_what_a_reader_asks_about_answers_memory_and_other_abilities(tmp_path: Path) -> None:
    plain, ours = made(None), made(0.5, name="ours")
    given = [replace(p, option="yes" if p.item < 40 else "no") for p in ours.predictions]
    learned = [
        replace(task, majority=0.25, remembered=dict.fromkeys(task.layers, 0.5 * index) if index else {})
        for index, task in enumerate(ours.learned)
    ]
    figures = {"before": {"wiki perplexity": 20.5, "piqa accuracy": 0.75, "piqa items": 4.0}, "after": {}}
    ours = replace(ours, predictions=given, learned=learned, ability=figures | {"after": {"wiki perplexity": 22.25}})
    text = write_report([plain, ours], tmp_path).read_text()
    table = text.split("### Answers after the last task, %")[1].split("\n\n")[1].splitlines()
    right = sum(p.correct for p in ours.predictions if (p.row, p.task) == (3, "colours"))
    # One answer there is, "yes": precision 1 and recall the accuracy.
    share = right / 50
    assert table[2] == f"| ours | colours | {100 * share:.1f} | 80.0 | {200 * share / (1 + share):.1f} | 25.0 |"
    assert len(table) == 5
    besides = text.split("### Besides the tasks")[1]
    assert "| ours | wiki perplexity | 20.5 | 22.25 |" in besides
    assert "| ours | piqa accuracy | 0.75 | - |" in besides
    assert "piqa items" not in besides
    assert "| ours | colours | 50.0 | 50.0 |" in text
    assert "| ours | sounds | 100.0 | 100.0 |" in text
    assert "what is remembered is never dropped" in text
    assert size_of_png(tmp_path / "tradeoff.png")[0] > 600


def test_what_is_protected_of_every_earlier_change_is_a_table(tmp_path: Path) -> None:
    run = made(0.0, name="ours")
    earlier: list[list[float | None]] = [[], [0.5], [None, 0.75]]
    heading = "### Of each earlier task's change protected in ours, %"

    def text() -> str:
        learned = [replace(task, remembered_earlier=row) for task, row in zip(run.learned, earlier, strict=True)]
        return write_report([replace(run, learned=learned)], tmp_path).read_text()

    # All of it is in the table of the task before.
    assert heading not in text()
    earlier[2] = [0.625, 0.75]
    table = rows(text(), heading)
    assert table["change by"] == [f"while learning {task}" for task in TASKS[1:]]
    assert [table[task] for task in TASKS[:2]] == [["50.0", "62.5"], ["-", "75.0"]]
    assert len(table) == 4


def test_rows_that_were_not_measured_are_left_empty(tmp_path: Path) -> None:
    result = made(None)
    seen = [p for p in result.predictions if p.row == 0 or TASKS.index(p.task) < p.row]
    text = write_report([replace(result, predictions=seen)], tmp_path).read_text()
    accuracy = rows(text, "### Accuracy of plain, %")
    assert accuracy["after colours"] == ["80.0", "-", "-"]
    assert rows(text, "## Result")["plain"][4] == "-"


def test_runs_that_were_trained_in_other_ways_say_so_at_the_top(tmp_path: Path) -> None:
    one, other = made(0.5), made(0.25)
    other = replace(other, config={**other.config, "lr": 0.001, "epochs": 3})
    text = write_report([one, other], tmp_path).read_text()
    assert f"Not trained alike: lr ({one.config['lr']}, 0.001); epochs ({one.config['epochs']}, 3)." in text
    assert "Not trained alike" not in write_report([one, replace(one, name="again")], tmp_path).read_text()


def test_bounds_are_not_shown_as_if_they_learned_one_task_after_the_other(tmp_path: Path) -> None:
    plain = made(None)
    alone, together = (
        replace(made(None, name=name), config={**plain.config, "method": name}) for name in ("per-task", "multitask")
    )
    text = write_report([plain, alone, together], tmp_path).read_text()
    head = text.split("## Result")[0]
    assert "per-task is a bound: every task is learned from the start weights, and its learning accuracy" in head
    assert "multitask is a bound: all tasks are trained at once" in head
    assert "plain is a bound" not in text
    result = rows(text, "## Result")
    assert [cell == "-" for cell in result["per-task"]] == [True, True, True, False, True]
    assert [cell == "-" for cell in result["multitask"]] == [False, True, True, False, True]
    assert "-" not in result["plain"]
    assert result["per-task"][3] == result["plain"][3]
    compared = rows(text, "paired over the same items")
    assert [cell == "-" for cell in compared["per-task"]] == [True, True, True, False]
    assert [cell == "-" for cell in compared["multitask"]] == [False, True, True, False]
    # As the baseline too; with one point only there is no picture of them.
    text = write_report([alone, plain], tmp_path / "other").read_text()
    assert rows(text, "paired over the same items")["plain"][:3] == ["-", "-", "-"]
    assert not (tmp_path / "other" / "tradeoff.png").exists()
    assert "tradeoff.png" not in text
    replace(alone, output=str(tmp_path / "run")).save()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["metrics"]["forgetting"]["value"] is None


def test_forgetting_is_not_compared_between_runs_measured_after_other_tasks(tmp_path: Path) -> None:
    # colours is best after sounds, 0.9, of which 0.5 is left; the other run did not measure it there, and knows of 0.8.
    whole = made(None, [[0.2, 0.1, 0.3], [0.8, 0.2, 0.3], [0.9, 0.6, 0.4], [0.5, 0.7, 0.9]])
    learned = replace(
        whole,
        name="learned",
        config={**whole.config, "eval_rows": "learned"},
        predictions=[p for p in whole.predictions if p.row in (0, 3) or TASKS.index(p.task) == p.row - 1],
    )
    text = write_report([whole, learned], tmp_path).read_text()
    assert rows(text, "## Result")["plain"][2].startswith("20.0 (")
    assert rows(text, "## Result")["learned"][2].startswith("15.0 (")
    assert rows(text, "paired over the same items")["learned"][2] == "-"
    assert rows(text, "paired over the same items")["learned"][1] == "+0.0 (+0.0 to +0.0)"
    assert "Not measured after the same tasks: eval_rows (all, learned)." in text
    again = replace(whole, name="again")
    text = write_report([whole, again], tmp_path).read_text()
    assert rows(text, "paired over the same items")["again"][2] == "+0.0 (+0.0 to +0.0)"
    assert "Not measured after" not in text


def test_directions_that_are_remembered_are_counted(tmp_path: Path) -> None:
    run = made(0.0)
    learned = [
        replace(
            task,
            layers={
                WEIGHT.format(i): {"shape": [64, 32], "rank": 0, "energy": 0.0, "protected": [0, 4 * done + 8 * i]}
                for i in range(3)
            },
            leak=dict.fromkeys(map(WEIGHT.format, range(3)), 1e-8),
        )
        for done, task in enumerate(run.learned)
    ]
    config = {**run.config, "remember": "inputs:0.95"}
    text = write_report([replace(run, learned=learned, config=config)], tmp_path).read_text()
    assert "| right 0 to 24 | 0.0 |" in text
    # Medians: 8, 12 and 16 of 32.
    for task, share in zip(TASKS, ("25.0", "37.5", "50.0"), strict=True):
        assert f"| {task} | 0.0 | {share} |" in text

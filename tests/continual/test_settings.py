"""Settings from a YAML file and flags, each named where it does not fit; and what a dry run says."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sculpt_ops.continual import RunResult, Task, TrainConfig
from sculpt_ops.continual.settings import make_config
from sculpt_ops.ranks import Rank

pytest.importorskip("typer", reason="the command line needs pip install sculpt-ops[train]")
from typer.testing import CliRunner

from sculpt_ops.continual.cli import app

LEAST = "model: m\ntasks: [a, b]\noutput: o\n"


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        (tmp_path / "run.yaml").write_text(LEAST + text)
        return tmp_path / "run.yaml"

    return write


def test_flags_win_over_the_file(file: Callable[[str], Path]) -> None:
    path = file("lr: 3e-5\nprotect: rank:4\nbf16: true\nepochs: 2\nsave_every: none\norder: [b, a]\nseed: 7\n")
    config = make_config(path, {"lr": "1e-3", "bf16": False, "order": "a, b", "targets": ["*.x"], "seed": None})
    assert config == TrainConfig(
        *("m", ["a", "b"], "o", Rank(4)),
        **{"lr": 1e-3, "epochs": 2.0, "save_every": None, "order": ["a", "b"], "targets": ["*.x"], "seed": 7},
    )
    assert type(config.epochs) is float
    assert make_config(path).lr == 3e-5


def test_every_field_is_an_option_with_a_help() -> None:
    shown = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"}).stdout
    for field in dataclasses.fields(TrainConfig):
        assert field.metadata["help"]
        name = field.name.upper() if field.name in ("model", "tasks") else f"--{field.name.replace('_', '-')}"
        assert name in shown, name
    for words in ("both, left, right, block", "--config", "--dry-run", "--zero-shot"):
        assert words in shown


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("learning_rat: 1", "learning_rat: no such setting$"),
        ("batchsize: 1", "batchsize: no such setting, did you mean batch_size?"),
        ("batch-size: 1", "did you mean batch_size?"),
        ("lr: fast", "lr: got 'fast', wanted a number"),
        ("batch_size: 2.5", "batch_size: got 2.5, wanted a whole number"),
        ("batch_size: true", "batch_size: got True, wanted a whole number"),
        ("bf16: maybe", "bf16: got 'maybe', wanted true or false"),
        ("lr: [1]", r"lr: got \[1\], wanted a number"),
        ("seed: none", "seed: got 'none', wanted a whole number"),
        ("max_steps: soon", "max_steps: got 'soon', wanted a whole number or none"),
        ("name: {a: b}", "name: got .*, wanted text"),
        ("protect: lots", "protect: got 'lots'"),
        ("remember: some", "remember: got 'some', wanted rank:0.12"),
        ("remember: rank:1.5", "remember: got 'rank:1.5'"),
        ("remember: rank:4+rank:5", "remember: got"),
        ("remember: rank:4\nprotect: none", "remember: got 'rank:4' with protect none"),
        ("remember: inputs:0.9\nsides: block", "remember: got 'inputs:0.9' with sides 'block'"),
        ("eval_rows: some", "eval_rows: got 'some', wanted one of all, seen, learned"),
        ("lr: 1: 2", "is not YAML"),
        ("lr: 1e-4\nseed: 1\nlr: 1e-5", "has lr more than once"),
    ],
)
def test_a_wrong_setting_is_named(text: str, complaint: str, file: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        make_config(file(text))
    assert "\n" not in str(caught.value)


def test_a_setting_given_for_another_method_is_refused(file: Callable[[str], Path]) -> None:
    """Even at the value that it has anyway; what asks for nothing is not."""
    for name, value in {"ewc_lambda": "1000", "sides": "both", "protect": "0.5"}.items():
        method = "plain" if name != "ewc_lambda" else "sculpt"
        with pytest.raises(ValueError, match=f"^{name}: got .* with method '{method}', which has no use for it"):
            make_config(file(""), {"method": method, name: value})
        with pytest.raises(ValueError, match=f"^{name}: got .* with method '{method}', which has no use for it"):
            make_config(file(f"method: {method}\n{name}: {value}\n"))
    asked = {"method": "lora", "protect": "none", "remember": "none", "others": "auto", "remember_text": "none"}
    assert make_config(file(""), asked).method == "lora"


def test_a_flag_for_another_method_leaves_out_what_the_file_has_for_its_own(file: Callable[[str], Path]) -> None:
    path = file("protect: 0.5\nsides: right\nothers: freeze\ntargets: ['*.x']\nlora_rank: 4\nlr: 1e-5\n")
    lora = make_config(path, {"method": "lora"})
    assert (lora.targets, lora.lora_rank, lora.lr) == (["*.x"], 4, 1e-5)
    assert (lora.protect, lora.sides, lora.others) == (None, "both", "train")
    with pytest.raises(ValueError, match=r"^lora_rank: got 4 with method 'sculpt'"):
        make_config(path)
    with pytest.raises(ValueError, match=r"^sides: got 'left' with method 'lora'"):
        make_config(path, {"method": "lora", "sides": "left"})


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config: there is no file"):
        make_config(tmp_path / "nothing.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match=r"list\.yaml holds list"):
        make_config(tmp_path / "list.yaml")
    (tmp_path / "short.yaml").write_text("model: m\noutput: o\n")
    with pytest.raises(ValueError, match="tasks: missing"):
        make_config(tmp_path / "short.yaml")


@pytest.fixture
def run_file(short: dict[str, Any], toy_tasks: list[Task], write_task: Callable[[Task], Path], tmp_path: Path) -> Path:
    """A whole run in a file."""
    tasks = [str(write_task(task)) for task in toy_tasks]
    lines = [f"{name}: {value}" for name, value in {**short, "tasks": tasks, "output": tmp_path / "out"}.items()]
    (tmp_path / "run.yaml").write_text("\n".join(lines) + "\n")
    return tmp_path / "run.yaml"


def test_a_run_from_a_file(run_file: Path, tmp_path: Path) -> None:
    ended = CliRunner().invoke(app, ["train", "--config", str(run_file), "--max-steps", "1", "--quiet"])
    assert ended.exit_code == 0, ended.output
    assert [task.steps for task in RunResult.load(tmp_path / "out").learned] == [1, 1]


def test_a_dry_run_writes_nothing(run_file: Path, tmp_path: Path) -> None:
    from sculpt_ops.continual.estimate import estimate

    before = sorted(os.walk(tmp_path))
    options = ["train", "--config", str(run_file), "--protect", "schedule", "--eval-rows", "seen", "--dry-run"]
    shown = CliRunner().invoke(app, options)
    assert shown.exit_code == 0, shown.output
    assert sorted(os.walk(tmp_path)) == before
    for words in ("colours", "sounds", "14 matrices", "GiB at the peak", "an estimate of", "nothing was written"):
        assert words in shown.stdout
    first, second = estimate(make_config(run_file, {"protect": "schedule", "eval_rows": "seen"})).tasks
    assert (first.train_rows, first.test_rows, first.steps) == (16, 3, 3)
    # Half of the smaller side of every matrix, 32 or, of keys and values, 16.
    assert (first.ranks, second.ranks) == ((0, 0), (8, 16))
    assert first.tokens > 3 * 8 * 5
    # Zero-shot and after both tasks; zero-shot and after the second.
    assert first.evaluation_seconds == pytest.approx(1.5 * second.evaluation_seconds)
    plain = estimate(make_config(run_file, {"protect": "none"}))
    assert (plain.matrices, plain.remember) == (0, None)
    left_open = estimate(make_config(run_file, {"protect": "auto"}))
    assert (left_open.protect, left_open.remember) == ("0", "inputs:0.95")
    assert [task.ranks for task in left_open.tasks] == [(0, 0), None]
    assert left_open.trained < plain.trained == left_open.parameters
    assert "without the bases of what is remembered" in left_open.table()
    assert plain.memory is not None
    assert estimate(make_config(run_file, {"protect": "energy:0.9"})).memory is None


def test_a_dry_run_counts_the_rows_that_a_method_adds(run_file: Path, tmp_path: Path) -> None:
    from sculpt_ops.continual import train
    from sculpt_ops.continual.estimate import estimate

    file = tmp_path / "methods.yaml"
    words = ("model", "tasks", "output", "cpu", "max_length", "eval_items")
    file.write_text("".join(line for line in run_file.open() if line.split(":")[0] in words or line[0] in " -"))
    for method, change in (("replay", {"replay_share": 0.5}), ("multitask", {}), ("per-task", {})):
        flags = {"method": method, "epochs": 2, "batch_size": 4, "output": str(tmp_path / method), **change}
        config = make_config(file, flags)
        expected = [task.steps for task in estimate(config).tasks]
        assert [task.steps for task in train(config, quiet=True).learned] == expected
    limited = estimate(make_config(file, {"method": "multitask", "max_steps": 3})).tasks
    assert [task.steps for task in limited] == [3, 0]


def test_a_dry_run_refuses_what_a_run_would(run_file: Path) -> None:
    ended = CliRunner().invoke(app, ["train", "--config", str(run_file), "--max-length", "4096", "--dry-run"])
    assert ended.exit_code == 2
    assert "max_length: got 4096" in ended.stderr

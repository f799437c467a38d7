"""A run goes on with its folder alone: --output RUN --resume."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sculpt_ops.continual import RunResult, Task, TrainConfig, train, trainer
from sculpt_ops.continual.settings import keep_settings, make_config
from sculpt_ops.ranks import Energy, Importance, Rank

pytest.importorskip("typer", reason="the command line needs pip install sculpt-ops[train]")
from typer.testing import CliRunner

from sculpt_ops.continual.cli import app

WORDS = ["--max-steps", "3", "--eval-items", "3", "--max-length", "64", "--lr", "1e-2", "--save-every", "1", "--cpu"]


def sculpt(*words: object) -> Any:
    return CliRunner().invoke(app, ["train", *map(str, words), "--quiet"])


def resumed(output: object, *words: object) -> Any:
    return sculpt("--output", output, "--resume", *words)


def refused(result: Any) -> str:
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return str(line)


def same_model(one: Path, other: Path) -> bool:
    from safetensors.torch import load_file

    first, second = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    return all(torch.equal(first[name], second[name]) for name in first | second)


@pytest.fixture
def here(
    toy_tasks: list[Task],
    write_task: Callable[[Task], Path],
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A working directory with tasks, a model and a text, to be named relative to it."""
    for task in toy_tasks:
        write_task(task)
    (tmp_path / "tiny").symlink_to(model_folder)
    (tmp_path / "text.txt").write_text("\n\n".join(row.prompt for row in toy_tasks[0].train))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A command that is interrupted after the last step of a task, whose state is not kept."""

    def run(task: str, *words: object) -> Any:
        from sculpt_ops.continual.hf_trainer import StepClock

        on_step_end = StepClock.on_step_end

        def stopped(clock: StepClock, args: Any, state: Any, control: Any, **named: Any) -> None:
            on_step_end(clock, args, state, control, **named)
            if clock.task == task and state.global_step == 3:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(StepClock, "on_step_end", stopped)
            result = sculpt(*words)
        assert result.exit_code == 130, result.output
        return result

    return run


@pytest.mark.usefixtures("one_thread")
def test_a_run_goes_on_from_any_working_directory_to_the_same_end(
    here: Path,
    toy_tasks: list[Task],
    write_task: Callable[[Task], Path],
    stop: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["tiny", "tasks", *WORDS, "--remember-text", "text.txt", "--ability", "text.txt", "--order"]
    assert sculpt(*words, "sounds,colours", "--output", "straight").exit_code == 0
    stopped = stop("colours", *words, "sounds,colours", "--output", "run")
    assert stopped.stderr.splitlines()[-1] == "stopped; sculpt train --output run --resume goes on"
    monkeypatch.chdir(here / "tasks")
    # A task that has come to lie beside the others is not of the run.
    third = write_task(replace(toy_tasks[0], name="again"))
    assert resumed("../run", "--eval-batch-size", "2").exit_code == 0
    result, straight = RunResult.load(here / "run"), RunResult.load(here / "straight")
    assert (result.tasks, result.config["eval_batch_size"]) == (["sounds", "colours"], 2)
    assert [task.losses for task in result.learned] == [task.losses for task in straight.learned]
    assert same_model(here / "run", here / "straight")
    # There is nothing to do.
    assert resumed("../run").exit_code == 0
    # One more task, in which it is stopped too; the same command goes on as well.
    stop("again", "--output", "../run", "--resume", "--add", "again")
    monkeypatch.chdir(here)
    assert resumed("run", "--add", third).exit_code == 0
    added = RunResult.load("run")
    # What was changed on the way stays so.
    assert (added.tasks, added.config["eval_batch_size"]) == (["sounds", "colours", "again"], 2)
    assert sculpt(*words, "sounds,colours,again", "--output", "three").exit_code == 0
    assert same_model(here / "run", here / "three")


@pytest.mark.usefixtures("here")
def test_what_a_run_was_started_with_is_not_changed(stop: Callable[..., Any]) -> None:
    stop("sounds", "tiny", "tasks", *WORDS, "--output", "run")
    kept = Path("run/settings.yaml").read_text()
    assert "resume: the run was started with lr=0.01, this one has 0.001" in refused(resumed("run", "--lr", "1e-3"))
    assert "add: got tasks/x without resume" in refused(sculpt("tiny", "tasks", "--output", "new", "--add", "tasks/x"))
    assert "add: got tasks/x with order" in refused(resumed("run", "--add", "tasks/x", "--order", "sounds"))
    assert "there is no folder tasks/x" in refused(resumed("run", "--add", "tasks/x"))
    assert Path("run/settings.yaml").read_text() == kept
    Path("run/settings.yaml").write_text("- 1\n")
    assert "resume: run/settings.yaml holds list" in refused(resumed("run"))


@pytest.mark.usefixtures("here")
def test_a_dry_run_shows_what_is_left_of_a_run(stop: Callable[..., Any]) -> None:
    start = ["tiny", "tasks", "--order", "colours,sounds", "--output", "run", *WORDS]
    whole = sculpt(*start, "--dry-run").stdout
    assert "resuming" not in whole
    stop("sounds", *start)
    before = sorted(path for path in Path("run").rglob("*"))
    shown = resumed("run", "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert "resuming task 2/2 sounds after step 2" in shown.stdout
    steps = {words[0]: int(words[3]) for words in map(str.split, shown.stdout.splitlines()[1:3])}
    assert steps == {"colours": 0, "sounds": 1}
    assert sorted(path for path in Path("run").rglob("*")) == before
    assert "resume: the run was started with lr=" in refused(resumed("run", "--dry-run", "--lr", "5"))
    assert resumed("run").exit_code == 0
    assert "resuming after the last task" in resumed("run", "--dry-run").stdout


@pytest.mark.usefixtures("here")
def test_a_setting_of_another_version_is_named(stop: Callable[..., Any]) -> None:
    stop("sounds", "tiny", "tasks", "--order", "colours,sounds", "--output", "run", *WORDS)
    kept = Path("run/settings.yaml")
    kept.write_text(kept.read_text() + "protekt: 0.5\n")
    wanted = "error: protekt: no such setting in run/settings.yaml, did you mean protect?"
    assert refused(resumed("run")) == wanted


@pytest.mark.usefixtures("here")
def test_what_is_no_run_is_said_to_be() -> None:
    for folder in ("nothing", "tasks"):
        assert f"resume: there is no run in {folder}, wanted its folder, or MODEL and TASKS" in refused(resumed(folder))
    assert "to go on with a run: sculpt train --output runs/mine --resume" in refused(sculpt("--resume", "runs/mine"))
    assert "to go on with a run: sculpt train --output RUN --resume" in refused(sculpt("--resume"))
    assert not Path("nothing").exists()


@pytest.mark.usefixtures("here")
def test_a_run_that_kept_no_settings_says_which_it_was_started_with(stop: Callable[..., Any]) -> None:
    words = ["tiny", "tasks", *WORDS, "--no-eval-options", "--targets", "*.q_proj.weight", "--targets", "*.mlp.*"]
    stop("sounds", *words, "--order", "colours,sounds", "--output", "run")
    Path("run/settings.yaml").unlink()
    complaint = refused(resumed("run"))
    assert "resume: run is of a version that kept no settings.yaml; wanted all that it was started with" in complaint
    command = shlex.split(complaint.partition("started with: ")[2])
    assert command[:2] == ["sculpt", "train"]
    assert sculpt(*command[2:]).exit_code == 0
    assert RunResult.load("run").complete
    assert resumed("run").exit_code == 0
    Path("run/settings.yaml").unlink()
    Path("run/run.json").write_text("{}")
    assert "run.json is damaged" in refused(resumed("run"))


@pytest.mark.parametrize(
    "change",
    [
        {"protect": 1 / 3, "save_every": None, "lr": 1e-5, "name": "mine: a test"},
        {"protect": Importance(0.1, 2 / 3), "remember": "rank:4", "others": "train", "bf16": True},
        {"protect": Energy(0.95), "targets": ["*.q_proj.weight", "*.mlp.*"], "task_epochs": [1, 2.5]},
        {"protect": Rank(4), "warmup_steps": 3, "sides": "right", "report_to": "tensorboard", "cpu": True},
        {"method": "ewc", "ewc_lambda": 1e-7, "max_steps": 7, "dev_items": 2},
    ],
)
def test_settings_are_kept_to_the_last_digit(change: dict[str, Any], here: Path) -> None:
    folders = [here / "tasks" / name for name in ("colours", "sounds")]
    config = TrainConfig(model="gpt2", tasks=["tasks"], output="run", **change)
    keep_settings(config)
    expected = replace(config, tasks=[str(folder) for folder in folders], resume=True)
    assert make_config(None, {"output": "run", "resume": True}) == expected
    # And the file is one for --config.
    assert make_config("run/settings.yaml", {"output": "run"}) == replace(expected, resume=False)


def test_tasks_that_are_no_folders_are_to_be_given_again(
    short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "learn", lambda run, index: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(TrainConfig(**short, output=tmp_path / "run"), quiet=True)
    assert "tasks: missing" in refused(resumed(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "state.json").read_text())["finished"] == []

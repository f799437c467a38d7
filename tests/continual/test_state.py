"""The state on disk: killed at any moment, damaged, of another run, with a task more, on a disk that is full."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sculpt_ops.continual import RunResult, Task, TrainConfig, learn, train, trainer
from sculpt_ops.continual.distributed import World

pytest.importorskip("transformers", reason="the trainer needs pip install sculpt-ops[train]")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("first", "save_every", "every"),
    [(0, 1, 2), (1, 1, 3), (1, None, 2)],
    ids=["new", "added to", "added to, not kept"],
)
def test_killed_at_any_moment_a_run_goes_on_to_the_same_end(
    first: int,
    save_every: int | None,
    every: int,
    short: dict[str, Any],
    toy_tasks: list[Task],
    write_task: Callable[[Task], Path],
    tmp_path: Path,
) -> None:
    tasks = [str(write_task(task)) for task in toy_tasks]
    settings = {
        **short,
        "model": str(short["model"]),
        "tasks": tasks,
        "save_every": save_every,
        "eval_items": 1,
        "group_by_length": True,
    }
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    # Forked processes of a parent that has threads may hang.
    alone = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    script, given = Path(__file__).with_name("kill_moments.py"), tmp_path / "settings.json"
    command = [sys.executable, script, given, tmp_path, str(every), str(first)]
    ended = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    straight, *killed = map(json.loads, ended.stdout.splitlines())
    # Both tasks pass by the same moments, an odd number of them: every second one has each kind of them.
    assert len(killed) >= (8 if first else 21)
    for run in killed:
        assert run["died"], run
        for figure in ("weights", "answers", "ranks", "losses"):
            assert run[figure] == straight[figure], (run["moment"], figure, ended.stderr[-4000:])
        assert run["files"] == ["carried", "model", "predictions.jsonl", "run.json", "settings.yaml", "state.json"]


@pytest.fixture
def cut_short(short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """The settings of a run that was interrupted at `moment`: before the second task, or after its second step."""

    def make(moment: str = "task", **change: Any) -> dict[str, Any]:
        from sculpt_ops.continual.hf_trainer import StepClock

        settings = {**short, "output": tmp_path / "out", "save_every": 1, **change}
        original, on_step_end = trainer.learn, StepClock.on_step_end
        begun: list[int] = []

        def stop_before(run: Any, index: int) -> None:
            begun.append(index)
            if moment == "task" and index == 1:
                raise InterruptedError
            original(run, index)

        def stop_after(clock: StepClock, args: Any, state: Any, control: Any, **named: Any) -> None:
            on_step_end(clock, args, state, control, **named)
            if begun == [0, 1] and state.global_step == 3:
                raise InterruptedError

        with monkeypatch.context() as patch:
            patch.setattr(trainer, "learn", stop_before)
            patch.setattr(StepClock, "on_step_end", stop_after)
            with pytest.raises(InterruptedError):
                train(TrainConfig(**settings), quiet=True)
        return {**settings, "resume": True}

    return make


def resumed(settings: dict[str, Any], **change: Any) -> RunResult:
    return train(TrainConfig(**{**settings, **change}), quiet=True)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


def test_a_finished_task_is_not_trained_again_by_default(
    short: dict[str, Any], cut_short: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = cut_short(save_every=0)
    state = json.loads((tmp_path / "out" / "state.json").read_text())
    assert (state["finished"], len(state["accuracy"])) == (["colours"], 2)
    trained: list[int] = []
    monkeypatch.setattr(trainer, "learn", lambda run, index: (trained.append(index), learn.learn(run, index)))
    end = resumed(settings)
    assert trained == [1]
    straight = train(TrainConfig(**short, output=tmp_path / "straight"), quiet=True)
    assert end.predictions == straight.predictions
    one, other = weights(tmp_path / "out"), weights(tmp_path / "straight")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_without_states_a_run_starts_over(cut_short: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    settings = cut_short(save_every=None)
    assert not (tmp_path / "out" / "checkpoint").exists()
    assert resumed(settings).complete


@pytest.mark.parametrize(
    ("moment", "damaged", "complaint"),
    [
        ("task", "task-2/start/weights/*.safetensors", r"has \d+ bytes of \d+; remove .*start to go on from"),
        ("step", "task-2/step-2/scheduler.pt", r"step-2/scheduler\.pt is missing; remove .*step-2 to go on from"),
        ("step", "task-2/step-2/manifest.json", "step-2 is incomplete"),
    ],
)
def test_a_damaged_state_is_named_and_the_one_before_is_used(
    moment: str, damaged: str, complaint: str, cut_short: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    settings = cut_short(moment)
    (path,) = (tmp_path / "out" / "checkpoint").glob(damaged)
    if path.suffix == ".safetensors":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()
    with pytest.raises(ValueError, match=complaint):
        resumed(settings)
    if moment == "step":
        shutil.rmtree(path.parent)
        assert resumed(settings).complete


@pytest.mark.parametrize("name", ["run.json", "predictions.jsonl"])
def test_results_that_are_damaged_are_those_of_the_last_state(
    name: str, cut_short: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    settings = cut_short("step")
    file = tmp_path / "out" / name
    file.write_bytes(file.read_bytes()[:-40])
    end = resumed(settings)
    assert end.complete
    assert [task.name for task in RunResult.load(tmp_path / "out").learned] == [task.name for task in end.learned]


def test_a_state_that_is_gone_is_said_to_be(cut_short: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    settings = cut_short()
    shutil.rmtree(tmp_path / "out" / "checkpoint")
    with pytest.raises(ValueError, match="results of 1 tasks, but the state they left is gone"):
        resumed(settings)


def test_other_weights_or_rows_are_refused(
    cut_short: Callable[..., dict[str, Any]], toy_tasks: list[Task], model_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(model_folder, tmp_path / "model")
    settings = cut_short(model=model)
    changed = [replace(toy_tasks[0], train=toy_tasks[0].train[1:]), toy_tasks[1]]
    with pytest.raises(ValueError, match="resume: the rows of task colours are not those"):
        resumed(settings, tasks=changed)
    with pytest.raises(ValueError, match="started with the tasks colours, sounds, wanted the same, or more"):
        resumed(settings, tasks=toy_tasks[::-1])
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="resume: the run was started from other weights"):
        resumed(settings)
    (tmp_path / "out" / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state\.json is damaged"):
        resumed(settings)


@pytest.mark.parametrize("finished", [True, False])
def test_a_task_is_added(
    finished: bool,
    short: dict[str, Any],
    toy_tasks: list[Task],
    cut_short: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    third = replace(toy_tasks[0], name="again")
    settings = {**short, "output": tmp_path / "out", "resume": True}
    if finished:
        train(TrainConfig(**settings), quiet=True)
    else:
        settings = cut_short("step")
    result = resumed(settings, tasks=[*toy_tasks, third])
    assert (result.tasks, len(result.learned)) == (["colours", "sounds", "again"], 3)
    measured = {(row, task.name) for row in range(4) for task in (*toy_tasks, third)}
    # Rows before the task was known do not have it, but for what the first weights and the last ones answer.
    absent = {(1, "again")} if finished else set()
    assert {(p.row, p.task) for p in result.predictions} == measured - absent
    straight = train(TrainConfig(**{**short, "tasks": [*toy_tasks, third]}, output=tmp_path / "straight"), quiet=True)
    expected = {(p.row, p.task, p.item): p.prediction for p in straight.predictions if (p.row, p.task) not in absent}
    assert {(p.row, p.task, p.item): p.prediction for p in result.predictions} == expected
    one, other = weights(tmp_path / "out"), weights(tmp_path / "straight")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def moments_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, Path]]]:
    """Trains, and copies the output once everything is learned and measured, whenever a folder is about to get its name
    or is half removed: what a kill would leave there. Every such change and its copy."""

    def make(settings: dict[str, Any]) -> list[tuple[str, Path]]:
        moments: list[tuple[str, Path]] = []
        measure, replace_, rmtree = trainer.measure_abilities, Path.replace, shutil.rmtree

        def keep(name: str) -> None:
            moments.append((name, shutil.copytree(settings["output"], tmp_path / f"killed-{len(moments)}")))

        def watched_replace(path: Path, target: Path) -> Path:
            if path.is_dir():
                keep(f"{path.name} to {target.name}")
            return replace_(path, target)

        def watched_rmtree(path: Path, *arguments: Any, **named: Any) -> None:
            if path.exists():
                files = sorted(file for file in path.rglob("*") if file.is_file())
                for file in files[: len(files) // 2]:
                    file.unlink()
                keep(f"half of {path.name}")
            rmtree(path, *arguments, **named)

        with monkeypatch.context() as patch:

            def watched_measure(run: Any, when: str) -> None:
                measure(run, when)
                if when == "after":
                    patch.setattr(Path, "replace", watched_replace)
                    patch.setattr(shutil, "rmtree", watched_rmtree)

            patch.setattr(trainer, "measure_abilities", watched_measure)
            train(TrainConfig(**settings), quiet=True)
        return moments

    return make


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("first", [0, 1], ids=["new", "added to"])
def test_killed_at_its_end_without_states_a_run_takes_up_another_task(
    first: int,
    short: dict[str, Any],
    toy_tasks: list[Task],
    moments_at_the_end: Callable[..., list[tuple[str, Path]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks = [*toy_tasks, replace(toy_tasks[0], name="again")]
    quick = {**short, "max_steps": 2, "eval_items": 1, "eval_options": False, "save_every": None, "resume": True}
    train(TrainConfig(**{**quick, "tasks": tasks}, output=tmp_path / "straight"), quiet=True)
    expected, whole = weights(tmp_path / "straight"), sorted(path.name for path in (tmp_path / "straight").iterdir())
    if first:
        train(TrainConfig(**{**quick, "tasks": tasks[:first]}, output=tmp_path / "out"), quiet=True)
    moments = moments_at_the_end({**quick, "tasks": tasks[:2], "output": tmp_path / "out"})
    named = ["carried.next.tmp to carried.next", "model.tmp to model", "carried.next to carried"]
    if first:
        named[1:2] = ["model to model.old", "model.tmp to model", "half of model.old", "half of carried"]
    assert [name for name, _ in moments] == named
    trained: list[int] = []
    monkeypatch.setattr(trainer, "learn", lambda run, index: (trained.append(index), learn.learn(run, index)))
    for moment, (name, output) in enumerate([*moments, ("", tmp_path / "out")]):
        trained.clear()
        resumed({**quick, "output": output}, tasks=tasks)
        # From the new model as soon as that has its name, and until then from the one before, if there was one.
        assert trained == ([2] if moment > named.index("model.tmp to model") else [*range(first, 3)]), name
        ended = weights(output)
        assert all(torch.equal(expected[name], ended[name]) for name in expected), name
        assert sorted(path.name for path in output.iterdir()) == whole


def test_on_a_full_disk_the_last_state_stays(
    short: dict[str, Any], cut_short: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    settings = cut_short()
    before = sorted(path for path in (tmp_path / "out" / "checkpoint").rglob("*") if path.is_file())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write .*task-2.* What was saved before is whole"):
            resumed(settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path for path in before if not path.exists()] == []
    assert resumed(settings).complete


def test_a_finished_run_is_not_taken_for_another(
    short: dict[str, Any], toy_tasks: list[Task], tmp_path: Path, t5_folder: Path
) -> None:
    settings = {**short, "output": tmp_path / "out", "resume": True}
    done = train(TrainConfig(**settings), quiet=True)
    assert resumed(settings).predictions == done.predictions
    for change, complaint in (
        ({"method": "ewc", "protect": None, "remember": None}, "resume: the run was started with"),
        ({"model": t5_folder}, "resume: the run was started with model="),
        ({"tasks": [replace(toy_tasks[0], metric="rouge-l", options=None), toy_tasks[1]]}, "the rows of task colours"),
    ):
        with pytest.raises(ValueError, match=complaint):
            resumed(settings, **change)
    for name in ("model.safetensors", "config.json"):
        kept = (tmp_path / "out" / "model" / name).read_bytes()
        (tmp_path / "out" / "model" / name).write_bytes(kept[: len(kept) // 2])
        with pytest.raises(ValueError, match=r"resume: .*model is damaged .*; its results are in the folder beside it"):
            resumed(settings)
        (tmp_path / "out" / "model" / name).write_bytes(kept)
    (tmp_path / "out" / "state.json").unlink()
    third = replace(toy_tasks[0], name="again")
    with pytest.raises(ValueError, match=r"state\.json is missing"):
        resumed(settings, tasks=[*toy_tasks, third])


def test_what_is_missing_of_a_state_is_named(
    short: dict[str, Any], toy_tasks: list[Task], cut_short: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    settings = cut_short("step")
    task = tmp_path / "out" / "checkpoint" / "task-2"
    for name, complaint in (
        ("subspaces.safetensors", r"subspaces\.safetensors is missing"),
        ("setup.json", r"setup\.json is damaged"),
        ("start/subspaces.safetensors", r"start.subspaces\.safetensors is missing; nothing goes on without it"),
    ):
        kept = (task / name).read_bytes()
        (task / name).unlink()
        with pytest.raises(ValueError, match=complaint):
            resumed(settings)
        (task / name).write_bytes(kept)
    (task / "setup.json").write_text("{")
    with pytest.raises(ValueError, match=r"setup\.json is damaged .*; remove .*task-2.step-\* to go on from"):
        resumed(settings)
    for step in task.glob("step-*"):  # as the advice says
        shutil.rmtree(step)
    assert resumed(settings).complete
    shutil.rmtree(tmp_path / "out" / "carried")
    with pytest.raises(ValueError, match=r"carried is incomplete, .* one more task cannot go on without it"):
        resumed(settings, tasks=[*toy_tasks, replace(toy_tasks[0], name="again")])


def test_on_a_full_disk_the_last_model_stays(
    short: dict[str, Any], toy_tasks: list[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**short, "output": tmp_path / "out", "save_every": None, "resume": True}
    train(TrainConfig(**settings), quiet=True)
    before = weights(tmp_path / "out")
    saved = type(trainer.open_for_training(TrainConfig(**settings), World(torch.device("cpu")))[0])

    def full(*args: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved, "save_pretrained", full)
    with pytest.raises(
        OSError, match=r"output: cannot write .*model: .*make room, then sculpt train --output .*out --resume"
    ):
        resumed(settings, tasks=[*toy_tasks, replace(toy_tasks[0], name="again")])
    after = weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)

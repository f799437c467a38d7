"""The trainer on several ranks: equal to one, restarted, resumed on another number of them, refused; real processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sculpt_ops.continual import RunResult, Task, TrainConfig, train
from sculpt_ops.continual.checkpoint import check_same_run
from sculpt_ops.continual.distributed import parallel_mode

pytest.importorskip("transformers", reason="the trainer needs pip install sculpt-ops[train]")

ROOT = Path(__file__).resolve().parents[2]
# Rows of an optimizer step, whatever the number of ranks; 8 steps a task.
ROWS = 8
SETTINGS: dict[str, Any] = {
    "lr": 1e-3,
    "weight_decay": 0.1,
    "epochs": 4,
    "max_length": 64,
    "eval_items": 5,
    "eval_batch_size": 2,
    "save_every": 3,
    "cpu": True,
    "ddp_timeout": 60,
}
# A launcher's own variables would make a process of this test one of its ranks.
CLEAN = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def run(arguments: list[Any], **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=CLEAN | environment, capture_output=True, text=True, timeout=240, check=False
    )


def torchrun(jobs: list[dict[str, Any]], folder: Path, processes: int, restarts: int = 0) -> None:
    """Run `jobs` of train_ranks.py one after the other on as many processes."""
    file = folder / f"jobs-{processes}.json"
    file.write_text(json.dumps(jobs))
    options = ["--standalone", "--nproc-per-node", processes, "--max-restarts", restarts]
    ended = run(["-m", "torch.distributed.run", *options, Path(__file__).with_name("train_ranks.py"), file])
    assert ended.returncode == 0, ended.stderr[-6000:]
    assert ("SIGKILL" in ended.stderr or "exitcode: -9" in ended.stderr) == any("kill" in job for job in jobs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def config(folder: Path, model_folder: Path, t5_folder: Path, toy_tasks: list[Task]) -> Callable[..., dict[str, Any]]:
    """Settings of a run on `processes` ranks, as JSON can hold them."""
    tasks = []
    for task in toy_tasks:
        tasks.append(str(folder / "tasks" / task.name))
        Path(tasks[-1]).mkdir(parents=True)
        for part, rows in (("train", task.train), ("test", task.test)):
            lines = [json.dumps({"prompt": row.prompt, "answer": row.answer}) for row in rows]
            (Path(tasks[-1]) / f"{part}.jsonl").write_text("\n".join(lines) + "\n")

    def make(output: str, processes: int = 1, *, t5: bool = False, **settings: Any) -> dict[str, Any]:
        model, rows = str(t5_folder if t5 else model_folder), {"batch_size": ROWS // processes}
        return {"model": model, "tasks": tasks, "output": str(folder / output)} | SETTINGS | rows | settings

    return make


@pytest.fixture(scope="module")
def one(config: Callable[..., dict[str, Any]]) -> Callable[..., Path]:
    """The output of a run in this process, without a launcher."""

    def train_alone(output: str, **settings: Any) -> Path:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        result = train(TrainConfig(**config(output, **settings)), quiet=True)
        torch.set_num_threads(threads)
        return Path(result.output)

    return train_alone


@pytest.fixture(scope="module")
def two(folder: Path, config: Callable[..., dict[str, Any]]) -> Path:
    """Every kind of run on two ranks, from one launch. The last loses a rank in its second task, after the fifth step;
    the state after the third is what it is started again from."""
    jobs: list[dict[str, Any]] = [
        {"config": config("two", 2)},
        {"config": config("two-t5", 2, t5=True, gradient_accumulation_steps=2, batch_size=ROWS // 4)},
        {"config": config("two-ddp", 2, parallel="ddp", **GENERATED)},
        {"config": config("two-options", 2, **OPTIONS)},
        {"config": config("two-killed", 2), "kill": [1, 2, 5], "keep": str(folder / "cut-short")},
    ]
    torchrun(jobs, folder, 2, restarts=1)
    return folder


OPTIONS = {
    "protect": 0.25,
    "state": "subspace",
    "others": "freeze",
    "gradient_checkpointing": True,
    "max_grad_norm": 0.0,
}
# The first rank writes the text.
GENERATED = {"remember_text": "generated"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def assert_same_training(a: Path, b: Path, start: Path) -> None:
    """The change of every weight is the same to fp32 rounding, which Adam's first steps magnify where a gradient is
    next to nothing; losses to 1e-4, subspaces and answers altogether."""
    before, first, second = weights(start), weights(a / "model"), weights(b / "model")
    assert before.keys() == first.keys() == second.keys()
    for name, weight in before.items():
        assert (first[name] - second[name]).norm() <= 2e-3 * (first[name] - weight).norm(), name
    assert_same_figures(a, b, 1e-4)


def assert_same_figures(a: Path, b: Path, tolerance: float) -> None:
    first, second = RunResult.load(a), RunResult.load(b)
    assert first.predictions == second.predictions
    for task, other in zip(first.learned, second.learned, strict=True):
        assert task.steps == other.steps == len(task.step_seconds) == len(other.step_seconds)
        assert [step for step, _ in task.losses] == [step for step, _ in other.losses]
        losses = [loss for _, loss in task.losses]
        assert losses == pytest.approx([loss for _, loss in other.losses], rel=tolerance)
        assert {name: layer["rank"] for name, layer in task.layers.items()} == {
            name: layer["rank"] for name, layer in other.layers.items()
        }
        for leak in (*task.leak.values(), *other.leak.values()):
            assert leak < 1e-4
        assert [step for step, _, _ in task.leak_over_time] == [step for step, _, _ in other.leak_over_time]


@pytest.mark.parametrize(
    ("name", "settings"),
    [("two", {}), ("two-t5", {"t5": True}), ("two-ddp", GENERATED), ("two-options", OPTIONS)],
    ids=["llama", "t5", "ddp", "options"],
)
def test_ranks_train_as_one_process_does(
    name: str, settings: dict[str, Any], two: Path, one: Callable[..., Path], model_folder: Path, t5_folder: Path
) -> None:
    start = t5_folder if "t5" in settings else model_folder
    assert_same_training(one(f"one-{name}", **settings), two / name, start)


def test_a_killed_rank_costs_nothing_but_time(two: Path) -> None:
    assert (two / "cut-short" / "checkpoint" / "task-2" / "step-3").is_dir()
    straight, restarted = weights(two / "two" / "model"), weights(two / "two-killed" / "model")
    for name, weight in straight.items():
        assert torch.equal(weight, restarted[name]), name
    assert_same_figures(two / "two", two / "two-killed", 0.0)
    for output in ("two", "two-killed"):
        files = sorted(path.name for path in (two / output).iterdir())
        assert files == ["carried", "model", "predictions.jsonl", "run.json", "settings.yaml", "state.json"]


def test_a_state_of_two_ranks_goes_on_elsewhere(
    two: Path, config: Callable[..., dict[str, Any]], one: Callable[..., Path], model_folder: Path
) -> None:
    for output in ("four", "alone"):
        shutil.copytree(two / "cut-short", two / output)
    torchrun([{"config": config("four", 4, resume=True)}], two, 4)
    assert_same_training(two / "two", two / "four", model_folder)
    assert_same_training(two / "two", one("alone", resume=True), model_folder)


def test_a_task_is_added_where_what_is_carried_on_has_not_got_its_name(
    two: Path, config: Callable[..., dict[str, Any]], one: Callable[..., Path], model_folder: Path
) -> None:
    """As processes killed right after their model had got its name leave it."""
    jobs = []
    tasks = [*config("two")["tasks"], str(shutil.copytree(two / "tasks" / "colours", two / "tasks" / "again"))]
    settings = {"tasks": tasks, "save_every": None, "resume": True}
    for output in ("added-alone", "added", "added-killed"):
        shutil.copytree(two / "two", two / output)
        jobs.append({"config": config(output, 2, **settings)})
    killed = two / "added-killed"
    (killed / "carried").rename(killed / "carried.next")
    torchrun(jobs[1:], two, 2)
    straight, resumed = weights(two / "added" / "model"), weights(killed / "model")
    assert all(torch.equal(weight, resumed[name]) for name, weight in straight.items())
    assert json.loads((killed / "carried" / "tasks.json").read_text()) == ["colours", "sounds", "again"]
    assert not (killed / "carried.next").exists()
    assert_same_training(two / "added", one("added-alone", **settings), model_folder)


def test_a_finished_run_is_not_run_again(two: Path, config: Callable[..., dict[str, Any]]) -> None:
    before = (two / "two" / "run.json").stat().st_mtime_ns
    assert train(TrainConfig(**config("two", resume=True)), quiet=True) == RunResult.load(two / "two")
    assert (two / "two" / "run.json").stat().st_mtime_ns == before


def test_what_is_resumed_is_the_same_run(two: Path, config: Callable[..., dict[str, Any]]) -> None:
    shutil.copytree(two / "cut-short", two / "other")
    for change, message in (
        ({"lr": 1e-4}, "resume: the run was started with lr=0.001, this one has 0.0001"),
        ({"batch_size": 3}, "8 rows an optimizer step"),
    ):
        with pytest.raises(ValueError, match=message):
            train(TrainConfig(**config("other", resume=True, **change)), quiet=True)
    (two / "other" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        train(TrainConfig(**config("other", resume=True)), quiet=True)
    with pytest.raises(FileExistsError, match="not empty"):
        train(TrainConfig(**config("two")), quiet=True)


def test_settings_of_a_batch_may_be_split_differently() -> None:
    saved = {"lr": 1e-3, "batch_size": 8, "gradient_accumulation_steps": 1, "rows_per_step": 8}
    check_same_run(saved, saved | {"batch_size": 2, "gradient_accumulation_steps": 2, "processes": 2})


def test_half_a_state_is_passed_over(
    two: Path, config: Callable[..., dict[str, Any]], one: Callable[..., Path]
) -> None:
    """As a process killed while it writes leaves it."""
    shutil.copytree(two / "cut-short", two / "torn")
    checkpoint = two / "torn" / "checkpoint"
    (checkpoint / "task-2" / "step-6.tmp").mkdir()
    (checkpoint / "task-3.tmp" / "step-0.tmp").mkdir(parents=True)
    torn = one("torn", resume=True)
    assert len(RunResult.load(torn).learned) == 2
    assert not checkpoint.exists()


def test_a_peer_that_never_comes(model_folder: Path, tmp_path: Path) -> None:
    group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    options = ["--output", tmp_path / "out", "--cpu", "--ddp-timeout", 2]
    ended = run(["-m", "sculpt_ops", "train", model_folder, tmp_path, *options], **group)
    assert ended.returncode == 1
    assert "error: rank 0 of 2 found no group of 2 processes within 2 s (ddp_timeout)" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_accelerate_has_no_fsdp_on_cpus(model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    launch = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "examples" / "distributed" / "fsdp2.yaml"]
    options = ["--num_processes", 2, "--main_process_port", 0, "-m", "sculpt_ops", "train", model_folder, tmp_path]
    ended = run([*launch, *options, "--output", tmp_path / "out", "--cpu"])
    assert ended.returncode != 0
    message = "error: accelerate was configured for FSDP, which it has on GPUs only"
    # Of each process, unless the launcher ends the second before it has come to it.
    assert message in ended.stderr, ended.stderr[-4000:]
    assert not (tmp_path / "out").exists()


ACCELERATE = {"RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "no"}
FSDP2 = ACCELERATE | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("environment", "parallel", "expected"),
    [
        ({}, None, None),
        ({"RANK": "0", "WORLD_SIZE": "2"}, None, "fsdp"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "ddp", "ddp"),
        (ACCELERATE, None, "ddp"),
        (ACCELERATE, "ddp", "ddp"),
        (FSDP2, None, "fsdp"),
        (FSDP2, "fsdp", "fsdp"),
    ],
)
def test_the_launcher_decides(
    environment: dict[str, str], parallel: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert parallel_mode(TrainConfig("m", ["t"], "o", parallel=parallel), cuda=True) == expected


@pytest.mark.parametrize(
    ("environment", "settings", "cuda", "message"),
    [
        ({}, {"parallel": "fsdp"}, True, "one process"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, True, "one process"),
        ({"PMI_SIZE": "2"}, {}, True, "PMI_SIZE: got 2 processes, but no RANK"),
        (ACCELERATE, {"parallel": "fsdp"}, True, "configured to run without it"),
        (FSDP2, {"parallel": "ddp"}, True, "configured for FSDP"),
        (FSDP2, {}, False, "on GPUs only"),
        (FSDP2 | {"ACCELERATE_USE_CPU": "true"}, {}, True, "on GPUs only"),
        (FSDP2 | {"FSDP_VERSION": "1"}, {}, True, "fsdp_version: got 1"),
        (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, {}, True, "fsdp_offload_params"),
        (FSDP2, {"fuse_backward": True, "max_grad_norm": 0}, True, "fuse_backward"),
    ],
)
def test_something_else_than_was_asked_for_is_refused(
    environment: dict[str, str], settings: dict[str, Any], cuda: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        parallel_mode(TrainConfig("m", ["t"], "o", **settings), cuda)

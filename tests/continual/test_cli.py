"""The command line: what it does, and one line for every wrong use."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sculpt_ops.continual import RunResult, Task

pytest.importorskip("typer", reason="the command line needs pip install sculpt-ops[train]")
from typer.testing import CliRunner

from sculpt_ops.continual.cli import app

BFLOAT16 = ["--dtype", "bfloat16", "--master", "split"]
QUICK = ["--max-steps", "2", "--eval-items", "3", "--max-length", "64", "--lr", "1e-2", "--cpu", "--quiet"]


def sculpt(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Any) -> str:
    """The one line of a wrong use."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert isinstance(result.exception, SystemExit)
    return lines[0]


@pytest.fixture
def tasks(write_task: Callable[[Task], Path], toy_tasks: list[Task]) -> Path:
    folders = [write_task(task) for task in toy_tasks]
    return folders[0].parent


def test_train_and_report(model_folder: Path, tasks: Path, tmp_path: Path) -> None:
    plain, protected = tmp_path / "plain", tmp_path / "protected"
    first = sculpt("train", model_folder, tasks, "--output", plain, "--protect", "none", *QUICK)
    assert first.exit_code == 0, first.output
    assert first.stdout.splitlines()[-1] == str(plain / "report.md")
    second = sculpt(
        *("train", model_folder, tasks / "sounds", tasks / "colours", "--output", protected, "--protect", "rank:3"),
        *("--sides", "right", "--targets", "*.q_proj.weight", "--targets", "*.mlp.*.weight", "--name", "mine"),
        *(
            "--order",
            "colours, sounds",
            "--zero-shot",
            plain,
            *QUICK,
            "--state",
            "subspace",
            "--basis-dtype",
            "bfloat16",
        ),
        *("--moment-dtype", "bfloat16", "--decay-to", "start", "--fuse-backward", "--max-grad-norm", "0"),
        *("--leak-every", "1"),
    )
    assert second.exit_code == 0, second.output
    result = RunResult.load(protected)
    assert (result.name, result.tasks) == ("mine", ["colours", "sounds"])
    assert {layer["rank"] for task in result.learned for layer in task.layers.values()} == {3}
    assert len(result.learned[0].layers) == 8
    assert [task.steps for task in result.learned] == [2, 2]
    options = {
        name: result.config[name] for name in ("state", "basis_dtype", "moment_dtype", "decay_to", "fuse_backward")
    }
    assert [*options.values()] == ["subspace", "bfloat16", "bfloat16", "start", True]
    assert [[step for step, _, _ in task.leak_over_time] for task in result.learned] == [[1, 2], [1, 2]]
    assert "](leak.png)" in (protected / "report.md").read_text()
    compared = sculpt("report", plain, protected, "--output", tmp_path / "both")
    assert compared.exit_code == 0, compared.output
    assert "Difference from plain" in (tmp_path / "both" / "report.md").read_text()
    again = f"not empty; sculpt train --output {plain} --resume goes on with its run, or name a new folder"
    assert again in refused(sculpt("train", model_folder, tasks, "--output", plain, *QUICK))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--protect", "lots"], "protect: got 'lots', wanted a share from 0 to 1 as 0.5, or rank:64"),
        (["--protect", "1.5"], "protect: got '1.5', wanted a share from 0 to 1"),
        (["--sides", "top"], "sides must be one of both, left, right, block"),
        (["--lr", "0"], "lr: got 0.0, wanted more than 0"),
        (["--state", "half"], "state: got 'half', wanted one of full, subspace"),
        (["--master", "split"], "master: got 'split' with dtype 'float32', wanted dtype bfloat16"),
        (["--fuse-backward"], "fuse_backward: got True with max_grad_norm 1.0"),
        (["--order", "colours,smells"], "order: no task smells"),
        (["--targets", "*.nothing"], "'*.nothing' matches no parameter"),
        (["--method", "plain", "--protect", "0.5"], "protect: got 0.5 with method 'plain', which has no use for it"),
        (["--method", "lora", "--remember", "inputs:0.9"], "remember: got 'inputs:0.9' with method 'lora', which has"),
        (["--zero-shot", "nowhere"], "nowhere holds no run of `sculpt train`"),
        (["--lr-scheduler-type", "sideways"], "sideways"),
    ],
)
def test_wrong_settings(options: list[str], complaint: str, model_folder: Path, tasks: Path, tmp_path: Path) -> None:
    result = sculpt("train", model_folder, tasks, "--output", tmp_path / "out", *QUICK, *options)
    assert complaint in refused(result)
    assert not (tmp_path / "out").exists()


def test_wrong_folders(model_folder: Path, tasks: Path, tmp_path: Path) -> None:
    out = ["--output", tmp_path / "out", *QUICK]
    assert "there is no folder" in refused(sculpt("train", tmp_path / "nothing", tasks, *out))
    assert "there is no folder" in refused(sculpt("train", model_folder, tmp_path / "nothing", *out))
    assert "is no task folder and holds none" in refused(sculpt("train", model_folder, model_folder, *out))
    assert "holds no run" in refused(sculpt("report", tasks, "--output", tmp_path / "report"))
    assert not (tmp_path / "report").exists()


def test_a_missing_option_is_a_usage_error(model_folder: Path, tasks: Path) -> None:
    result = sculpt("train", model_folder, tasks)
    assert result.exit_code == 2
    assert "--output" in result.stderr


def test_a_run_that_diverges_ends_with_code_1(model_folder: Path, tasks: Path, tmp_path: Path) -> None:
    options = [*QUICK, "--lr", "1e30", "--max-grad-norm", "0", "--max-steps", "4"]
    result = sculpt("train", model_folder, tasks, "--output", tmp_path / "out", *options)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: task colours: the loss is nan")


def test_the_figure_said_at_the_end_is_one_that_the_method_has(model_folder: Path, tasks: Path, tmp_path: Path) -> None:
    loud = [option for option in QUICK if option != "--quiet"]
    for method, kind in (("per-task", "learning accuracy"), ("multitask", "average accuracy")):
        result = sculpt("train", model_folder, tasks, "--output", tmp_path / method, "--method", method, *loud)
        assert result.exit_code == 0, result.output
        assert result.stderr.splitlines()[-1].startswith(f"{kind} ")
        metrics = RunResult.load(tmp_path / method).metrics
        assert (metrics.average_accuracy.value == metrics.average_accuracy.value) == (method == "multitask")


def test_inspect_shows_what_would_be_protected(model_folder: Path) -> None:
    result = sculpt("inspect", model_folder, "--protect", "0.25", "--targets", "*.mlp.*.weight")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["layer", "number", "shape", "rank", "energy", "left", "right"]
    assert [line[:6] for line in lines[1:4]] == [
        ["model.layers.*.mlp.gate_proj.weight", "2", "64", "x", "32", "8"],
        ["model.layers.*.mlp.up_proj.weight", "2", "64", "x", "32", "8"],
        ["model.layers.*.mlp.down_proj.weight", "2", "32", "x", "64", "8"],
    ]
    every = sculpt("inspect", model_folder, "--protect", "0.25", "--targets", "*.mlp.*.weight", "--all").stdout
    assert "model.layers.1.mlp.down_proj.weight  32 x 64  8 " in every
    # The same lines after the table.
    assert every.splitlines()[7:] == result.stdout.splitlines()[4:]
    assert "NOT protected" in result.stdout
    assert "nothing to inspect" in refused(sculpt("inspect", model_folder, "--protect", "none"))
    for text in ("importance", "schedule"):
        assert f"got {text}, which depends on tasks" in refused(sculpt("inspect", model_folder, "--protect", text))
    assert sculpt("inspect", model_folder, "--protect", "schedule:2:5").exit_code == 0


def test_inspect_needs_no_tokenizer(model_folder: Path, tasks: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((model_folder / name).read_bytes())
    assert sculpt("inspect", bare).output == sculpt("inspect", model_folder).output
    assert "it has no tokenizer that transformers can open" in refused(
        sculpt("train", bare, tasks, "--output", tmp_path / "run", *QUICK)
    )


def test_a_run_that_is_stopped_says_how_to_go_on(
    model_folder: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sculpt_ops.continual import trainer

    learn, output = trainer.learn, tmp_path / "run"

    def stop(run: Any, index: int) -> None:
        if index == 1:
            raise KeyboardInterrupt
        learn(run, index)

    monkeypatch.setattr(trainer, "learn", stop)
    command = ("train", model_folder, tasks, "--output", output, *QUICK)
    stopped = sculpt(*command)
    assert stopped.exit_code == 130
    resume = ("train", "--output", output, "--resume")
    goes_on = " ".join(map(str, ("sculpt", *resume, "goes on")))
    assert stopped.stderr == f"stopped; {goes_on}\n"
    assert f"the run stopped after 1 of 2 tasks; {goes_on}" in refused(sculpt("report", output))
    assert f"{goes_on} with its run" in refused(sculpt(*command))
    monkeypatch.undo()
    again = sculpt(*resume)
    assert again.exit_code == 0, again.output
    assert f"the model is in {output}/model" in again.stderr


def test_what_protects_less_than_it_seems_is_said(model_folder: Path, tasks: Path, tmp_path: Path) -> None:
    start = ("train", model_folder, tasks, "--output", tmp_path / "run", *QUICK)
    assert "protect: got 0 with remember none, which protects nothing" in refused(sculpt(*start, "--protect", "0"))
    half = sculpt(*start, "--protect", "0.5", "--dtype", "bfloat16", "--dry-run")
    assert "each step is rounded to them" in half.output
    assert "use --master split" in half.output
    assert "rounded" not in sculpt(*start, "--protect", "0.5", *BFLOAT16, "--dry-run").output
    assert "there is no run in" in sculpt(*start[:-1], "--resume").stderr
    everything = sculpt(*start[:4], tmp_path / "all", *QUICK[:-1], "--protect", "rank:64")
    assert "have no free direction left and are not trained: model.layers.0" in everything.stderr


def test_the_version_is_shown() -> None:
    import sculpt_ops

    assert sculpt("--version").output == f"sculpt-ops {sculpt_ops.__version__}\n"


def test_doctor_names_versions_and_ops() -> None:
    result = sculpt("doctor")
    assert result.exit_code == 0, result.output
    for word in ("python", "torch", "built", "ops on CPU", "transformers"):
        assert word in result.stdout


def test_help_lists_the_commands() -> None:
    result = sculpt("--help")
    assert result.exit_code == 0
    for command in ("train", "report", "inspect", "doctor"):
        assert command in result.stdout


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_without_typer_the_way_to_get_it_is_said() -> None:
    done = run_python(
        "import sys, runpy; sys.modules['typer'] = None; sys.argv = ['sculpt', 'doctor'];"
        "runpy.run_module('sculpt_ops', run_name='__main__')"
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "sculpt needs typer: pip install sculpt-ops[train]"


def test_python_m_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "sculpt_ops", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "sculpt" in done.stdout
    assert "inspect" in done.stdout


def test_the_command_line_starts_without_the_heavy_packages() -> None:
    done = run_python(
        "import sys; import sculpt_ops.continual.cli, sculpt_ops.continual;"
        "print([name for name in ('transformers', 'matplotlib', 'accelerate') if name in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_help_and_a_mistyped_path_do_not_wait_for_what_they_do_not_need(tmp_path: Path) -> None:
    program = """
import sys
from typer.testing import CliRunner
from sculpt_ops.continual.cli import app

assert CliRunner().invoke(app, ["train", "--help"]).exit_code == 0
for words in (["nowhere"], [".", "--ability", "nofile.txt"], [".", "--remember-text", "nofile.txt"]):
    ended = CliRunner().invoke(app, ["train", "model", *words, "--output", "out"])
    print(ended.exit_code, ended.stderr, end="")
print({"transformers", "accelerate", "torch.distributed.tensor", "matplotlib"} & set(sys.modules))
"""
    (tmp_path / "task").mkdir()
    for part in ("train", "test"):
        (tmp_path / "task" / f"{part}.jsonl").write_text('{"prompt": "a", "answer": "b"}')
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == [
        "2 error: tasks: there is no folder nowhere",
        "2 error: ability: there is no file nofile.txt",
        "2 error: remember_text: there is no file nofile.txt",
        "set()",
    ]

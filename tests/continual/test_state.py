"""The state on disk: killed at any moment, damaged, of another run, with a task more, on a disk that is full."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sculpt_ops.continual import RunResult, Task, TrainConfig, learn, train, trainer

pytest.importorskip("transformers", reason="the trainer needs pip install sculpt-ops[train]")

ROOT = Path(__file__).resolve().parents[2]


def test_killed_at_any_moment_a_run_goes_on_to_the_same_end(
    short: dict[str, Any], toy_tasks: list[Task], write_task: Callable[[Task], Path], tmp_path: Path
) -> None:
    tasks = [str(write_task(task)) for task in toy_tasks]
    settings = {**short, "model": str(short["model"]), "tasks": tasks, "save_every": 2, "eval_items": 1}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    # Forked processes of a parent that has threads may hang.
    alone = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, Path(__file__).with_name("kill_moments.py"), tmp_path / "settings.json", tmp_path]
    ended = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    straight, *killed = map(json.loads, ended.stdout.splitlines())
    assert len(killed) == len(straight["moments"]) > 20
    for run in killed:
        assert run["died"], run
        for figure in ("weights", "answers", "ranks", "losses"):
            assert run[figure] == straight[figure], (run["moment"], figure, ended.stderr[-4000:])
        assert run["files"] == ["model", "predictions.jsonl", "run.json", "state.json"]

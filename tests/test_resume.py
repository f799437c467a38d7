"""A run killed at random moments and resumed from what it saved ends equal, to the bit, to one that was not."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
KILLS = 2


def run(folder: Path, state: str, master: str, kill_after: int | None = None) -> None:
    """Run the worker to its end, or kill it some microseconds to milliseconds after so many checkpoints."""
    command = (sys.executable, "-m", "tests.resume_worker", str(folder), state, master)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for lines, _ in enumerate(process.stdout):
            if lines == kill_after:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == (0 if kill_after is None else -signal.SIGKILL)


@pytest.mark.parametrize(("state", "master"), [("subspace", "split"), ("full", "stochastic"), ("subspace", "none")])
def test_killed_run_ends_like_an_undisturbed_one(tmp_path: Path, state: str, master: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    run(whole, state, master)
    chance = random.Random(f"{state} {master}")
    for _ in range(KILLS):
        run(killed, state, master, kill_after=chance.randrange(1, 10))
        assert not (killed / "done.safetensors").exists()
    run(killed, state, master)
    expected, given = load_file(whole / "done.safetensors"), load_file(killed / "done.safetensors")
    assert expected.keys() == given.keys()
    for name, weight in expected.items():
        assert torch.equal(weight, given[name]), name

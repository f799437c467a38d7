"""The measurement of what a rank holds: a worker that fails ends it, and the workers that wait for that one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "measure_sharding.py"
FAILING = """
import sys, time

sys.path.insert(0, {folder!r})
import measure_sharding

def measure(rank, *arguments):
    if rank == 1:
        raise ValueError("rank 1 has had enough")
    time.sleep(1000)

if __name__ == "__main__":
    measure_sharding.measure = measure
    measure_sharding.launch("model", 2, "full")
"""


def failure(*command: object) -> str:
    """What a command that fails has to say."""
    pytest.importorskip("transformers", reason="the measurement needs pip install sculpt-ops[train]")
    ended = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    return ended.stderr


def test_a_model_that_is_not_there_ends_it(tmp_path: Path) -> None:
    said = failure(SCRIPT, "--model", tmp_path / "none", "--results", tmp_path)
    assert f"ValueError: model: there is no folder {tmp_path / 'none'}" in said
    assert not list(tmp_path.iterdir())


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING.format(folder=str(SCRIPT.parent)))
    assert "ValueError: rank 1 has had enough" in failure(tmp_path / "failing.py")

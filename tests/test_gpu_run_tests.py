"""bench/gpu/run_tests.py: tests shared by processes, some of which do not live to see the end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench" / "gpu"))

import run_tests  # noqa: E402

FAKE = """
import os, signal, time
import pytest

@pytest.mark.parametrize("i", range(12))
def test_plain(i): time.sleep(0.02)

def test_kill(): os.kill(os.getpid(), signal.SIGKILL)

def test_wrong(): assert 1 == 2, "the reason"

def test_left_out(): pytest.skip("not here")

@pytest.fixture(scope="module")
def once(): return []

@pytest.mark.parametrize("i", range(3))
def test_module(i, once): once.append(i)
"""


def shared_run(folder: Path, *words: str) -> tuple[int, dict[str, Any], str]:
    report = folder / "report.json"
    command = [sys.executable, str(ROOT / "bench/gpu/run_tests.py"), "--workers", "2", "--report", str(report), *words]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert report.exists(), run.stdout + run.stderr
    return run.returncode, json.loads(report.read_text()), run.stdout


def test_files_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCULPT_SHARED_TESTS", str(tmp_path))
    from shared_tests import spread, taken

    names = ["a::1", "a::2", "a::3[x::y]", "b::1", "c::1", "c::2"]
    assert [names[i] for i in spread(names)] == ["a::1", "b::1", "c::1", "a::2", "c::2", "a::3[x::y]"]
    assert [taken(0), taken(1), taken(0), taken(1)] == [True, True, False, False]


def test_processes_share_tests_and_outlive_one_that_kills_its_own(tmp_path: Path) -> None:
    (tmp_path / "fake_checks.py").write_text(FAKE)
    status, report, printed = shared_run(tmp_path, "fake_checks.py")
    assert status == 1
    assert (report["collected"], report["passed"], report["failed"], report["skipped"]) == (18, 15, 1, 1)
    assert [(entry["test"], entry["status"]) for entry in report["crashed"]] == [("fake_checks.py::test_kill", -9)]
    assert [entry["test"] for entry in report["failures"]] == ["fake_checks.py::test_wrong"]
    assert "the reason" in report["failures"][0]["why"]
    assert (report["unfinished"], report["not run"]) == ([], 0)
    for words in ("CRASHED fake_checks.py::test_kill", "FAILED fake_checks.py::test_wrong", "15 passed, 1 failed"):
        assert words in printed


def test_every_test_is_run_once_and_all_passing_is_success(tmp_path: Path) -> None:
    (tmp_path / "fake_checks.py").write_text(FAKE)
    status, report, _ = shared_run(tmp_path, "fake_checks.py", "--", "-k", "plain or module")
    assert status == 0
    assert (report["collected"], report["passed"], report["crashed"]) == (15, 15, [])


RUINING = """
import sys
import types

RUINED = []
cuda = types.SimpleNamespace(is_initialized=lambda: True)
cuda.synchronize = lambda: RUINED and (_ for _ in ()).throw(RuntimeError("an illegal memory access"))

def use():
    sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
    if RUINED: raise RuntimeError("an illegal memory access")

def test_first(): use()

def test_ruins():
    use()
    RUINED.append(1)
    assert False, "illegal"

def test_next(): use()

def test_last(): use()
"""


def test_a_process_whose_gpu_context_is_ruined_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "fake_checks.py").write_text(RUINING)
    status, report, _ = shared_run(tmp_path, "--workers", "1", "fake_checks.py")
    assert status == 1
    assert [(entry["test"], entry["status"]) for entry in report["crashed"]] == [("fake_checks.py::test_ruins", 70)]
    assert "illegal" in report["crashed"][0]["why"]
    assert (report["passed"], report["failed"], report["not run"]) == (3, 0, 0)


def test_tests_that_there_is_no_time_for_are_counted(tmp_path: Path) -> None:
    (tmp_path / "fake_checks.py").write_text(
        "import time\ndef test_long(): time.sleep(60)\ndef test_too(): time.sleep(60)"
    )
    (tmp_path / "more_checks.py").write_text("import time\ndef test_last(): time.sleep(60)")
    status, report, printed = shared_run(tmp_path, "--seconds", "4", "fake_checks.py", "more_checks.py")
    assert status == run_tests.OUT_OF_TIME
    assert len(report["unfinished"]) == 2
    assert report["not run"] == 1
    assert "2 unfinished, 1 not run" in printed


def test_a_file_that_cannot_be_imported_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "fake_checks.py").write_text(FAKE)
    (tmp_path / "broken_checks.py").write_text("import no_such_module")
    status, report, _ = shared_run(tmp_path, "broken_checks.py", "fake_checks.py", "--", "-k", "plain or module")
    assert status == 1
    assert [entry["test"] for entry in report["failures"]] == ["broken_checks.py"]
    assert "no_such_module" in report["failures"][0]["why"]
    assert report["passed"] == 15

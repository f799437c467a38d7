"""bench/gpu_check.sh as far as it goes without a GPU: every stage on tiny sizes, and what it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sculpt_ops import bench
from sculpt_ops.bench.report import lost, markdown
from sculpt_ops.bench.timing import Ceilings

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench" / "gpu"))

import check  # noqa: E402


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    pytest.importorskip("matplotlib")
    output = tmp_path_factory.mktemp("results")
    run = subprocess.run(
        ["bash", "bench/gpu_check.sh", "--output", str(output)],
        cwd=ROOT,
        env={**os.environ, "SCULPT_DEVICE": "cpu", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return output, run.stdout


def test_a_dry_run_writes_everything(results: tuple[Path, str]) -> None:
    output, printed = results
    assert sorted(path.suffix for path in output.iterdir()) == [".json", ".md", ".png"]
    found = json.loads(next(output.glob("*.json")).read_text())
    assert found["dry_run"]
    assert found["complete"]
    assert found["failed"] == []
    assert {"device", "torch", "triton", "commit", "driver", "l2_bytes"} <= set(found["machine"])
    assert [stage["stage"] for stage in found["stages"]] == ["tests", "small shapes", "repeatability", "benchmarks"]
    assert found["stages"][0]["report"]["passed"] > 0
    assert all(stage["result"] == "passed" for stage in found["stages"]), printed
    assert " passed" in found["stages"][0]["tail"]
    assert " failed" not in found["stages"][0]["tail"]
    assert {row["table"] for row in found["rows"]} == {"model", "optimizer", "decomposition", "projection"}
    kinds = {(row["kind"], row["dtype"], row["basis"]) for row in found["rows"] if row["table"] == "projection"}
    dtypes = (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32"))
    assert kinds == {(kind, *dtype) for kind in ("left", "right", "both", "block") for dtype in dtypes}
    for row in found["rows"]:
        for name, entry in row["contenders"].items():
            assert "failed" not in entry, (name, entry)
            assert 0 < entry["us_low"] <= entry["us"] <= entry["us_high"]
            seconds = entry["us"] * 1e-6
            assert entry["share_of_floor"] == pytest.approx(row["floor_us"] * 1e-6 / seconds)
        if row["table"] == "projection":
            assert row["relative_error"] < (5e-3 if row["dtype"] == "bfloat16" else 1e-6)
            passes, sides = {"left": (2, 1), "right": (2, 1), "both": (3, 2), "block": (3, 1)}[row["kind"]]
            entry = row["contenders"]["sculpt"]
            size = row["m"] * row["n"]
            moved = passes * size * (2 if row["dtype"] == "bfloat16" else 4)
            assert entry["bytes_per_s"] * entry["us"] * 1e-6 == pytest.approx(moved)
            assert entry["flop_per_s"] * entry["us"] * 1e-6 == pytest.approx(4 * size * row["rank"] * sides)


def test_the_table_says_what_the_file_says(results: tuple[Path, str]) -> None:
    output, _ = results
    found, table = json.loads(next(output.glob("*.json")).read_text()), next(output.glob("*.md")).read_text()
    del found["stages"]
    assert table == markdown(found)
    assert "these figures mean nothing" in table
    for row in found["rows"]:
        for entry in row["contenders"].values():
            assert f"| {entry['us']:.1f} (" in table
    assert next(output.glob("*.png")).read_bytes().startswith(b"\x89PNG")


def fake(ours: float, theirs: float) -> dict[str, Any]:
    entry = {"us_low": 1.0, "us_high": 2.0, "share_of_floor": 0.5}
    row = {"table": "projection", "model": "x", "kind": "left", "m": 4, "n": 4, "rank": 1, "dtype": "bfloat16"}
    contenders = {"sculpt": {"us": ours, **entry}, "mm + addmm_": {"us": theirs, **entry}, "other": {"failed": "a|b"}}
    row |= {"relative_error": 1e-3, "floor_us": 1.0, "contenders": contenders}
    facts = {"dry_run": False, "machine": {"device": "GPU", "date": "2000-01-01"}, "failed": ["a table: why"]}
    return {**facts, "ceilings": Ceilings(1.0, 1.0, 1.0).__dict__, "complete": False, "rows": [row]}


def test_lost_rows_and_failures_stay_in_the_table() -> None:
    assert lost(fake(10.0, 9.9)) == []
    assert lost(fake(10.0, 9.0)) == ["x left 4 4 1 bfloat16 (0.90)"]
    table = markdown(fake(10.0, 9.0))
    assert "x left 4 4 1 bfloat16 (0.90)" in table
    assert "failed: a/b" in table
    assert "- a table: why" in table
    assert "rows are missing" in table


def test_the_floor_is_the_longer_of_bytes_and_operations() -> None:
    ceilings = Ceilings(bytes_per_s=10.0, half_flops=100.0, float32_flops=20.0)
    assert ceilings.floor(20.0, 100.0, torch.bfloat16) == 2.0
    assert ceilings.floor(20.0, 400.0, torch.bfloat16) == 4.0
    assert ceilings.floor(20.0, 400.0, torch.float32) == 20.0


def test_repeatability_sees_a_bit_that_moves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count = iter(range(10))
    monkeypatch.setattr("sculpt_ops.bench.command.ops.orthonormalize", lambda x: x + (next(count) == 2))
    assert bench.main(["--device", "cpu", "--repeat", "4"]) == 1
    different = json.loads(capsys.readouterr().out)["different"]
    assert {name: times for name, times in different.items() if times} == {"orthonormalize": 1}


def test_the_beginning_and_the_end_of_a_long_text_are_kept() -> None:
    assert check.shortened("short") == "short"
    text = "first error\n" + "x" * 20000 + "\nlast error"
    kept = check.shortened(text)
    assert kept.startswith("first error")
    assert kept.endswith("last error")
    assert len(kept) < 8000


def test_stages_that_fail_run_out_of_time_or_miss_a_program_are_recorded(tmp_path: Path) -> None:
    code = (sys.executable, "-c")
    cases = {
        "failed": check.Stage("a", (*code, "print('why'); raise SystemExit(3)"), 30),
        "out of time": check.Stage("b", (*code, "print('begun', flush=True); import time; time.sleep(60)"), 2),
        "skipped": check.Stage("c", (*code, ""), 30, "no-such-program"),
    }
    entries = {result: check.run_stage(stage, 100, dict(os.environ)) for result, stage in cases.items()}
    assert {result: entry["result"] for result, entry in entries.items()} == {result: result for result in cases}
    assert "why" in entries["failed"]["tail"]
    assert "begun" in entries["out of time"]["tail"]
    assert "no-such-program" in entries["skipped"]["why"]
    path = check.record(tmp_path, [entry | {"at": 0.0} for entry in entries.values()])
    assert path.name == "stages.json"
    assert [stage["stage"] for stage in json.loads(path.read_text())["stages"]] == ["a", "b", "c"]


@pytest.mark.parametrize("limit", [540.0, 150.0])
def test_the_stages_on_a_gpu_leave_time_for_the_benchmarks(limit: float) -> None:
    groups = check.stages("cuda", Path("x"), limit, Path("y"))
    assert [[stage.name for stage in group] for group in groups] == [
        ["build"],
        ["tests", "memcheck", "racecheck"],
        ["repeatability"],
        ["benchmarks"],
    ]
    assert all(stage.reserve >= 0.2 * limit for group in groups[1:3] for stage in group)
    assert groups[0][0].seconds + max(stage.reserve for stage in groups[1]) < limit
    for stage in (stage for group in groups for stage in group):
        for word in stage.command:
            assert not word.endswith(".py") or (ROOT / word).exists()
        assert all((ROOT / word).exists() for word in stage.command if word.startswith("tests/"))


def test_a_stage_is_told_its_time() -> None:
    late = check.Stage("a", ("true",), 30, reserve=40)
    assert check.run_stage(late, 40.5, dict(os.environ))["result"] == "skipped"
    code = (sys.executable, "-c", "import sys; print(sys.argv[1:])", "{left}", "{early}")
    assert "['18', '15']" in check.run_stage(check.Stage("a", code, 30), 20.5, dict(os.environ))["tail"]
    assert "['38', '30']" in check.run_stage(check.Stage("a", code, 40), 100, dict(os.environ))["tail"]


def test_only_the_stages_that_are_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "stages", lambda *_: [[check.Stage(name, ("true",), 9)] for name in ("a", "b", "c")])
    monkeypatch.setattr(sys, "argv", ["check", "--output", str(tmp_path), "--stages", "a,c"])
    assert check.main() == 0
    stages = json.loads((tmp_path / "stages.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["a", "c"]
    monkeypatch.setattr(sys, "argv", ["check", "--output", str(tmp_path), "--stages", "d"])
    with pytest.raises(SystemExit):
        check.main()


def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        bench.main([])
    assert "no GPU visible to torch" in capsys.readouterr().err

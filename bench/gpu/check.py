"""The stages of bench/gpu_check.sh, each with a share of the 9 minutes; one that fails is recorded, the next begins."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 540
TAIL = 4000
PYTHON = sys.executable
# Tests of the CPU kernels and of pure functions have nothing to find on a GPU. By path and without conftest.py: a GPU
# image has pytest, but seldom hypothesis.
GPU_TESTS = (
    "tests/test_on_device.py",
    "tests/triton/kernel_checks.py",
    "tests/triton/grouped_checks.py",
    "tests/cuda/side_checks.py",
    "tests/cuda/both_checks.py",
    "tests/cuda/adam_checks.py",
    "tests/cuda/add_steps_checks.py",
    "tests/cuda/jacobi_checks.py",
)
SANITIZED = (PYTHON, "bench/gpu/small_shapes.py")


class Stage(NamedTuple):
    """seconds: at most. needs: a program it cannot do without."""

    name: str
    command: tuple[str, ...]
    seconds: float
    needs: str | None = None


def stages(device: str, output: Path) -> list[Stage]:
    pytest = (PYTHON, "-m", "pytest", "-q", "--noconftest", "-o", "addopts=--import-mode=importlib")
    bench = (PYTHON, "-m", "sculpt_ops.bench")
    if device == "cpu":
        return [
            Stage("tests", (*pytest, "tests/test_on_device.py", "-k", "float32 and remove"), 60),
            Stage("small shapes", SANITIZED, 60),
            Stage("repeatability", (*bench, "--device", "cpu", "--repeat", "3"), 60),
            Stage("benchmarks", (*bench, "--dry-run", "--output", str(output), "--seconds", "20"), 60),
        ]
    without = ("--no-build-isolation", "--no-deps")
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
    return [
        Stage("build", (PYTHON, "-m", "pip", "install", "-q", "--no-index", *without, "--editable", "."), 150),
        Stage("tests", (*pytest, *GPU_TESTS), 110),
        Stage("memcheck", (*sanitizer, "memcheck", *SANITIZED), 35, "compute-sanitizer"),
        Stage("racecheck", (*sanitizer, "racecheck", *SANITIZED), 35, "compute-sanitizer"),
        Stage("repeatability", (*bench, "--repeat", "1000"), 25),
        Stage("benchmarks", (*bench, "--output", str(output), "--seconds", "{left}"), 185),
    ]


def run(command: Sequence[str], seconds: float, environment: dict[str, str]) -> tuple[int | None, str]:
    """Exit status, None if it ran out of time, and the end of what it printed; its children end with it."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        printed, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        return None, printed[-TAIL:]
    return process.returncode, printed[-TAIL:]


def run_stage(stage: Stage, left: float, environment: dict[str, str]) -> dict[str, Any]:
    if stage.needs is not None and shutil.which(stage.needs) is None:
        return {"stage": stage.name, "result": "skipped", "why": f"no {stage.needs} here"}
    seconds = min(stage.seconds, left)
    if seconds < 1:
        return {"stage": stage.name, "result": "skipped", "why": "no time left"}
    # The benchmarks stop by themselves 15 seconds early, to write their results.
    command = [word.replace("{left}", str(max(10, int(seconds) - 15))) for word in stage.command]
    begin = time.monotonic()
    status, tail = run(command, seconds, environment)
    result = "passed" if status == 0 else "out of time" if status is None else "failed"
    took = round(time.monotonic() - begin, 1)
    return {"stage": stage.name, "result": result, "seconds": took, "command": " ".join(command), "tail": tail}


def record(output: Path, entries: list[dict[str, Any]]) -> Path:
    """The stages join the results file of the benchmarks, or have one of their own where those left none."""
    files = sorted(output.glob("*.json"), key=lambda path: path.stat().st_mtime)
    written = [path for path in files if path.stat().st_mtime >= entries[0]["at"] and path.stem != "stages"]
    path = written[-1] if written else output / "stages.json"
    result = json.loads(path.read_text()) if written else {}
    result["stages"] = [{key: value for key, value in entry.items() if key != "at"} for entry in entries]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU (also SCULPT_DEVICE=cpu)")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results", help="folder for the results")
    parser.add_argument("--seconds", type=float, default=LIMIT, help="for all stages together")
    given = parser.parse_args()
    device = "cpu" if given.dry_run else os.environ.get("SCULPT_DEVICE", "cuda")
    given.output.mkdir(parents=True, exist_ok=True)
    output = given.output.resolve()
    environment = os.environ | {"SCULPT_TEST_DEVICE": device, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    begin, entries = time.monotonic(), []
    for stage in stages(device, output):
        at = time.time()
        entry = run_stage(stage, given.seconds - (time.monotonic() - begin), environment)
        entries.append(entry | {"at": at})
        print(f"{stage.name}: {entry['result']} {entry.get('why') or str(entry['seconds']) + ' s'}", flush=True)
        if entry["result"] in ("failed", "out of time"):
            print(entry["tail"], flush=True)
    print(f"written: {record(output, entries)}")
    return 0 if all(entry["result"] in ("passed", "skipped") for entry in entries) else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""The stages of bench/gpu_check.sh, each with a share of the 9 minutes; one that fails is recorded, the next begins.

bench/gpu/check.py --seconds 150 --stages build,tests,repeatability,benchmarks
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 540
OUT_OF_TIME = 124
# Of a stage of a dry run, which takes a tenth of it where nothing else is running.
CPU_SECONDS = 240
# Of what a stage prints: a sanitizer says what was wrong at the beginning.
HEAD, TAIL = 3000, 4000
PYTHON = sys.executable
# Tests of the CPU kernels and of pure functions have nothing to find on a GPU. Those that no GPU has run yet come
# first: twice the time was up before they were.
GPU_TESTS = (
    "tests/cuda/side_checks.py",
    "tests/on_device_training_checks.py",
    "tests/on_device_checks.py",
    "tests/triton/kernel_checks.py",
    "tests/triton/grouped_checks.py",
    "tests/triton/parts_checks.py",
    "tests/cuda/both_checks.py",
    "tests/cuda/adam_checks.py",
    "tests/cuda/add_steps_checks.py",
    "tests/cuda/jacobi_checks.py",
    "tests/test_cpp.py",
)
SANITIZED = (PYTHON, "bench/gpu/small_shapes.py")


class Stage(NamedTuple):
    """seconds: at most. needs: a program it cannot do without. report: a JSON file that it writes, for the results.

    reserve: seconds that it leaves to the stages after it, should those before it have taken long.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    needs: str | None = None
    report: Path | None = None
    reserve: float = 0.0


def stages(device: str, output: Path, limit: float, scratch: Path) -> list[list[Stage]]:
    """One group after the other, the stages of a group at the same time: only times need the GPU for themselves."""
    report = scratch / "tests.json"
    tests = (PYTHON, "bench/gpu/run_tests.py", "--seconds", "{left}", "--report", str(report))
    bench = (PYTHON, "-m", "sculpt_ops.bench")
    if device == "cpu":
        words = ("--workers", "2", "tests/on_device_checks.py", "--", "-k", "float32 and remove")
        return [
            [
                Stage("tests", (*tests, *words), CPU_SECONDS, report=report),
                Stage("small shapes", SANITIZED, CPU_SECONDS),
            ],
            [Stage("repeatability", (*bench, "--device", "cpu", "--repeat", "3"), CPU_SECONDS)],
            [Stage("benchmarks", (*bench, "--dry-run", "--output", str(output), "--seconds", "20"), CPU_SECONDS)],
        ]
    without = ("--no-build-isolation", "--no-deps")
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
    build = (PYTHON, "-m", "pip", "install", "-q", "--no-index", *without, "--editable", ".")
    both, reserve = min(150.0, limit / 3), limit * 0.27
    times = "1000" if limit > 300 else "300"
    return [
        # Without it there is nothing to test: it may take time from the others.
        [Stage("build", build, min(150.0, limit * 0.6))],
        [
            Stage("tests", (*tests, *GPU_TESTS), both, report=report, reserve=reserve),
            *(
                Stage(tool, (*sanitizer, tool, *SANITIZED, *words), both, "compute-sanitizer", reserve=reserve)
                for tool, words in (("memcheck", ()), ("racecheck", ("--own",)))
            ),
        ],
        # 1000 runs took 25 seconds beside the tests on an H200, its start most of it.
        [Stage("repeatability", (*bench, "--repeat", times), min(60.0, limit / 6), reserve=limit * 0.2)],
        [Stage("benchmarks", (*bench, "--output", str(output), "--seconds", "{early}"), limit)],
    ]


def shortened(text: str) -> str:
    return text if len(text) <= HEAD + TAIL else f"{text[:HEAD]}\n[...]\n{text[-TAIL:]}"


def run(command: Sequence[str], seconds: float, environment: dict[str, str]) -> tuple[int | None, str]:
    """Exit status, None if it ran out of time, and what it printed, shortened; its children end with it."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        printed, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        return None, shortened(printed)
    return process.returncode, shortened(printed)


def run_stage(stage: Stage, most: float, environment: dict[str, str]) -> dict[str, Any]:
    if stage.needs is not None and shutil.which(stage.needs) is None:
        return {"stage": stage.name, "result": "skipped", "why": f"no {stage.needs} here"}
    seconds = min(stage.seconds, most - stage.reserve)
    if seconds < 1:
        return {"stage": stage.name, "result": "skipped", "why": "no time left"}
    # Tests stop by themselves just before that; benchmarks begin late, end the row that they are at, and draw.
    left = {"{left}": seconds - 2, "{early}": seconds - min(15, seconds / 4)}
    command = [str(max(1, int(left[word]))) if word in left else word for word in stage.command]
    begin = time.monotonic()
    status, tail = run(command, seconds, environment)
    result = "passed" if status == 0 else "out of time" if status in (None, OUT_OF_TIME) else "failed"
    took = round(time.monotonic() - begin, 1)
    entry = {"stage": stage.name, "result": result, "seconds": took, "command": " ".join(command), "tail": tail}
    if stage.report is not None and stage.report.exists():
        entry["report"] = json.loads(stage.report.read_text())
    return entry


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
    if written and (output / "stages.json").exists():
        (output / "stages.json").unlink()
    return path


def told(entry: dict[str, Any]) -> str:
    line = f"{entry['stage']}: {entry['result']} {entry.get('why') or str(entry['seconds']) + ' s'}"
    if entry["result"] in ("failed", "out of time"):
        return f"{line}\n{entry['tail']}"
    return "\n".join([line, *entry.get("tail", "").splitlines()[-1:]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU (also SCULPT_DEVICE=cpu)")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results", help="folder for the results")
    parser.add_argument("--seconds", type=float, default=LIMIT, help="for all stages together")
    parser.add_argument("--stages", help="names of those wanted, with commas between; all of them without")
    given = parser.parse_args()
    device = "cpu" if given.dry_run else os.environ.get("SCULPT_DEVICE", "cuda")
    given.output.mkdir(parents=True, exist_ok=True)
    output = given.output.resolve()
    environment = os.environ | {"SCULPT_TEST_DEVICE": device, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    begin, entries = time.monotonic(), []
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor() as pool:
        groups = stages(device, output, given.seconds, Path(scratch))
        names = [stage.name for group in groups for stage in group]
        wanted = given.stages.split(",") if given.stages else names
        if not set(wanted) <= set(names):
            parser.error(f"--stages: given {given.stages}, wanted some of {','.join(names)}")
        for group in groups:
            at, left = time.time(), given.seconds - (time.monotonic() - begin)
            chosen = [stage for stage in group if stage.name in wanted]
            for entry in pool.map(lambda stage: run_stage(stage, left, environment), chosen):  # noqa: B023
                entries.append(entry | {"at": at})
                print(told(entry), flush=True)
            # After every group: what has been found stays if this process is ended.
            written = record(output, entries) if entries else None
    print(f"written: {written}")
    return 0 if all(entry["result"] in ("passed", "skipped") for entry in entries) else 1


if __name__ == "__main__":
    raise SystemExit(main())

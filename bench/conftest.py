"""`--results FOLDER` writes what a benchmark run measured as one JSON file, with machine, versions and commit."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", default=None, help="folder to write the results file to")


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def machine() -> dict[str, Any]:
    def git(*words: str) -> str:
        return subprocess.run(("git", *words), cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    # The results files themselves do not change what is measured.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return {
        "date": datetime.date.today().isoformat(),
        "commit": git("rev-parse", "--short", "HEAD") + ("+changes" if changed else ""),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "instruction_set": os.environ.get("SCULPT_CPU", "chosen at run time"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": "make bench",
    }


ROWS = pytest.StashKey[list[dict[str, Any]]]()


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What the benchmarks of this run measured so far; printed, and written where --results says, at the end."""
    return request.config.stash.setdefault(ROWS, [])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    measured = config.stash.get(ROWS, [])
    if not measured:
        return
    write = terminalreporter.write_line
    write(f"{'shape':>14} {'rank':>5} {'dtype':>9} {'side':>6} {'torch ms':>9} {'ours ms':>9} {'torch / ours':>20}")
    for row in measured:
        shape = "{} x {}".format(*row["shape"])
        times = f"{row['torch_ms']:9.3f} {row['ours_ms']:9.3f}"
        ratio = f"{row['ratio']:6.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
        lost = "  slower" if row["ratio"] < 1 else ""
        write(f"{shape:>14} {row['rank']:>5} {row['dtype']:>9} {row['side']:>6} {times} {ratio:>20}{lost}")
    folder = config.getoption("--results")
    if folder:
        facts = machine()
        path = Path(folder) / f"cpu-{facts['date']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"machine": facts, "rows": measured}, indent=1) + "\n")
        temporary.replace(path)
        write(f"written: {path}")

"""`--results FOLDER` writes what a benchmark run measured as one JSON file, with machine, versions and commit."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from tables import Row, Table

from sculpt_ops.files import replacing

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", default=None, help="folder to write the results file to")


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def machine(packages: Sequence[str], arguments: Sequence[str]) -> dict[str, Any]:
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
        **{package: installed(package) for package in packages},
        "command": " ".join(("python -m pytest", *arguments)),
    }


TABLES = pytest.StashKey[dict[Table, list[Row]]]()


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> list[Row]:
    """The rows of the test file's TABLE so far; printed, and written where --results says, at the end."""
    return request.config.stash.setdefault(TABLES, {}).setdefault(request.module.TABLE, [])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    write = terminalreporter.write_line
    for table, measured in config.stash.get(TABLES, {}).items():
        write(table.heading)
        for row in measured:
            for line in table.show(row):
                write(line)
        if folder := config.getoption("--results"):
            facts = machine(table.packages, config.invocation_params.args)
            path = Path(folder) / f"{table.file}-{facts['date']}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_text(json.dumps({"machine": facts, "rows": measured}, indent=1) + "\n")
            write(f"written: {path}")

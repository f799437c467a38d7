"""A pytest plugin: processes that collect the same tests share them out. bench/gpu/run_tests.py starts them.

Each takes the next test that none has taken, by creating a file that must not exist yet, so that no process waits while
there are tests. What a process did is in PID.jsonl in the same folder, written before and after every test: a test that
ends its process is known.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(os.environ["SCULPT_SHARED_TESTS"])
# Exit status of a process whose CUDA context a test has ruined: every later test in it would fail.
RUINED = 70
TAIL = 1500


def spread(names: list[str]) -> list[int]:
    """An order of the tests with these ids in which the tests of a file are evenly spread: where time runs out, all
    files have had the same share."""
    files = [name.partition("::")[0] for name in names]
    totals, seen = Counter(files), defaultdict[str, int](int)
    keys = []
    for i, file in enumerate(files):
        keys.append(((seen[file] + 0.5) / totals[file], i))
        seen[file] += 1
    return [i for _, i in sorted(keys)]


def note(**entry: Any) -> None:
    with (FOLDER / f"{os.getpid()}.jsonl").open("a") as log:
        log.write(json.dumps(entry) + "\n")


def taken(index: int) -> bool:
    """Whether this process is the first to ask for a test."""
    try:
        os.close(os.open(FOLDER / f"{index}.taken", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def ruined() -> bool:
    torch = __import__("sys").modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [items[i] for i in spread([item.nodeid for item in items])]


def pytest_runtestloop(session: pytest.Session) -> bool:
    names = [item.nodeid for item in session.items]
    (FOLDER / f"{os.getpid()}.collected").write_text(json.dumps(names))
    for index, item in enumerate(session.items):
        if not taken(index):
            continue
        note(test=item.nodeid, outcome="begun")
        # No next item: which it is, another process may decide, and set-up must not outlive the test.
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        if ruined():
            note(test=item.nodeid, outcome="ruined")
            os._exit(RUINED)
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        why = "" if report.passed else str(report.longreprtext)[-TAIL:]
        note(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 2), why=why)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:  # a file that cannot be imported
        note(test=report.nodeid, outcome="failed", why=str(report.longreprtext)[-TAIL:])

"""pytest in several processes at once, without plugins that a GPU image lacks.

python bench/gpu/run_tests.py --workers 14 --seconds 50 --report report.json tests/a.py tests/b.py -- -k words

Processes share the tests (shared_tests.py). One that a test ends, by a signal or by ruining its CUDA context, is
started again once for the tests that are left; the test is named in the report. Exit status 1: something failed. 124:
nothing failed, but not all tests have run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OUT_OF_TIME = 124
# Of pytest: tests passed, tests failed, interrupted (a file that cannot be collected), nothing collected.
ENDED = (0, 1, 2, 5)
TAIL = 1500


class Worker:
    """One pytest at a time; `restarts` more are begun after one that did not end by itself."""

    def __init__(self, command: list[str], folder: Path, index: int, restarts: int = 1) -> None:
        self.command, self.restarts, self.log = command, restarts, folder / f"worker-{index}.log"
        self.environment = os.environ | {
            "SCULPT_SHARED_TESTS": str(folder),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH")))),
            "PYTHONFAULTHANDLER": "1",
            # Threads of one process would take the cores of the others.
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        self.statuses: list[tuple[int, int]] = []
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, env=self.environment, stdout=log, stderr=subprocess.STDOUT)

    def running(self) -> bool:
        status = self.process.poll()
        if status is None:
            return True
        if not self.statuses or self.statuses[-1][0] != self.process.pid:
            self.statuses.append((self.process.pid, status))
        if status in ENDED or self.restarts == 0:
            return False
        self.restarts -= 1
        self.start()
        return True

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def tail(self) -> str:
        """The end, or where a signal came."""
        text = self.log.read_text(errors="replace")
        fatal = text.rfind("Fatal Python error")
        return text[-TAIL:] if fatal < 0 else text[fatal : fatal + TAIL]


def outcomes(folder: Path) -> tuple[set[str], dict[str, dict[str, Any]]]:
    """The tests there are, and the last that is known of each; a test that failed once has failed."""
    names: set[str] = set()
    for path in folder.glob("*.collected"):
        names |= set(json.loads(path.read_text()))
    found: dict[str, dict[str, Any]] = {}
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # cut off where the process was ended
                continue
            known = found.get(entry["test"])
            if known is None or known["outcome"] not in ("failed", "ruined"):
                found[entry["test"]] = entry | {"pid": int(path.stem)}
            elif entry["outcome"] == "ruined":
                found[entry["test"]] = known | {"outcome": "ruined"}
    return names, found


def report_of(folder: Path, workers: list[Worker], seconds: float) -> dict[str, Any]:
    names, found = outcomes(folder)
    statuses = dict(pair for worker in workers for pair in worker.statuses)
    crashed = []
    for test, entry in found.items():
        status = statuses.get(entry["pid"])
        if entry["outcome"] == "ruined" or (entry["outcome"] == "begun" and status is not None):
            crashed.append({"test": test, "status": status, "why": entry.get("why", "")})
    counts = Counter(entry["outcome"] for entry in found.values())
    slowest = sorted(found.values(), key=lambda entry: -entry.get("seconds", 0.0))[:10]
    files: dict[str, Counter[str]] = {}
    for test, entry in found.items():
        files.setdefault(test.partition("::")[0], Counter())[entry["outcome"]] += 1
    bad = [worker for worker in workers if any(status not in (0, 1, 5) for _, status in worker.statuses)]
    return {
        "workers": len(workers),
        "seconds": round(seconds, 1),
        "collected": len(names),
        **{outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")},
        "crashed": crashed,
        "unfinished": [t for t, entry in found.items() if entry["outcome"] == "begun" and entry["pid"] not in statuses],
        "not run": len(names - found.keys()),
        "files": files,
        "failures": [{"test": t, "why": entry["why"]} for t, entry in found.items() if entry["outcome"] == "failed"],
        "slowest": [[entry["test"], entry.get("seconds")] for entry in slowest],
        # Of a failed process the log says what no test does: an import that fails, where a signal came.
        "logs": [{"statuses": worker.statuses, "tail": worker.tail()} for worker in bad[:4]],
    }


def shown(report: dict[str, Any]) -> str:
    lines = [f"FAILED {entry['test']}\n{entry['why']}" for entry in report["failures"][:4]]
    lines += [f"CRASHED {entry['test']} ({entry['status']})" for entry in report["crashed"]]
    if not report["collected"]:
        lines += [entry["tail"] for entry in report["logs"][:1]]
    counts = {"passed": report["passed"], "failed": report["failed"], "skipped": report["skipped"]}
    counts |= {"crashed": len(report["crashed"]), "unfinished": len(report["unfinished"]), "not run": report["not run"]}
    said = ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "no tests"
    return "\n".join([*lines, f"{said} in {report['seconds']} s, {report['workers']} processes"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="processes")
    parser.add_argument("--seconds", type=float, default=600.0, help="until all are stopped")
    parser.add_argument("--report", type=Path, help="file for counts, failures and crashes, as JSON")
    parser.add_argument("arguments", nargs="+", help="files, and after -- options of pytest")
    given = parser.parse_args()
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "shared_tests", "--noconftest", "--tb=short")
    # By path and without conftest.py: a GPU image has pytest, but seldom hypothesis.
    options = ("-o", "addopts=--import-mode=importlib", "--continue-on-collection-errors", "-p", "no:cacheprovider")
    command = [*pytest, *options, *given.arguments]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sculpt-tests-") as name:
        workers = [Worker(command, Path(name), i) for i in range(given.workers)]
        while sum(worker.running() for worker in workers) and time.monotonic() - begin < given.seconds:
            time.sleep(0.1)
        for worker in workers:
            worker.stop()
        report = report_of(Path(name), workers, time.monotonic() - begin)
    if given.report is not None:
        given.report.write_text(json.dumps(report, indent=1) + "\n")
    print(shown(report))
    # No process that pytest did not end with a status of its own, and no run without tests, is a success.
    statuses = {status for worker in workers for _, status in worker.statuses}
    if report["failed"] or report["crashed"] or statuses - {0, 1, 5} or not report["collected"]:
        return 1
    return OUT_OF_TIME if report["not run"] or report["unfinished"] else 0


if __name__ == "__main__":
    raise SystemExit(main())

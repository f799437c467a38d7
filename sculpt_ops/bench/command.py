"""The benchmark behind `sculpt bench` and bench/gpu_check.sh: rows in one JSON file, and a table and a roofline of it.

python -m sculpt_ops.bench --output results --seconds 240
python -m sculpt_ops.bench --output results --only projections --rank 64    # some of it
python -m sculpt_ops.bench --output results --dry-run            # tiny sizes on the CPU, to try the machinery
python -m sculpt_ops.bench --repeat 1000                         # bitwise repeatability instead of times
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from .. import ops
from ..files import check_folder
from .projections import Case, cases, projections
from .report import WHICH, write_report
from .rows import Row, Setting, basis, decompositions, models, optimizer_step, small_svds
from .timing import measure_ceilings, synchronize

__all__ = ["TABLES", "facts", "main", "repeat", "run"]

TABLES = ("projections", "decompositions", "small_svds", "models", "optimizer_step")
# Single projections before the other tables.
FIRST_ROWS = 60
# A run shorter than this leaves out what compiles much.
SHORT_SECONDS = 100.0
# Rows of a table that may fail before the rest is left out: after some errors every CUDA call fails.
FAILURES = 5


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def facts(device: torch.device) -> dict[str, Any]:
    """GPU, driver, versions and commit: what a figure is worth nothing without."""
    cuda = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if cuda else None
    return {
        "date": datetime.date.today().isoformat(),
        "device": properties.name if properties else f"CPU ({platform.machine()})",
        "capability": f"{properties.major}.{properties.minor}" if properties else None,
        "multiprocessors": properties.multi_processor_count if properties else None,
        "l2_bytes": int(properties.L2_cache_size) if properties else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "sculpt_ops": _version("sculpt-ops"),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """SCULPT_COMMIT where it is set, for a copy whose repository is elsewhere."""
    if given := os.environ.get("SCULPT_COMMIT"):
        return given
    here = str(Path(__file__).parent)
    commit = _output("git", "-C", here, "rev-parse", "--short", "HEAD")
    changed = _output("git", "-C", here, "status", "--porcelain", "--untracked-files=no", "--", ".")
    return f"{commit}+changes" if commit and changed else commit


def run(
    device: torch.device,
    seconds: float,
    small: bool = False,
    say: Callable[[str], Any] = print,
    save: Callable[[dict[str, Any]], Any] | None = None,
    only: Sequence[str] = (),
    ranks: Sequence[int] = (),
) -> dict[str, Any]:
    """All tables within about `seconds`: what fails is in `failed`, what there was no time for is not in `rows`.

    only: names of `TABLES`, where not all are wanted. ranks: of single projections, likewise.
    save: is given the result after each table, so that a run that is ended leaves what it had.
    """
    begin = time.monotonic()
    torch.manual_seed(0)
    ceilings = measure_ceilings(device, small)
    result: dict[str, Any] = {
        "dry_run": small,
        "machine": facts(device),
        "ceilings": ceilings.__dict__,
        "only": list(only),
        "ranks": list(ranks),
        "rows": [],
        "failed": [],
        "complete": True,
    }
    setting = Setting(device, ceilings, small, begin, short=seconds < SHORT_SECONDS)
    left = enumerate(case for case in cases(setting.models, small) if not ranks or case.rank in ranks)
    wanted = [entry for entry in tables(left) if not only or entry[0] in only]
    shares = sum(share for _, share, _ in wanted)
    for name, share, table in wanted:
        # Of what is left, as the row at which a table stops may take long; after the last share all of it.
        now, end = time.monotonic(), begin + seconds
        setting.deadline = now + (end - now) * share / shares if share else end
        shares -= share
        for _ in range(FAILURES):
            try:
                for row in table(setting):
                    result["rows"].append(row)
                    say(f"{time.monotonic() - begin:6.1f} s  {name}  {_brief(row)}")
                break
            except Exception as error:
                result["failed"].append(f"{name}: {type(error).__name__}: {error}")
                say(result["failed"][-1])
            if name != "projections" or setting.over():  # these go on with the next row
                break
        # Single projections have another turn, and the last of them is told by what it leaves.
        result["complete"] &= name == "projections" or not setting.over()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        result["seconds"] = time.monotonic() - begin
        if save is not None:
            save(result)
    result["complete"] &= next(left, None) is None or (bool(only) and "projections" not in only)
    return result


def tables(left: Iterator[tuple[int, Case]]) -> list[tuple[str, float, Callable[[Setting], Iterator[Row]]]]:
    """In order, with the share of the time that each has: none is left out for another's sake. What they leave is for
    more single projections."""
    foremost = islice(left, FIRST_ROWS)
    return [
        ("projections", 0.5, lambda setting: projections(setting, foremost)),
        ("decompositions", 0.12, decompositions),
        ("small_svds", 0.08, small_svds),
        ("models", 0.2, models),
        ("optimizer_step", 0.1, optimizer_step),
        ("projections", 0.0, lambda setting: projections(setting, left)),
    ]


def _brief(row: dict[str, Any]) -> str:
    times = (f"{name} {entry['us']:.1f}" for name, entry in row["contenders"].items() if "us" in entry)
    what = [str(row[key]) for key in (*WHICH, "chosen") if key in row]
    return " ".join(what) + " us: " + ", ".join(times)


def repeat(device: torch.device, times: int) -> dict[str, int]:
    """How many of `times` runs on equal input gave other bits than the first, by op."""
    torch.manual_seed(0)
    grads = [torch.randn(m, n, device=device).bfloat16() for m, n in ((192, 320), (320, 192), (130, 70))]
    lefts = [basis(grad.shape[0], 16, grad.dtype, device) for grad in grads]
    rights = [basis(grad.shape[1], 32, grad.dtype, device) for grad in grads]
    single = torch.randn(96, 64, device=device)

    def foreach(rights: list[Any]) -> torch.Tensor:
        copies = [grad.clone() for grad in grads]
        ops.foreach_project_(copies, lefts, rights)
        return torch.cat([copy.flatten() for copy in copies])

    calls: dict[str, Callable[[], torch.Tensor]] = {
        "project, left": lambda: ops.project(grads[0], lefts[0]),
        "project, both": lambda: ops.project(grads[0], lefts[0], rights[0]),
        "project, block": lambda: ops.project(grads[0], lefts[0], rights[0], block=True),
        "foreach_project_, left": lambda: foreach([None] * 3),
        "foreach_project_, both": lambda: foreach(rights),
        "sketch": lambda: ops.sketch(single, 24, seed=3),
        "orthonormalize": lambda: ops.orthonormalize(single),
        "rsvd": lambda: ops.rsvd(single, 8, seed=3)[0],
    }
    different = {}
    for name, call in calls.items():
        first = call()
        # Summed on the device, so that nothing waits in between.
        count = torch.zeros((), dtype=torch.int64, device=device)
        for _ in range(times - 1):
            count += (call() != first).any()
        different[name] = int(count)
    synchronize(device)
    return different


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("bench/results"), help="folder for the results")
    parser.add_argument("--seconds", type=float, default=240.0, help="time for all tables")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU; its figures mean nothing")
    parser.add_argument("--only", action="append", choices=TABLES, default=[], help="this table; may be repeated")
    parser.add_argument("--rank", action="append", type=int, default=[], help="of single projections; likewise")
    parser.add_argument("--repeat", type=int, help="runs of each op that must agree to the bit, in place of times")
    parser.add_argument("--device", help="cuda, or cpu with --repeat")
    given = parser.parse_args(arguments)
    if not given.dry_run and given.device != "cpu" and not torch.cuda.is_available():
        parser.error("no GPU visible to torch; --dry-run tries the machinery on the CPU")
    try:
        check_folder(given.output, "--output")
    except OSError as error:
        parser.error(str(error))
    if given.seconds <= 0 or min(given.rank, default=1) < 1:
        parser.error(f"--seconds, --rank: given {given.seconds:g} and {given.rank}, wanted more than 0")
    device = torch.device("cpu" if given.dry_run else given.device or "cuda")
    if given.repeat is not None:
        different = repeat(device, given.repeat)
        print(json.dumps({"times": given.repeat, "different": different}))
        return 1 if any(different.values()) else 0
    if device.type == "cpu" and not given.dry_run:
        parser.error("--device cpu: wanted with --repeat, or --dry-run")

    def save(result: dict[str, Any]) -> None:
        write_report(result, given.output, picture=False)

    result = run(device, given.seconds, given.dry_run, save=save, only=given.only, ranks=given.rank)
    for path in write_report(result, given.output):
        print(f"written: {path}")
    return 0

"""What full fine-tuning costs with each method, one process a row: seconds, memory, leak, checkpoint, loss.

    python bench/train_cpu.py --task CL_Benchmark/TC/agnews --results bench/results
    python bench/train_cpu.py --task CL_Benchmark/TC/agnews --rows 'subspace|PEFT' --steps 4
    python bench/train_cpu.py --markdown bench/results/train-cpu-DATE.json     # into docs/training.md

Needs what `make bench` installs, and a task folder as `sculpt train` takes it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from conftest import ROOT, machine
from tables import Row
from training_measure import WARM_UP, Settings, described, measure
from training_methods import METHODS, Method
from training_table import heading, lost, markdown, show, write_between_marks
from weights import smollm2_folder

from sculpt_ops.files import replacing

DOCUMENT = ROOT / "docs" / "training.md"
PACKAGES = ("transformers", "peft", "rhai-innovation-mini-trainer", "numpy")


def main() -> None:
    options = parser().parse_args()
    if options.markdown is not None:
        write_between_marks(options.document, markdown(json.loads(options.markdown.read_text(encoding="utf-8"))))
        print(f"written: {options.document}")
        return
    if options.task is None:
        parser().error("--task: name a task folder to train on")
    if options.steps < WARM_UP + 2:
        parser().error(f"--steps: got {options.steps}, wanted {WARM_UP + 2} or more, of which {WARM_UP} are not timed")
    settings = Settings(
        model=options.model or smollm2_folder(),
        task=options.task,
        steps=options.steps,
        lr=options.lr,
        rows=options.rows_a_step,
        length=options.length,
        held_out=options.held_out,
        threads=options.threads,
    )
    if options.only is not None:
        print(json.dumps(one(METHODS[options.only], settings)))
        return
    run_all(settings, re.compile(options.rows), options.results)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--task", type=Path, help="folder of the task to train on")
    made.add_argument("--model", type=Path, help="Hugging Face folder of a decoder-only model; default: SmolLM2-135M")
    made.add_argument("--rows", default="", help="only the methods whose name and share match this expression")
    made.add_argument("--steps", type=int, default=Settings.steps, help="the first two are not timed")
    made.add_argument("--lr", type=float, default=Settings.lr)
    made.add_argument("--rows-a-step", type=int, default=Settings.rows)
    made.add_argument("--length", type=int, default=Settings.length, help="tokens in a row")
    made.add_argument("--held-out", type=int, default=Settings.held_out, help="batches the loss is compared on")
    made.add_argument("--threads", type=int, default=Settings.threads)
    made.add_argument("--results", type=Path, help="folder to write the results file to")
    made.add_argument("--markdown", type=Path, metavar="RESULTS", help="write this results file's table and end")
    made.add_argument("--document", type=Path, default=DOCUMENT, help="where --markdown writes the table")
    made.add_argument("--only", type=int, help=argparse.SUPPRESS)
    return made


def one(method: Method, settings: Settings) -> Row:
    """The row of `method`; a method that is not installed or fails is a row with a note."""
    row: Row = {
        "name": method.name,
        "family": method.family,
        "protect": method.protect,
        "dtype": str(method.dtype).removeprefix("torch."),
    }
    # Libraries print what they do; standard output is for the row.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            row |= measure(method, settings)
            row["owned_total"] = sum(row["owned"].values())
        except ImportError as error:
            row["note"] = f"not installed: {error}"
        except Exception as error:
            traceback.print_exc()
            row["note"] = f"failed: {type(error).__name__}: {error}".splitlines()[0]
    return row


def run_all(settings: Settings, wanted: re.Pattern[str], folder: Path | None) -> None:
    # Where the folders lie is of no interest to a reader of the results.
    command = shlex.join(Path(word).name if Path(word).is_dir() else word for word in ("python", *sys.argv))
    allocator = " ".join(f"{name}={value}" for name, value in os.environ.items() if name.startswith("MALLOC_"))
    facts = machine(PACKAGES, []) | {"threads": settings.threads, "allocator": allocator or "default"}
    facts["command"] = command
    rows: list[Row] = []
    print(heading())
    for index, method in enumerate(METHODS):
        if wanted.search(f"{method.name} {method.protect}"):
            rows.append(in_own_process(index))
            print(show(rows[-1]), flush=True)
            if folder is not None:
                path = folder / f"train-cpu-{facts['date']}.json"
                write(path, {"machine": facts, "settings": described(settings), "rows": rows})
    print("\nWhere ours loses:", *lost(rows), sep="\n    ")


def in_own_process(index: int) -> Row:
    """Peak memory is that of a process."""
    method = METHODS[index]
    child = subprocess.run(
        (sys.executable, *sys.argv, "--only", str(index)), stdout=subprocess.PIPE, text=True, check=False
    )
    if child.returncode:
        note = f"failed: the process ended with status {child.returncode}"
        return {"name": method.name, "protect": method.protect, "note": note}
    row: Row = json.loads(child.stdout)
    return row


def write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

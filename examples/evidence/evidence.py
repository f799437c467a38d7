"""Trains every method on several orders and seeds, and compares what they forget.

`python examples/evidence/evidence.py --data FOLDER` with the O-LoRA benchmark's folder; README.md beside this file says
what is compared and what came out. Runs that have a result are not run again: it can be stopped at any moment.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache"


def main() -> int:
    arguments = _arguments()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.path.insert(0, str(HERE.parent / "demo"))
    # What needs torch is imported where it is used: worker processes import it at the same time, not afterwards.
    from jobs import STAGES, Queue
    from long_on_gpu import LONG_ON_GPU
    from long_sequence import LONG_SEQUENCE
    from one_gpu import ONE_GPU
    from protocol import KNOWN_TEXT
    from running import run
    from two_cores import TWO_CORES
    from workers import work_off

    protocols = {"cpu": TWO_CORES, "gpu": ONE_GPU, "long": LONG_SEQUENCE, "long-gpu": LONG_ON_GPU}
    protocol = protocols[arguments.scale]
    work = arguments.work or CACHE / "evidence" / arguments.scale
    results = arguments.results or HERE / "results" / arguments.scale
    failed = 0
    if not arguments.tables:
        model = arguments.model
        if model is None:
            from smollm2 import model_folder

            model = model_folder(CACHE / "sculpt-demo")
        parts = STAGES[:3]
        if not all((work / part / name / "options.json").exists() for part in parts for name in protocol.datasets):
            if arguments.data is None:
                print("--data: wanted the folder of the O-LoRA benchmark (TYPE/DATASET)", file=sys.stderr)
                return 2
            from data import make_tasks

            make_tasks(arguments.data, model, work, protocol)
        ability = list(arguments.ability or ())
        if protocol.reads_text and arguments.data is not None:
            ability.append(work / "wikipedia.txt")
            known = work / KNOWN_TEXT
            if not (ability[-1].exists() and known.exists()):
                from data import make_texts

                make_texts(arguments.data, ability[-1], known)
        queue = Queue(protocol, arguments.stage, results, arguments.only)
        one = functools.partial(run, model=model, work=work, results=results, ability=ability)
        failed = work_off(queue, one, arguments.jobs, arguments.seconds)
    from tables import write_tables

    write_tables(results, HERE / "README.md", protocol, arguments.scale)
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        type=Path,
        action="append",
        help="folder of the O-LoRA benchmark, or one of the other repositories of long_sequence.py; may be repeated",
    )
    parser.add_argument(
        "--ability",
        type=Path,
        action="append",
        help="file of multiple-choice questions that runs of the comparison are measured on besides; may be repeated",
    )
    parser.add_argument("--model", type=Path, help="model folder; not given, the demo's SmolLM2-135M")
    parser.add_argument(
        "--scale",
        choices=("cpu", "gpu", "long", "long-gpu"),
        default="cpu",
        help="two_cores.py, one_gpu.py, long_sequence.py or long_on_gpu.py",
    )
    parser.add_argument("--stage", choices=("entry", "dev", "final", "ablation", "all"), default="all")
    parser.add_argument("--only", help="only runs with this in their name")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, each in a process of its own")
    parser.add_argument("--seconds", type=float, help="after so many no further run begins")
    parser.add_argument("--tables", action="store_true", help="run nothing, only write the tables")
    parser.add_argument("--results", type=Path, help="not given, results/SCALE")
    parser.add_argument("--work", type=Path, help="task folders and unfinished runs")
    arguments = parser.parse_args()
    if arguments.data is None and (folder := os.environ.get("SCULPT_CL_BENCHMARK")):
        arguments.data = [Path(folder)]
    return arguments


if __name__ == "__main__":
    sys.exit(main())

"""Trains every method on several orders and seeds, and compares what they forget.

`python examples/evidence/evidence.py --data FOLDER` with the O-LoRA benchmark's folder; README.md beside this file says
what is compared and what came out. Runs that have a result are not run again: it can be stopped at any moment.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache"


@dataclass(frozen=True)
class Job:
    """One run. part: "entry", "dev", "final" or "ablation", the folder of its result. method, config: of
    `protocol.CONFIGS` or `protocol.ABLATIONS`. order: "dev", one of `protocol.ORDERS`, or at entry the one task."""

    part: str
    method: str
    config: str
    order: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}, {self.config}, {self.order}, seed {self.seed}"

    @property
    def tasks(self) -> str:
        """Folder of its tasks."""
        return "dev" if self.part == "ablation" else self.part

    @property
    def settings(self) -> dict[str, Any]:
        """What its `TrainConfig` is made from, but for folders and names."""
        from protocol import ABLATIONS, COMMON, CONFIGS

        from sculpt_ops.continual.config import parse_protect

        own = ABLATIONS[self.config] if self.part == "ablation" else CONFIGS[self.method][self.config]
        settings = {**COMMON, **own}
        return {**settings, "protect": parse_protect(settings["protect"])}


def main() -> int:
    arguments = _arguments()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TQDM_DISABLE", "1")
    sys.path.insert(0, str(HERE.parent / "demo"))
    from data import make_tasks
    from smollm2 import model_folder
    from tables import write_tables

    if not arguments.tables:
        model = arguments.model or model_folder(CACHE / "sculpt-demo")
        make_tasks(arguments.data, model, arguments.work)
        for job in jobs(arguments.stage, arguments.results):
            if arguments.only and arguments.only not in job.name:
                continue
            run(job, model, arguments.work, arguments.results)
    write_tables(arguments.results, HERE / "README.md")
    return 0


def jobs(stage: str, results: Path) -> Iterator[Job]:
    """What there is to run: each task alone, every configuration on the development order, then the chosen ones on the
    others."""
    from protocol import ABLATIONS, CONFIGS, DATASETS, ENTRY_RATES, ORDERS, SEEDS
    from tables import choose

    if stage in ("entry", "all"):
        for rate in ENTRY_RATES:
            for task in DATASETS:
                yield Job("entry", "plain", f"lr {rate:g}", task, 0)
    if stage in ("dev", "all"):
        most = max(map(len, CONFIGS.values()))
        for number in range(most):
            for method, configs in CONFIGS.items():
                if number < len(configs):
                    yield Job("dev", method, list(configs)[number], "dev", 0)
    if stage in ("final", "all"):
        chosen = choose(results)
        for seed in SEEDS:
            for order in ORDERS:
                for method, config in chosen.items():
                    yield Job("final", method, config, order, seed)
    if stage in ("ablation", "all"):
        for config in ABLATIONS:
            yield Job("ablation", "sculpt", config, "dev", 0)


def run(job: Job, model: Path, work: Path, results: Path) -> None:
    """Train and measure, unless there is a result."""
    from protocol import DEV_ORDER, ORDERS
    from results import pack

    from sculpt_ops.continual import RunResult, TrainConfig, train

    if (results / job.part / f"{job.name}.json.gz").exists():
        return
    start = time.perf_counter()
    order = (job.order,) if job.part == "entry" else DEV_ORDER if job.order == "dev" else ORDERS[job.order]
    output = work / "runs" / job.part / job.name
    resume = (output / "checkpoint").exists()
    if not resume:
        shutil.rmtree(output, ignore_errors=True)
    first = work / "runs" / job.tasks / ("zero-shot" if job.part != "entry" else f"zero-shot {job.order}")
    config = TrainConfig(
        model=model,
        tasks=[work / job.tasks / name for name in order],
        output=output,
        name=job.name,
        seed=job.seed,
        eval_options=job.part == "final",
        resume=resume,
        **job.settings,
    )
    result = train(config, zero_shot=RunResult.load(first) if first.exists() else None, quiet=True)
    if not first.exists():
        first.mkdir(parents=True)
        for name in ("run.json", "predictions.jsonl"):
            shutil.copy(output / name, first / name)
    pack(
        result,
        results / job.part,
        {"method": job.method, "config": job.config, "order": job.order, "commit": _commit()},
    )
    shutil.rmtree(output)
    print(
        f"{job.part}: {job.name}: AA {result.metrics.average_accuracy.value:.3f}, "
        f"BWT {result.metrics.backward_transfer.value:+.3f}, learned {result.metrics.learning_accuracy.value:.3f}, "
        f"{time.perf_counter() - start:.0f} s",
        flush=True,
    )


def _commit() -> str:
    git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("SCULPT_CL_BENCHMARK"), help="the benchmark's folder"
    )
    parser.add_argument("--model", type=Path, help="model folder; not given, the demo's SmolLM2-135M")
    parser.add_argument("--stage", choices=("entry", "dev", "final", "ablation", "all"), default="all")
    parser.add_argument("--only", help="only runs with this in their name")
    parser.add_argument("--tables", action="store_true", help="run nothing, only write the tables")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--work", type=Path, default=CACHE / "evidence", help="task folders and unfinished runs")
    arguments = parser.parse_args()
    if arguments.data is None and not arguments.tables:
        parser.error("--data: wanted the folder of the O-LoRA benchmark (TYPE/DATASET)")
    return arguments


if __name__ == "__main__":
    sys.exit(main())

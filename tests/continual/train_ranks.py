"""Runs of the trainer one after the other in one process, several of which torchrun starts together.

    train_ranks.py JOBS.json     a list of {"config": settings of TrainConfig, "kill": [rank, task, step], "keep": PATH}

A run with "kill" loses that rank to SIGKILL right after that step, unless torchrun has restarted it; "keep" gets a copy
of the output as it is then.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from sculpt_ops.continual import TrainConfig, train
from sculpt_ops.continual import trainer as module
from sculpt_ops.continual.distributed import restarted


def kill_at(rank: int, task: int, step: int, output: str, keep: str) -> None:
    from sculpt_ops.continual.hf_trainer import StepClock

    learned: list[str] = []
    learn, on_step_end = module.learn, StepClock.on_step_end

    def count(run: Any, index: int) -> Any:
        learned.append(run.tasks[index].name)
        return learn(run, index)

    def kill(clock: StepClock, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_step_end(clock, args, state, control, **kwargs)
        if int(os.environ.get("RANK", "0")) == rank and len(learned) == task and state.global_step == step:
            shutil.copytree(output, keep)
            os.kill(os.getpid(), signal.SIGKILL)

    module.learn = count
    StepClock.on_step_end = kill  # type: ignore[method-assign]


def main(jobs: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    for job in jobs:
        if job.get("kill") and not restarted():
            kill_at(*job["kill"], job["config"]["output"], job["keep"])
        train(TrainConfig(**job["config"]), quiet=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

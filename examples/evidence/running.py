"""One run, from its job to its result."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from jobs import Job

HERE = Path(__file__).resolve().parent
# Of each file of questions.
ABILITY_ITEMS = 150
# Nothing that a result depends on: what a run would keep between tasks takes longer to write there than to make anew.
ON_GPU = {"eval_batch_size": 250, "save_every": None}


def run(job: Job, model: Path, work: Path, results: Path, ability: Sequence[Path] = ()) -> str:
    """Train and measure; returns what came out in a line. A run that was cut short goes on, if it kept its state.

    ability: files that runs of the comparison measure the model on before and after.
    """
    import torch
    from results import pack

    from sculpt_ops.continual import RunResult, TrainConfig, train
    from sculpt_ops.continual.config import GENERATED, parse_protect

    if torch.cuda.is_available():
        _fuse_norms()
    start = time.perf_counter()
    output = work / "runs" / job.part / job.name
    resume = (output / "checkpoint").exists()
    if not resume:
        shutil.rmtree(output, ignore_errors=True)
    # What the model answers before the first task is the same for all.
    first = work / "runs" / job.folder / ("zero-shot" if job.part != "entry" else f"zero-shot {job.order}")
    settings = dict(job.settings)
    if torch.cuda.is_available():
        settings |= ON_GPU
    if job.part == "final" and ability:
        settings |= {"ability": list(ability), "ability_items": ABILITY_ITEMS}
    settings.setdefault("eval_options", job.part == "final")
    if "protect" in settings:
        settings["protect"] = parse_protect(settings["protect"])
    if settings.get("remember_text", GENERATED) != GENERATED:
        settings["remember_text"] = work / settings["remember_text"]
    config = TrainConfig(
        model=model,
        tasks=[work / job.folder / name for name in job.tasks],
        output=output,
        name=job.name,
        seed=job.seed,
        resume=resume,
        **settings,
    )
    result = train(config, zero_shot=RunResult.load(first) if first.exists() else None, quiet=True)
    if not first.exists():
        _publish(output, first)
    about = {"method": job.method, "config": job.config, "order": job.order, "commit": _commit()}
    pack(result, results / job.part, about)
    shutil.rmtree(output)
    metrics = result.metrics
    line = (
        f"{job.label}: AA {metrics.average_accuracy.value:.3f}, BWT {metrics.backward_transfer.value:+.3f}, "
        f"learned {metrics.learning_accuracy.value:.3f}, {time.perf_counter() - start:.0f} s "
        f"(training {sum(task.train_seconds for task in result.learned):.0f}, "
        f"deriving {sum(task.derive_seconds for task in result.learned):.0f}, "
        f"evaluation {sum(result.evaluation_seconds):.0f})"
    )
    if torch.cuda.is_available():
        # What one process keeps in its cache another one on the same GPU lacks.
        gc.collect()
        torch.cuda.empty_cache()
    return line


def _fuse_norms() -> None:
    """LLaMA's norms by torch's own function, one kernel in place of six: steps of so small a model are launches."""
    import torch
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def forward(self: LlamaRMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
        shape = self.weight.shape
        return torch.nn.functional.rms_norm(hidden_states, shape, self.weight, self.variance_epsilon)

    LlamaRMSNorm.forward = forward


def _publish(output: Path, first: Path) -> None:
    """Keep the run's answers before its first task; of several processes that come here the first wins."""
    first.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix="zero-shot.", dir=output.parent))
    for name in ("run.json", "predictions.jsonl"):
        shutil.copy(output / name, partial / name)
    try:
        partial.rename(first)
    except OSError:
        shutil.rmtree(partial)


def _commit() -> str:
    """Of a copy without its repository the one that EVIDENCE_COMMIT names."""
    if named := os.environ.get("EVIDENCE_COMMIT"):
        return named
    git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()

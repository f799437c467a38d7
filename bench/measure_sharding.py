"""What a rank holds and sends with FSDP2: bytes of weights, gradients, bases and moments, and collectives, over gloo.

    python bench/measure_sharding.py --model .cache/sculpt-demo/SmolLM2-135M-Instruct-0.1.2 --results bench/results

Two steps of 32 tokens each; the tensors are counted, so seconds and swapping do not matter. `peak` is that of the
resident set of the process, the rank's copy of the whole model before it is sharded included.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conftest import machine
from torch import Tensor, multiprocessing

from sculpt_ops import AdamW, Subspaces
from sculpt_ops.continual.modeling import open_model
from sculpt_ops.dtensor import local_nbytes

SIZES = (1, 2, 4)
STATES = ("full", "subspace")
PROTECT = 0.5
COLUMNS = ("weights", "gradients", "bases", "moments", "step_bytes", "step_collectives", "setup_bytes", "peak")


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    made.add_argument("--results", type=Path, required=True, help="folder for sharding-<date>.json")
    arguments = made.parse_args()
    rows = [row for state in STATES for size in SIZES for row in launch(arguments.model, size, state)]
    rows = [dict(row, ranks=size, state=state) for (row, size, state) in labelled(rows)]
    print(table(rows))
    today = datetime.date.today().isoformat()
    target = arguments.results / f"sharding-{today}.json"
    facts = machine(("transformers", "numpy"), [])
    facts["command"] = f"python bench/measure_sharding.py --model {arguments.model.name} --results bench/results"
    target.write_text(json.dumps({"machine": facts, "protect": PROTECT, "rows": rows}, indent=1) + "\n")
    print(f"written: {target}")


def labelled(rows: list[dict[str, Any]]) -> Iterable[tuple[dict[str, Any], int, str]]:
    places = [(size, state) for state in STATES for size in SIZES for _ in range(size)]
    return ((row, *place) for row, place in zip(rows, places, strict=True))


def launch(model: Path, size: int, state: str) -> list[dict[str, Any]]:
    """One row a rank. Where one fails the others are ended too, and its error is raised."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(measure, (size, Path(folder), model, state), nprocs=size)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(size)]


def measure(rank: int, size: int, results: Path, folder: Path, state: str) -> None:
    from torch.distributed.fsdp import fully_shard

    from sculpt_ops.distributed.traffic import Traffic

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{results}/store", rank=rank, world_size=size)
    model = open_model(folder)[0]
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    with Traffic() as setup:
        subspaces = Subspaces.from_model(model, protect=PROTECT)
    optimizer = AdamW(model.named_parameters(), lr=1e-5, weight_decay=0.0, subspaces=subspaces, state=state)
    torch.manual_seed(0)
    tokens = torch.randint(1000, (1, 32))
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients = sum(local_nbytes(p.grad) for p in model.parameters() if p.grad is not None)
        with Traffic() as step:
            optimizer.step()
    moments = (value for kept in optimizer.state.values() for value in kept.values() if isinstance(value, Tensor))
    row = {
        "rank": rank,
        "weights": sum(local_nbytes(p) for p in model.parameters()),
        "gradients": gradients,
        "bases": subspaces.memory(),
        "moments": sum(local_nbytes(value) for value in moments),
        "step_bytes": step.bytes,
        "step_collectives": len(step.collectives),
        "setup_bytes": setup.bytes,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    (results / f"{rank}.json").write_text(json.dumps(row))
    dist.destroy_process_group()


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, the largest of all ranks in each cell, in MB."""
    lines = ["| state | ranks | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for state in STATES:
        for size in SIZES:
            chosen = [row for row in rows if (row["state"], row["ranks"]) == (state, size)]
            cells = [
                str(
                    max(row[c] for row in chosen)
                    if c == "step_collectives"
                    else round(max(row[c] for row in chosen) / 1e6)
                )
                for c in COLUMNS
            ]
            lines.append(f"| {state} | {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

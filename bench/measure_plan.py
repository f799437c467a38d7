"""The peaks that `sculpt plan` predicts against those measured on a CPU, one process a setting.

    python bench/measure_plan.py --model .cache/sculpt-demo/SmolLM2-135M-Instruct-0.1.2 --results bench/results

A folder of a decoder-only model; PEFT and mini_trainer only where they are installed (`make bench`). Memory is the
peak of the resident set during a step, less what is resident after imports and a step of a tiny model.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from conftest import machine
from tables import Row
from torch import nn
from training_methods import BF16, SHARES, InBackward, Method, Training, mini_trainer, ours, peft, plain

from sculpt_ops.continual.memory import PeakMemory
from sculpt_ops.continual.modeling import open_model
from sculpt_ops.continual.plan import make_plan
from sculpt_ops.continual.plan.result import Row as PlanRow

PACKAGES = ("transformers", "peft", "rhai-innovation-mini-trainer", "numpy")
# Blocks from this size on go back to the system when they are freed; glibc otherwise raises its threshold to 32 MB
# with the first large block freed, and keeps what is smaller.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}
# Where two threads share two processors with others, the waiting one otherwise takes the time of the one waited for.
ENVIRONMENT["OMP_WAIT_POLICY"] = "passive"
# Rows and their length. With few tokens the peak is in the optimizer's step, with many in the backward pass.
BATCHES = ((1, 32), (4, 128))
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}

Setting = dict[str, Any]
# Of each: how it is trained, and the row of the plan.
SETTINGS: tuple[tuple[Method, Setting], ...] = (
    (plain("AdamW", fused=True), {"method": "AdamW"}),
    *((ours("full", share), {"protect": f"{share:g}"}) for share in SHARES),
    *((ours("subspace", share, state="subspace"), {"protect": f"{share:g}", "state": "subspace"}) for share in SHARES),
    (ours("full, bf16 bases", 0.5, basis_dtype=BF16), {"protect": "0.5", "basis_dtype": "bfloat16"}),
    (
        ours("subspace, in backward", 0.5, state="subspace", kind=InBackward),
        {"protect": "0.5", "state": "subspace", "in_backward": True},
    ),
    (plain("AdamW", BF16, fused=True), {"method": "AdamW", "dtype": "bfloat16"}),
    (
        ours("full, split", 0.5, dtype=BF16, master="split"),
        {"protect": "0.5", "master": "split", "dtype": "bfloat16"},
    ),
    (
        ours("subspace, split", 0.5, dtype=BF16, state="subspace", master="split"),
        {"protect": "0.5", "state": "subspace", "master": "split", "dtype": "bfloat16"},
    ),
    (peft(0.5), {"method": "PEFT OSF", "protect": "0.5"}),
    (mini_trainer(0.5), {"method": "mini_trainer OSFT", "protect": "0.5"}),
)


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--settings", type=int, nargs="*", help="only these, by their place from 0")
    made.add_argument("--results", type=Path, help="folder to write the results file to")
    made.add_argument("--only", type=int, help=argparse.SUPPRESS)
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    if options.only is not None:
        with contextlib.redirect_stdout(sys.stderr):
            row = measured(SETTINGS[options.only][0], options.model)
        print(json.dumps(row))
        return
    compare(options)


def compare(options: argparse.Namespace) -> None:
    """Print and write every setting's peaks as planned and as measured."""
    predicted = plan_peaks(options.model)
    facts = machine(PACKAGES, []) | {"threads": options.threads, "command": " ".join(("python", *sys.argv))}
    facts |= {"model": options.model.name, "batches": BATCHES}
    rows: list[Row] = []
    print(f"{'MB: planned, measured':44}" + "".join(f"{f'{count} x {length}':>24}" for count, length in BATCHES))
    for index, (method, _) in enumerate(SETTINGS):
        if options.settings is not None and index not in options.settings:
            continue
        row = {"name": method.name, "protect": method.protect, "dtype": str(method.dtype).removeprefix("torch.")}
        row |= {"planned": predicted[index]} | in_own_process(index)
        rows.append(row)
        print(show(row), flush=True)
        if options.results is not None:
            path = options.results / f"plan-{facts['date']}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")


def show(row: Row) -> str:
    name = f"{row['name']} {row['protect'] or ''} {row['dtype']}"
    if "note" in row:
        return f"{name:44}{row['note']}"
    pairs = zip(row["planned"], row["measured"], strict=True)
    return f"{name:44}" + "".join(f"{p / 1e6:9.0f}{m / 1e6:7.0f}{p / m - 1:+8.1%}" for p, m in pairs)


def plan_peaks(model: Path) -> list[list[int]]:
    """Of every setting the peak of each batch."""
    planned = []
    for count, length in BATCHES:
        batch = {"bf16": False, "tokens": count * length, "batch_size": count}
        ours = make_plan(model, protect=SHARES, peers=False, **batch).settings
        planned.append((*ours, *make_plan(model, dtypes=("float32",), **batch).settings[-2:]))
    return [[planned_peak(rows, setting) for rows in planned] for _, setting in SETTINGS]


def planned_peak(rows: Sequence[PlanRow], setting: Setting) -> int:
    wanted = {"method": "sculpt", "dtype": "float32", "state": "full", "master": "none", "basis_dtype": None} | setting
    in_backward = wanted.pop("in_backward", False)
    (row,) = (row for row in rows if vars(row.setting).items() >= wanted.items())
    return replace(row, setting=replace(row.setting, in_backward=in_backward)).peak


def in_own_process(index: int) -> Row:
    child = subprocess.run(
        (sys.executable, *sys.argv, "--only", str(index)),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=os.environ | ENVIRONMENT,
    )
    if child.returncode:
        return {"note": f"failed: status {child.returncode}"}
    row: Row = json.loads(child.stdout)
    return row


def measured(method: Method, model: Path) -> Row:
    """Peak bytes of a step of `method` with each batch, above what libraries take."""
    try:
        if method.load is not None:
            method.load()
    except ImportError as error:
        return {"note": f"not installed: {error}"}
    memory = PeakMemory(torch.device("cpu"))
    warm = prepared(method, tiny(method.dtype))
    for batch in BATCHES:
        step(warm, *batch)
    memory.reset()
    baseline = memory.read()
    training = prepared(method, opened(model, method.dtype))
    # Optimizer states are made in the first step and are there during the whole of the second.
    step(training, 1, 8)
    gc.collect()
    peaks = []
    for batch in BATCHES:
        memory.reset()
        step(training, *batch)
        peaks.append(memory.read() - baseline)
    return {"measured": peaks, "baseline": baseline}


def tiny(dtype: torch.dtype) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**TINY)).to(dtype)


def opened(folder: Path, dtype: torch.dtype) -> nn.Module:
    model: nn.Module = open_model(folder, str(dtype).removeprefix("torch."))[0]
    for parameter in model.parameters():
        # Out of the mapped file, whose pages are resident as long as a tensor looks at it.
        parameter.data = parameter.data.clone()
    return model.train()


def prepared(method: Method, model: nn.Module) -> Training:
    if method.convert is not None:
        model = method.convert(model)
    return method.prepare(model, 1e-5)


def step(training: Training, rows: int, length: int) -> None:
    tokens = torch.randint(TINY["vocab_size"], (rows, length))
    training.model(input_ids=tokens, labels=tokens).loss.backward()
    training.step()


if __name__ == "__main__":
    main()

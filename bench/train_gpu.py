"""What training a LLaMA at full size takes on one GPU: peak memory against `sculpt plan`'s, seconds of a step by part.

    python bench/train_gpu.py --plan-only plan.json    # what the plan says: needs no GPU, takes seconds
    python bench/train_gpu.py --plan plan.json         # on the GPU; without --plan it is made there first
    python bench/train_gpu.py --device cpu --model config.json    # of a tiny one, to try the script

Weights are random and all layers alike, so that the bases of one layer are found once and copied for every other, each
copy in memory of its own. Memory and seconds are those of a model of this size; a loss, or how much of the weights the
bases hold, would say nothing. The leak is that of layer 0, in float64; bfloat16 weights without "split" are rounded at
each step, which at this learning rate is most of their change.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tables import Row
from torch import Tensor, nn

from sculpt_ops import AdamW, Rank, Subspaces
from sculpt_ops.bench.command import facts
from sculpt_ops.bench.report import name_of
from sculpt_ops.bench.timing import synchronize
from sculpt_ops.continual.plan import make_plan
from sculpt_ops.continual.plan.models import fake_model, open_config
from sculpt_ops.continual.plan.result import Row as PlanRow
from sculpt_ops.continual.policies import format_protect
from sculpt_ops.files import replacing
from sculpt_ops.layer import LayerSubspace
from sculpt_ops.leak import measure_exact, sketch_weight
from sculpt_ops.ops.heuristics import triton_missing
from sculpt_ops.ops.variants import cuda_missing

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NOTE = "Random weights, all layers alike: memory and seconds hold, accuracy would mean nothing."
HEADING = f"{'GB, seconds':40}  planned     peak           reserved  forward+backward     clip     step     leak"
# Learning rate and norm of examples/llama2/standard.yaml.
LR, CLIP = 1e-5, 1.0
# The first step makes the optimizer's states and compiles kernels.
STEPS, WARM_UP = 3, 1
PARTS = ("forward_backward", "clip", "step")

Bases = dict[str, LayerSubspace]


@dataclass(frozen=True)
class Setting:
    """protect: None is torch's fused AdamW, which trains every parameter; ours trains the matrices with a basis."""

    protect: float | Rank | None = 0.5
    state: str = "subspace"
    master: str = "split"
    basis_dtype: torch.dtype | None = torch.bfloat16

    @property
    def name(self) -> str:
        if self.protect is None:
            return "torch AdamW"
        bases = "float32" if self.basis_dtype is None else "bf16"
        return f"{format_protect(self.protect)}, {self.state}, {self.master}, {bases} bases"

    @property
    def planned_moments(self) -> str | None:
        """Of bfloat16 weights no plan is without a master; with 16-bit moments "stochastic" keeps the same tensors."""
        return "bfloat16" if self.master == "none" else None

    def is_planned(self, row: PlanRow) -> bool:
        wanted: Row = {"method": "AdamW"}
        if self.protect is not None:
            wanted = {"method": "sculpt", "protect": format_protect(self.protect), "state": self.state}
            wanted["master"] = "stochastic" if self.master == "none" else self.master
            wanted["basis_dtype"] = None if self.basis_dtype is None else "bfloat16"
        return vars(row.setting).items() >= wanted.items()


# The first is examples/llama2/standard.yaml; the last goes through the kernels that read a matrix once.
SETTINGS = (
    Setting(),
    Setting(master="stochastic"),
    Setting(protect=0.75),
    Setting(protect=None),
    Setting(Rank(64), "full", "none", None),
)


class Work(NamedTuple):
    """What every setting is measured on. batch: rows, and their length in tokens."""

    config: PretrainedConfig
    batch: tuple[int, int]
    device: torch.device


def main() -> None:
    begin, options = time.monotonic(), parse()
    config = open_config(options.model)
    config.num_hidden_layers = options.layers or config.num_hidden_layers
    work = Work(config, (options.rows, options.length), torch.device(options.device))
    result: Row = {"model": options.model, "layers": config.num_hidden_layers, "batch": list(work.batch)}
    if options.plan is None:
        plan = result | {"planned": planned_rows(work)}
    else:
        plan = json.loads(options.plan.read_text(encoding="utf-8"))
        if not plan.items() >= result.items():
            raise SystemExit(f"--plan: {options.plan} is of another model or batch, wanted {result}")
    if options.plan_only is not None:
        write(options.plan_only, plan)
        print("\n".join(f"{name:40}{row['peak'] / 1e9:9.2f} GB" for name, row in plan["planned"].items()))
        return
    trial = work.device.type == "cpu" or options.layers is not None
    result |= {"note": NOTE, "dry_run": trial, "lr": LR, "warm_up": WARM_UP}
    result |= {"machine": machine(work.device), "rows": []}
    path = options.output / f"train-{name_of(result)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"{NOTE}\n{HEADING}")
    for setting, measured in measured_rows(work, begin + options.seconds):
        row = {"name": setting.name, "planned": plan["planned"][setting.name]} | measured
        result["rows"].append(row)
        write(path, result)
        print(show(row), flush=True)
    print(f"written: {path}")


def parse() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="llama-2-7b", help="a name that `sculpt plan` knows, or a LLaMA's config.json")
    made.add_argument("--layers", type=int, help="fewer than the model has, for a trial")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--rows", type=int, default=8, help="of a batch")
    made.add_argument("--length", type=int, default=256, help="of a row, in tokens")
    made.add_argument("--seconds", type=float, default=80.0, help="no setting begins after these")
    made.add_argument("--output", type=Path, default=Path("bench/results"), help="folder for the results file")
    made.add_argument("--plan", type=Path, metavar="FILE", help="what --plan-only wrote")
    made.add_argument("--plan-only", type=Path, metavar="FILE", help="write what is planned, and measure nothing")
    return made.parse_args()


def planned_rows(work: Work) -> dict[str, Row]:
    """Of every setting the bytes of the planned peak and its parts, and the least seconds of a step."""
    options: Row = {"others": "freeze", "dtypes": ("bfloat16",), "gradient_checkpointing": True, "peers": False}
    options |= {"tokens": work.batch[0] * work.batch[1], "batch_size": work.batch[0]}
    rows: list[PlanRow] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        work.config.to_json_file(path, use_diff=False)
        for moments in (None, "bfloat16"):
            shares = [setting.protect for setting in SETTINGS if setting.planned_moments == moments]
            protect = [share for share in dict.fromkeys(shares) if share is not None]
            rows += make_plan(path, protect=protect, moment_dtype=moments, **options).settings
    chosen = {setting.name: next(filter(setting.is_planned, rows)) for setting in SETTINGS}
    return {name: {"seconds": row.seconds} | asdict(row)["memory"] for name, row in chosen.items()}


def machine(device: torch.device) -> Row:
    """cuda_kernels, triton_kernels: why those of this package cannot be used, None where they can."""
    from transformers import __version__

    kernels = {"cuda_kernels": cuda_missing(), "triton_kernels": triton_missing()}
    allocator, command = os.environ.get("PYTORCH_ALLOC_CONF"), " ".join(("python", *sys.argv))
    return facts(device) | kernels | {"transformers": __version__, "allocator": allocator, "command": command}


def write(path: Path, content: Row) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def show(row: Row) -> str:
    planned = row["planned"]["peak"]
    line = f"{row['name']:40}{planned / 1e9:9.2f}"
    if "note" in row:
        return f"{line}  {row['note']}"
    peak, reserved = row["memory"]["peak"], row["memory"]["reserved"]
    line += f"{'-':>9}" * 3 if peak is None else f"{peak / 1e9:9.2f}{peak / planned - 1:+9.1%}{reserved / 1e9:9.2f}"
    line += "".join(f"{row['median'][part]:{width}.3f}" for part, width in zip(PARTS, (18, 9, 9), strict=True))
    return line + (f"{row['leak']:9.1e}" if "leak" in row else f"{'-':>9}")


def measured_rows(work: Work, deadline: float) -> Iterator[tuple[Setting, Row]]:
    """Every setting with what was measured of it, and a note where that is not all."""
    found: dict[tuple[Any, ...], tuple[Bases, float]] = {}
    for setting in SETTINGS:
        key, row = (setting.protect, setting.basis_dtype), Row()
        try:
            if time.monotonic() > deadline:
                row["note"] = "no time left"
            elif setting.protect is None:
                measure(setting, work, None, row)
            else:
                if key not in found:
                    found[key] = find_bases(setting, work)
                bases, seconds = found[key]
                row["bases_s"] = {"layer": seconds, "model": seconds * work.config.num_hidden_layers}
                measure(setting, work, bases, row)
        except torch.OutOfMemoryError as error:
            row |= {"note": "out of memory", "error": str(error), "memory": memory(work.device)}
        except Exception as error:
            row["note"] = f"failed: {type(error).__name__}: {error}".splitlines()[0]
        yield setting, row


def random_model(work: Work, layers: int) -> Any:
    """In bfloat16, with gradient checkpointing. The weights of every layer are the same, whatever `layers` is."""
    config = copy.deepcopy(work.config)
    config.num_hidden_layers = layers
    # Outside of a FakeTensorMode it is a real model, initialised where it is made, position encodings included.
    with work.device:
        model = fake_model(config, torch.bfloat16, gradient_checkpointing=True)
    first, *others = model.model.layers
    torch.manual_seed(0)
    for parameter in first.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
    for layer in others:
        layer.load_state_dict(first.state_dict())
    return model


def find_bases(setting: Setting, work: Work) -> tuple[Bases, float]:
    """Of layer 0, on the CPU: they are no part of what is measured. And the seconds that it took to find them."""
    release(work.device)
    model = random_model(work, layers=1)
    begin = now(work.device)
    subspaces = Subspaces.from_model(model, setting.protect, basis_dtype=setting.basis_dtype)
    seconds = now(work.device) - begin
    return {name: layer.to("cpu") for name, layer in subspaces.items()}, seconds


def spread(bases: Bases, model: nn.Module, work: Work) -> Subspaces:
    """A copy of layer 0's bases for each layer of `model`, with the sketches that `Subspaces.leak` needs."""
    here = {name: layer.to(work.device) for name, layer in bases.items()}
    layers: dict[str, LayerSubspace] = {}
    sketches: dict[str, Tensor] = {}
    for index in range(work.config.num_hidden_layers):
        for first, layer in here.items():
            name = first.replace(".layers.0.", f".layers.{index}.")
            layers[name] = copy.deepcopy(layer)
            sketches[name] = sketch_weight(layer, model.get_parameter(name).detach(), name)
    return Subspaces(layers, sketches).bind(model)


def optimizer_of(setting: Setting, model: nn.Module, subspaces: Subspaces | None) -> torch.optim.AdamW:
    if subspaces is None:
        return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in subspaces)
    trained = [(name, model.get_parameter(name)) for name in subspaces]
    options: Row = {"state": setting.state, "master": setting.master}
    return AdamW(trained, lr=LR, weight_decay=0.0, subspaces=subspaces, **options)


def measure(setting: Setting, work: Work, bases: Bases | None, row: Row) -> None:
    """A few steps of `setting`, into `row`. memory: the peak is since before its model was made, when there was
    `before`; `now` is what stays between steps."""
    release(work.device)
    before, begin = memory(work.device)["now"], now(work.device)
    model = random_model(work, work.config.num_hidden_layers)
    subspaces = None if bases is None else spread(bases, model, work)
    optimizer = optimizer_of(setting, model, subspaces)
    start = {name: model.get_parameter(name).detach().cpu().clone() for name in bases or ()}
    row |= {"setup_s": now(work.device) - begin, "losses": [], "seconds": {part: [] for part in PARTS}}
    for _ in range(STEPS):
        tokens = torch.randint(work.config.vocab_size, work.batch, device=work.device)
        loss, *seconds = step(model, optimizer, tokens)
        row["losses"].append(loss)
        for part, value in zip(PARTS, seconds, strict=True):
            row["seconds"][part].append(value)
    row["median"] = {part: statistics.median(values[WARM_UP:]) for part, values in row["seconds"].items()}
    row["memory"] = memory(work.device) | {"before": before}
    if subspaces is not None and isinstance(optimizer, AdamW):
        weights = ((name, optimizer.master_weight(model.get_parameter(name))) for name in start)
        leaks = [measure_exact(subspaces[name], weight, start[name]).total for name, weight in weights]
        row["leak"] = statistics.median(leaks)


def step(model: nn.Module, optimizer: torch.optim.AdamW, tokens: Tensor) -> list[float]:
    """The loss, and the seconds of every part."""
    times = [now(tokens.device)]
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    times.append(now(tokens.device))
    if isinstance(optimizer, AdamW):
        optimizer.clip_grad_norm_(CLIP)
    else:
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    times.append(now(tokens.device))
    optimizer.step()
    times.append(now(tokens.device))
    optimizer.zero_grad()
    return [float(loss.detach()), *(end - begin for begin, end in pairwise(times))]


def now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


def memory(device: torch.device) -> dict[str, int | None]:
    """Bytes on a GPU: allocated now and at most since the last `release`, and reserved at most."""
    if device.type != "cuda":
        return dict.fromkeys(("now", "peak", "reserved"))
    allocated, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    return {"now": allocated, "peak": peak, "reserved": torch.cuda.max_memory_reserved(device)}


def release(device: torch.device) -> None:
    """Give back what nothing holds any more, and count peaks from here on."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


if __name__ == "__main__":
    main()

"""Trains a small model, saves every other step, and goes on from the last checkpoint: killed at random by the test.

Arguments: folder, state, master. Writes checkpoints to the folder, and done.safetensors at the end.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sculpt_ops import AdamW, Subspaces

STEPS = 60
TARGETS = ["0.weight", "2.weight"]


def make_model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 40)).to(dtype)


def batch(step: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(16, 40, generator=torch.Generator().manual_seed(step)).to(dtype)


def save(folder: Path, step: int, model: nn.Module, optimizer: AdamW, subspaces: Subspaces) -> None:
    """A folder beside, renamed when it is whole; only then the earlier one goes."""
    new = folder / "new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    state = optimizer.state_dict()
    tensors = {f"{i}:{key}": value for i, entry in state["state"].items() for key, value in entry.items()}
    save_file({f"model:{name}": value for name, value in model.state_dict().items()}, new / "model.safetensors")
    save_file({key: value.contiguous() for key, value in tensors.items()}, new / "optimizer.safetensors")
    (new / "groups.json").write_text(json.dumps(state["param_groups"]))
    subspaces.save(new / "subspaces.safetensors")
    new.rename(folder / f"step-{step}")
    for old in folder.glob("step-*"):
        if int(old.name.removeprefix("step-")) < step:
            shutil.rmtree(old)


def resume(folder: Path, model: nn.Module, **options: str) -> tuple[int, AdamW, Subspaces]:
    steps = [int(path.name.removeprefix("step-")) for path in folder.glob("step-*")]
    if not steps:
        subspaces = Subspaces.from_model(model, 0.4, targets=TARGETS)
        optimizer = AdamW(model.named_parameters(), 1e-2, subspaces=subspaces, **options)  # type: ignore[arg-type]
        return 0, optimizer, subspaces
    at = folder / f"step-{max(steps)}"
    weights = load_file(at / "model.safetensors")
    model.load_state_dict({name.removeprefix("model:"): value for name, value in weights.items()})
    subspaces = Subspaces.load(at / "subspaces.safetensors", model)
    optimizer = AdamW(model.named_parameters(), 1e-2, subspaces=subspaces, **options)  # type: ignore[arg-type]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(at / "optimizer.safetensors").items():
        index, _, name = key.partition(":")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": json.loads((at / "groups.json").read_text())})
    return max(steps), optimizer, subspaces


def main() -> None:
    folder, state, master = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dtype = torch.float32 if master == "none" else torch.bfloat16
    model = make_model(dtype)
    done, optimizer, subspaces = resume(folder, model, state=state, master=master)
    print("ready", flush=True)
    for step in range(done, STEPS):
        x = batch(step, dtype)
        (model(x) - x).float().square().mean().backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 2:
            save(folder, step + 1, model, optimizer, subspaces)
            print(step + 1, flush=True)
    weights = {name: optimizer.master_weight(p) for name, p in model.named_parameters()}
    save_file(weights, folder / "done.safetensors")


if __name__ == "__main__":
    main()

"""The script that measures training at full size on a GPU, with a tiny LLaMA on the CPU."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

pytest.importorskip("transformers", reason="the script needs pip install sculpt-ops[train]")

import train_gpu
from train_gpu import (
    PARTS,
    SETTINGS,
    Setting,
    Work,
    find_bases,
    measured_rows,
    optimizer_of,
    planned_rows,
    random_model,
    spread,
)

from sculpt_ops import AdamW, Subspaces
from sculpt_ops.continual.plan.models import open_config

TINY = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 64,
}
FEW = {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture
def work(config: Path) -> Work:
    return Work(open_config(config), (2, 16), torch.device("cpu"))


@pytest.mark.filterwarnings("ignore:protected weights in 16 bit")
def test_every_setting_is_planned_and_measured(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan made first, as for a machine that is lent for a short time; one layer more than the model has."""

    def run(*arguments: str) -> None:
        words = ("--model", str(config), "--layers", "3", "--rows", "2", "--length", "16", "--device", "cpu")
        monkeypatch.setattr(sys, "argv", ["train_gpu.py", *words, *arguments])
        train_gpu.main()

    plan = str(tmp_path / "plan.json")
    run("--plan-only", plan)
    run("--plan", plan, "--output", str(tmp_path / "results"))
    (written,) = (tmp_path / "results").iterdir()
    assert written.name.startswith("train-dry-run-cpu-")
    result = json.loads(written.read_text())
    assert (result["layers"], result["batch"]) == (3, [2, 16])
    assert "random weights" in result["note"].lower()
    assert [row["name"] for row in result["rows"]] == [setting.name for setting in SETTINGS]
    for setting, row in zip(SETTINGS, result["rows"], strict=True):
        assert "note" not in row
        assert all(len(row["seconds"][part]) == 3 and row["median"][part] > 0 for part in PARTS)
        assert ("leak" in row) == (setting.protect is not None)
        if setting.protect is not None and setting.master == "split":
            assert row["leak"] < 1e-3
    assert len({row["planned"]["peak"] for row in result["rows"]}) == len(SETTINGS)
    with pytest.raises(SystemExit, match="of another model or batch"):
        run("--plan", plan, "--rows", "4")


def test_layers_are_alike_and_share_no_memory(work: Work) -> None:
    """What is found of the one layer is what would be found of each."""
    model, alone = random_model(work, 2), random_model(work, 1)
    for name, parameter in alone.model.layers[0].named_parameters():
        for layer in model.model.layers:
            assert torch.equal(layer.get_parameter(name), parameter)
    assert len({parameter.data_ptr() for parameter in model.parameters()}) == len(list(model.parameters()))
    frequencies = model.model.rotary_emb.inv_freq
    torch.testing.assert_close(frequencies, 10000.0 ** -(torch.arange(16) / 16))

    bases, _ = find_bases(SETTINGS[0], work)
    subspaces = spread(bases, model, work)
    expected = Subspaces.from_model(model, 0.5, basis_dtype=torch.bfloat16)
    assert list(subspaces) == list(expected)
    assert subspaces.memory() == expected.memory()
    tensors = [tensor for layer in (*subspaces.values(), *bases.values()) for tensor in layer.tensors()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)
    for name in FEW:
        ours, theirs = (each[name].left for each in (subspaces, expected))
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(ours @ ours.mT, theirs @ theirs.mT, atol=0.02, rtol=0)
    # The sketches are those of each name's own signs: nothing has changed yet.
    assert all(leak.change < 1e-9 for leak in subspaces.leak().values())


@pytest.mark.filterwarnings("ignore:protected weights in 16 bit")
@pytest.mark.parametrize("setting", SETTINGS, ids=[setting.name for setting in SETTINGS])
def test_what_is_kept_is_what_is_planned(setting: Setting, work: Work) -> None:
    """Weights, bases and states, to the byte: the rows of the plan are those of the settings."""
    model = random_model(work, 2)
    subspaces = None if setting.protect is None else spread(find_bases(setting, work)[0], model, work)
    optimizer = optimizer_of(setting, model, subspaces)
    train_gpu.step(model, optimizer, torch.randint(512, work.batch))
    states = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v) and v.dim()]
    planned = planned_rows(work)[setting.name]
    assert sum(parameter.nbytes for parameter in model.parameters()) == planned["weights"]
    assert (0 if subspaces is None else subspaces.memory()) == planned["bases"]
    assert sum(state.nbytes for state in states) == planned["states"]
    assert isinstance(optimizer, AdamW) == (setting.protect is not None)


def test_what_fails_is_a_row(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(setting: Setting, work: Work, bases: Any, row: dict[str, Any]) -> None:
        row["setup_s"] = 1.0
        if setting.master == "stochastic":
            raise ArithmeticError("no convergence\nafter 10 steps")
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(train_gpu, "measure", failing)
    found = dict(measured_rows(work, time.monotonic() + 60))
    assert list(found) == list(SETTINGS)
    assert all(row["setup_s"] == 1.0 for row in found.values())
    notes = [row["note"] for row in found.values()]
    assert notes[1] == "failed: ArithmeticError: no convergence"
    assert set(notes[:1] + notes[2:]) == {"out of memory"}
    assert {row["note"] for _, row in measured_rows(work, 0.0)} == {"no time left"}
    shown = train_gpu.show({"name": "a", "planned": {"peak": 10**9}} | found[SETTINGS[0]])
    assert shown.split() == ["a", "1.00", "out", "of", "memory"]

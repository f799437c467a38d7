"""A model by its name on the hub, in a namespace or in none; nothing here asks the network."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from sculpt_ops.continual import TrainConfig, train
from sculpt_ops.continual.modeling import may_be_on_hub, open_model
from sculpt_ops.continual.plan.models import open_config

pytest.importorskip("transformers", reason="the trainer needs pip install sculpt-ops[train]")
import huggingface_hub.constants
from typer.testing import CliRunner

from sculpt_ops.continual.cli import app

NAMES = ["gpt9", "t5-enormous", "org/gpt9", "org.of-many/gpt_9.5"]
PATHS = ["./gpt9", "../gpt9", "/gpt9", "~/gpt9", "~gpt9", "models/org/gpt9", "gpt9/", "models\\gpt9"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands for the hub: an empty cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def keep(cache: Path, name: str, folder: Path) -> None:
    """The files of `folder` in the cache, as a download of `name` would leave them."""
    kept, commit = cache / f"models--{name.replace('/', '--')}", "0" * 40
    shutil.copytree(folder, kept / "snapshots" / commit)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(commit)


@pytest.mark.parametrize("name", ["tiny", "org/tiny"])
def test_a_model_in_the_cache_is_opened_by_its_name(
    name: str, cache: Path, model_folder: Path, short: dict[str, Any]
) -> None:
    keep(cache, name, model_folder)
    model, tokenizer = open_model(name)
    assert len(tokenizer) == model.config.vocab_size
    assert open_config(name).hidden_size == model.config.hidden_size
    inspected = CliRunner().invoke(app, ["inspect", name, "--protect", "0.25"])
    assert inspected.exit_code == 0, inspected.output
    assert train(TrainConfig(**{**short, "model": name, "max_steps": 1}, output="out"), quiet=True).complete


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_neither_here_nor_to_be_had(name: str, cache: Path, short: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        train(TrainConfig(**{**short, "model": name}, output="out"), quiet=True)
    said = f"model: cannot open {name}: there is no folder of this name here, and the hub did not give it: We couldn't"
    assert str(caught.value).startswith(said)
    assert not Path("out").exists()
    planned = CliRunner().invoke(app, ["plan", name])
    assert planned.exit_code == 2
    (line,) = planned.stderr.splitlines()
    assert line.startswith(f"error: model: cannot plan for {name}: there is no such folder or config.json, it is none")
    assert "t5-large, and the hub did not give it: We couldn't connect" in line


def test_what_can_only_be_a_path_is_not_looked_for_on_the_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(map(may_be_on_hub, NAMES))
    Path("notes.txt").write_text("")
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", None)
    for path in [*PATHS, str(Path.cwd() / "gpt9"), "notes.txt"]:
        assert not may_be_on_hub(path)
        with pytest.raises(ValueError, match="model: there is no folder ") as caught:
            open_model(path)
        assert path in str(caught.value)
        with pytest.raises(ValueError, match=r"cannot plan for .* and no hub name$"):
            open_config(path)
    with pytest.raises(ValueError, match=r"cannot plan for config\.json: .* and no hub name$"):
        open_config("config.json")
    # A folder, whatever it is called.
    Path("gpt9").mkdir()
    assert not may_be_on_hub("gpt9")

"""A model by its name on the hub, in a namespace or in none; nothing here asks the network beyond this machine."""

from __future__ import annotations

import shutil
import socket
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from sculpt_ops.continual import TrainConfig, hub, train
from sculpt_ops.continual.hub import may_be_on_hub
from sculpt_ops.continual.modeling import open_model
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
    unasked = "the hub was not reached (HF_HUB_OFFLINE is set) and its cache does not have it"
    assert str(caught.value) == f"model: cannot open {name}: there is no folder of this name here, and {unasked}"
    assert not Path("out").exists()
    planned = CliRunner().invoke(app, ["plan", name])
    assert planned.exit_code == 2
    (line,) = planned.stderr.splitlines()
    assert line.startswith(f"error: model: cannot plan for {name}: there is no such folder or config.json, it is none")
    assert line.endswith(f"t5-large, and {unasked}")


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
    # A folder, whatever it is called, and what would lie in one.
    Path("gpt9").mkdir()
    assert not may_be_on_hub("gpt9")
    with pytest.raises(ValueError, match=r"no folder gpt9/small \(gpt9 is one here: the hub is not asked\)$"):
        open_model("gpt9/small")


def test_without_a_network_the_cache_is_all_there_is(
    cache: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    # The hub's own client would try for 23 seconds.
    tried: list[Any] = []
    monkeypatch.setattr("huggingface_hub.utils._http.http_backoff", lambda *asked, **_: tried.append(asked))
    for open_ in (open_model, open_config):
        with pytest.raises(ValueError, match=r"no (such )?folder .*the hub was not reached \(http://127.0.0.1:9: .*"):
            open_("org/tiny")
    keep(cache, "org/tiny", model_folder)
    assert open_config("org/tiny").hidden_size == open_model("org/tiny")[0].config.hidden_size
    assert not tried


def test_a_hub_that_says_nothing_is_not_waited_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        with pytest.raises(ValueError, match=f"the hub was not reached \\({endpoint}: "):
            open_model("org/tiny")


def test_a_hub_that_answers_is_asked_for_the_model(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    asked: list[bool] = []

    def refuse(name: str, local_files_only: bool, **options: Any) -> None:
        asked.append(local_files_only)
        raise OSError(f"{name} is not a local folder and is not a valid model identifier")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        serving = Thread(target=server.serve_forever)
        serving.start()
        try:
            for open_ in (open_model, open_config):
                with pytest.raises(ValueError, match="and the hub did not give it: org/tiny is not a local folder"):
                    open_("org/tiny")
        finally:
            server.shutdown()
            serving.join()
    assert asked == [False, False]

"""Settings: read, checked, and refused before anything is written."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sculpt_ops.continual import TrainConfig, train
from sculpt_ops.continual.config import METHODS, format_protect, parse_protect
from sculpt_ops.ranks import Fraction


def test_an_output_that_is_not_empty_is_refused(short: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not empty; name a new folder"):
        train(TrainConfig(**short, output=tmp_path), quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"targets": "*.nothing.weight"}, "matches no parameter"),
        ({"max_length": 4096}, "max_length: got 4096, the model has positions for 128 tokens"),
        ({"lr_scheduler_type": "sideways"}, "sideways"),
        ({"model": "./no/model/here"}, r"model: there is no folder \./no/model/here"),
        ({"tasks": ["./no/tasks/here"]}, "tasks: there is no folder"),
        ({"dev_items": 16}, "dev_items: got 16, task colours has 16"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(
    change: dict[str, Any], complaint: str, short: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=complaint):
        train(TrainConfig(**{**short, **change}, output=tmp_path / "out"), quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_model_is_named(short: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="model: cannot open") as caught:
        train(TrainConfig(**{**short, "model": tmp_path / "empty"}, output=tmp_path / "out"), quiet=True)
    assert "\n" not in str(caught.value)


def test_quantised_weights_are_refused(short: dict[str, Any], model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "quantised")
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="its weights are quantised"):
        train(TrainConfig(**{**short, "model": folder}, output=tmp_path / "out"), quiet=True)


def test_processes_that_nobody_started_are_refused(
    short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes, but no RANK"):
        train(TrainConfig(**short, output=tmp_path / "out"), quiet=True)


@pytest.mark.parametrize(
    "text", ["0.5", "rank:64", "energy:0.9", "importance:0.2:0.7", "schedule", "schedule:2:5", "none"]
)
def test_what_to_protect_is_read_as_it_is_written(text: str) -> None:
    assert format_protect(parse_protect(text)) == text
    TrainConfig("model", ["task"], "output", protect=parse_protect(text))


@pytest.mark.parametrize(
    ("given", "protect", "remember", "others", "lr"),
    [
        ({}, 0.0, "inputs:0.95", "freeze", 1e-4),
        ({"method": "random"}, 0.0, "inputs:0.95", "freeze", 4e-5),
        ({"protect": 0.25}, 0.25, None, "train", 2e-5),
        ({"protect": 0.25, "remember": "rank:3", "others": "freeze", "lr": 1.0}, 0.25, "rank:3", "freeze", 1.0),
        ({"remember": "rank:3"}, 0.0, "rank:3", "freeze", 1e-4),
        ({"protect": None}, None, None, "train", 2e-5),
        ({"remember": None}, 0.5, None, "train", 2e-5),
        ({"remember": None, "protect": None}, None, None, "train", 2e-5),
        ({"method": "plain"}, None, None, "train", 2e-5),
        ({"method": "first"}, 0.5, None, "train", 2e-5),
        ({"method": "peft-osf"}, 0.5, None, "train", 3e-5),
        ({"method": "lora"}, None, None, "train", 1e-3),
    ],
)
def test_what_is_left_open_is_what_did_best_for_the_method(
    given: dict[str, Any], protect: float | None, remember: str | None, others: str, lr: float
) -> None:
    config = TrainConfig("m", ["t"], "o", **given)
    assert (config.protect, config.remember, config.others, config.lr) == (protect, remember, others, lr)
    # A copy is of these, whatever it changes.
    assert dataclasses.replace(config, seed=1).remember == remember


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("plain", {"protect": 0.5}),
        ("plain", {"others": "freeze"}),
        ("lora", {"remember": "inputs:0.9"}),
        ("lora", {"sides": "left"}),
        ("sculpt", {"ewc_lambda": 1.0}),
        ("first", {"remember": "rank:4"}),
        ("plain", {"remember_text": "known.txt"}),
        ("ewc", {"targets": "*.x"}),
        ("o-lora", {"interpolation": 0.1}),
        ("per-task", {"state": "subspace"}),
    ],
)
def test_a_setting_that_the_method_has_no_use_for_is_refused(method: str, given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(ValueError, match=rf"^{name}: got .* with method '{method}', which has no use for it; leave it"):
        TrainConfig("m", ["t"], "o", method=method, **given)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_left_open_is_never_refused(method: str) -> None:
    config = TrainConfig("m", ["t"], "o", method=method)
    assert dataclasses.replace(config, seed=1).method == method
    if method != "peft-osf":
        assert TrainConfig("m", ["t"], "o", method=method, protect=None, remember=None).protect is None


def test_importance_alone_takes_the_published_ratios() -> None:
    assert parse_protect("importance") == parse_protect("importance:0.1:0.8")


def test_every_kind_of_policy_has_a_name() -> None:
    assert format_protect(Fraction(0.25)) == format_protect(0.25) == "0.25"


@pytest.mark.parametrize(
    "text",
    [
        *("half", "rank:0.5", "rank:", "energies:0.9", "energy:2", "", "none:1"),
        *("importance:0.1", "importance:0.8:0.1", "schedule:2", "schedule:3:2", "schedule:1:2:3"),
    ],
)
def test_what_to_protect_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match="protect: got"):
        parse_protect(text)


@pytest.mark.parametrize(
    "change",
    [
        {"sides": "top"},
        {"others": "ignore"},
        {"dtype": "int8"},
        {"state": "half"},
        {"master": "fp32"},
        {"moment_dtype": "float16"},
        {"basis_dtype": "float64"},
        {"decay_to": "mean"},
        {"leak_every": -1},
        {"lr": 0.0},
        {"batch_size": 0},
        {"eval_items": 0},
        {"max_grad_norm": -1.0},
        {"protect": 1.5},
        {"tasks": []},
    ],
)
def test_settings_out_of_range_are_named(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=name):
        TrainConfig(**{"model": "m", "tasks": ["t"], "output": "o", **change})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"master": "split"}, "master: got 'split' with dtype 'float32'"),
        ({"master": "stochastic", "dtype": "float16"}, "master: got 'stochastic' with dtype 'float16'"),
        ({"state": "subspace", "sides": "block"}, "state: got 'subspace' with sides 'block'"),
        ({"fuse_backward": True}, r"fuse_backward: got True with max_grad_norm 1\.0"),
        (
            {"fuse_backward": True, "max_grad_norm": 0.0, "gradient_accumulation_steps": 2},
            "fuse_backward: got True with gradient_accumulation_steps 2 and state 'full'",
        ),
    ],
)
def test_settings_that_exclude_each_other_are_named(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        TrainConfig(**{"model": "m", "tasks": ["t"], "output": "o", **change})


def test_without_protection_the_state_is_that_of_plain_weights() -> None:
    config = TrainConfig("m", ["t"], "o", protect=None, state="subspace", sides="block")
    assert {config.to_dict()[name] for name in ("sides", "targets", "others", "basis_dtype", "state")} == {None}

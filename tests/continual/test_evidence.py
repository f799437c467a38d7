"""The evidence: results as files, the choice of configurations, the tables, and a whole run on tiny data."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the trainer needs pip install sculpt-ops[train]")

from sculpt_ops.continual import Prediction, RunResult
from sculpt_ops.continual.config import TrainConfig
from sculpt_ops.continual.metrics import average_accuracy
from sculpt_ops.continual.policies import parse_protect
from sculpt_ops.continual.result import LearnedTask

FOLDER = Path(__file__).parents[2] / "examples" / "evidence"
TASKS = ["dbpedia", "agnews"]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    import importlib

    names = ("protocol", "results", "tables", "evidence")
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    yield {name: importlib.import_module(name) for name in names}
    for name in (*names, "data"):
        sys.modules.pop(name, None)


@pytest.fixture
def write_benchmark(tmp_path: Path) -> Path:
    """Two tasks in the benchmark's layout."""
    for name, answers in (("one", ("green", "blue")), ("two", ("moo", "bark"))):
        folder = tmp_path / "data" / "TC" / name
        folder.mkdir(parents=True)
        (folder / "labels.json").write_text(json.dumps(list(answers)))
        for part, count in (("train", 30), ("test", 8)):
            rows = [{"sentence": f"text number {i} of {name}", "label": answers[i % 2]} for i in range(count)]
            (folder / f"{part}.json").write_text(json.dumps(rows))
    return tmp_path / "data"


def made(name: str, final: tuple[float, float], learned: float = 0.8, seed: int = 0) -> RunResult:
    rows = [(0.0, 0.0), (learned, None), final]
    predictions = [
        Prediction(row, task, item, "yes", "yes" if item < round(share * 20) else "no", "yes")
        for row, shares in enumerate(rows)
        for task, share in zip(TASKS, shares, strict=True)
        if share is not None
        for item in range(20)
    ]
    config = {"model": "/somewhere/tiny", "tasks": [f"/somewhere/{t}" for t in TASKS], "output": "/o", "seed": seed}
    tasks = [LearnedTask(t, 320, 20, None, 40, 1.0, 2.0, [0.5], [(1, 1.0)], 10, majority=0.5) for t in TASKS]
    return RunResult(name, TASKS, "/somewhere/out", config, {"torch": "2.13"}, [], tasks, predictions, [1.0, 1.0, 1.0])


def test_a_packed_run_is_the_same_run_without_its_folders(modules: dict[str, Any], tmp_path: Path) -> None:
    run = made("plain, lr 3e-05, dev, seed 0", (0.5, 0.75))
    run = replace(run, learned=[run.learned[0], replace(run.learned[1], remembered={"a": 0.5, "b": 1.0, "c": 0.75})])
    modules["results"].pack(run, tmp_path, {"method": "plain"})
    (path,) = tmp_path.iterdir()
    found, record = modules["results"].unpack(path)
    assert found.predictions == run.predictions
    assert found.metrics.backward_transfer == run.metrics.backward_transfer
    assert record["learned"][1]["remembered"] == [0.5, 0.75]
    import gzip

    assert b"/somewhere" not in gzip.decompress(path.read_bytes())


def test_the_best_configuration_on_the_development_order_is_taken(modules: dict[str, Any], tmp_path: Path) -> None:
    configs = {method: list(each) for method, each in modules["protocol"].CONFIGS.items()}
    for method, config, final in (
        ("plain", configs["plain"][0], (0.5, 0.8)),
        ("plain", configs["plain"][1], (0.7, 0.8)),
        ("plain", configs["plain"][2], (0.7, 0.8)),
        ("sculpt", configs["sculpt"][0], (0.8, 0.8)),
    ):
        run = made(f"{method}, {config}", final)
        modules["results"].pack(run, tmp_path / "dev", {"method": method, "config": config})
    assert modules["tables"].choose(tmp_path) == {"plain": configs["plain"][1], "sculpt": configs["sculpt"][0]}
    table = modules["tables"].dev_table(tmp_path)
    assert table.count("**best**") == 2
    assert "dequantised from 4 bits" in table
    # Of what was chosen every order and seed, and nothing else.
    jobs = list(modules["evidence"].jobs("final", tmp_path))
    assert len(jobs) == 2 * len(modules["protocol"].ORDERS) * len(modules["protocol"].SEEDS)
    assert {(job.method, job.config) for job in jobs} == set(modules["tables"].choose(tmp_path).items())


def test_methods_are_compared_in_pairs(modules: dict[str, Any], tmp_path: Path) -> None:
    for seed in (0, 1):
        for method, final in (("plain", (0.5, 0.75)), ("sculpt", (0.75, 0.75))):
            run = made(f"{method} {seed}", final, seed=seed)
            modules["results"].pack(run, tmp_path / "final", {"method": method, "config": "c", "order": "O1"})
    text = modules["tables"].final_tables(tmp_path)
    assert "| plain | 2 | 62.5 (62.5 to 62.5) | -30.0" in text
    assert "| sculpt | 2 | +12.5 (" in text
    assert average_accuracy(made("x", (0.5, 0.75)).accuracy) == 0.625


def test_the_protocol_is_of_settings_that_there_are(modules: dict[str, Any]) -> None:
    protocol = modules["protocol"]
    for method, configs in protocol.CONFIGS.items():
        assert len(configs) <= 6
        for settings in configs.values():
            given = {**protocol.COMMON, **settings}
            given["protect"] = parse_protect(given["protect"])
            config = TrainConfig("model", ["task"], "output", **given)
            assert config.method == method or (config.method == "sculpt" and method in ("plain", "sculpt"))
    for config in protocol.ABLATIONS:
        job = modules["evidence"].Job("ablation", "sculpt", config, "dev", 0)
        TrainConfig("model", ["task"], "output", **job.settings)
    assert set(protocol.DEV_ORDER) <= set(protocol.DATASETS)
    assert all(sorted(order) == sorted(protocol.DEV_ORDER) for order in protocol.ORDERS.values())
    assert tuple(protocol.DEV_ORDER) not in protocol.ORDERS.values()


def test_the_whole_of_it_on_a_tiny_model(
    modules: dict[str, Any], model_folder: Path, write_benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol, evidence = modules["protocol"], modules["evidence"]
    import data

    for name, value in {
        "DATASETS": {"one": "TC/one", "two": "TC/two"},
        "DEV_ORDER": ("one", "two"),
        "ORDERS": {"O1": ("two", "one")},
        "SEEDS": (0,),
        "ENTRY_RATES": (5e-5,),
        "COMMON": {**protocol.COMMON, "max_length": 64, "cpu": True, "bf16": False},
        "ABLATIONS": dict(list(protocol.ABLATIONS.items())[:1]),
        "CONFIGS": {m: dict(list(c.items())[:1]) for m, c in protocol.CONFIGS.items() if m in ("plain", "sculpt")},
    }.items():
        monkeypatch.setattr(protocol, name, value)
        for module in (data, modules["tables"]):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    for name, value in {"TRAIN_ITEMS": 8, "TEST_ITEMS": 4, "ENTRY_ITEMS": 6, "DEV_ITEMS": 3}.items():
        monkeypatch.setattr(data, name, value)
    work, results = tmp_path / "work", tmp_path / "results"
    data.make_tasks(write_benchmark, model_folder, work)
    for _ in range(2):
        for stage in ("entry", "dev", "final", "ablation"):
            for job in evidence.jobs(stage, results):
                evidence.run(job, model_folder, work, results)
    found = {part: len(list((results / part).iterdir())) for part in ("entry", "dev", "final", "ablation")}
    assert found == {"entry": 2, "dev": 2, "final": 2, "ablation": 1}
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{modules['tables'].BEGIN}old\n{modules['tables'].END}after\n")
    modules["tables"].write_tables(results, readme)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text.splitlines()
    for heading in (
        "### Tasks that enter",
        "### Configurations",
        "### Test items",
        "### Difference from plain",
        "### One factor",
    ):
        assert heading in text

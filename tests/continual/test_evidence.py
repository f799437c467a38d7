"""The evidence: results as files, the choice of configurations, the tables, and a whole run on tiny data."""

from __future__ import annotations

import functools
import json
import os
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


NAMES = (
    "protocol",
    "two_cores",
    "one_gpu",
    "long_sequence",
    "long_on_gpu",
    "results",
    "tables",
    "jobs",
    "running",
    "workers",
    "sources",
    "data",
)


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    import importlib

    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(params=["two_cores", "one_gpu", "long_sequence"])
def protocol(request: pytest.FixtureRequest, modules: dict[str, Any]) -> Any:
    return getattr(modules[request.param], request.param.upper())


@pytest.fixture
def tiny(modules: dict[str, Any]) -> Any:
    """Two tasks, one order, two methods with one configuration each, on a CPU."""
    full = modules["two_cores"].TWO_CORES
    return replace(
        full,
        train_items=8,
        test_items=4,
        entry_items=6,
        dev_items=3,
        entry_rates=(5e-5,),
        dev_order=("one", "two"),
        orders={"O1": ("two", "one")},
        seeds=(0,),
        common={**full.common, "max_length": 64, "cpu": True, "bf16": False},
        configs={method: dict(list(full.configs[method].items())[:1]) for method in ("plain", "sculpt")},
        ablations=dict(list(full.ablations.items())[:1]),
        datasets={"one": "TC/one", "two": "TC/two"},
    )


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


def made(name: str, final: tuple[float, float], learned: float = 0.8, seed: int = 0, lr: float = 1e-4) -> RunResult:
    rows = [(0.0, 0.0), (learned, None), final]
    predictions = [
        Prediction(row, task, item, "yes", "yes" if item < round(share * 20) else "no", "yes")
        for row, shares in enumerate(rows)
        for task, share in zip(TASKS, shares, strict=True)
        if share is not None
        for item in range(20)
    ]
    folders = {"model": "/somewhere/tiny", "tasks": [f"/somewhere/{t}" for t in TASKS], "output": "/o"}
    config = {**folders, "remember_text": "/somewhere/known.txt", "seed": seed, "lr": lr}
    tasks = [LearnedTask(t, 320, 20, None, 40, 1.0, 2.0, [0.5], [(1, 1.0)], 10, majority=0.5) for t in TASKS]
    ability = {when: {"q accuracy": share, "q items": 4.0} for when, share in (("before", 0.5), ("after", final[0]))}
    return RunResult(
        *(name, TASKS, "/somewhere/out", config, {"torch": "2.13"}, [], tasks, predictions, [1.0, 1.0, 1.0]),
        ability=ability,
    )


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


def pack_dev(modules: dict[str, Any], results: Path, method: str, config: str, final: tuple[float, float]) -> None:
    run = made(f"{method}, {config}, dev, seed 0", final, lr=float(config.rpartition("lr ")[2]))
    modules["results"].pack(run, results / "dev", {"method": method, "config": config, "order": "dev"})


def test_the_best_configuration_on_the_development_order_is_taken(
    modules: dict[str, Any], protocol: Any, tmp_path: Path
) -> None:
    configs = {method: list(each) for method, each in protocol.configs.items()}
    for method, config, final in (
        ("plain", configs["plain"][0], (0.5, 0.8)),
        ("plain", configs["plain"][1], (0.7, 0.8)),
        ("plain", configs["plain"][2], (0.7, 0.8)),
        ("sculpt", configs["sculpt"][0], (0.8, 0.8)),
    ):
        pack_dev(modules, tmp_path, method, config, final)
    settled = {method: configs[method][0] for method in protocol.settled}
    chosen = {"plain": configs["plain"][1], "sculpt": configs["sculpt"][0], **settled}
    assert modules["tables"].choose(tmp_path, protocol) == chosen
    table = modules["tables"].dev_table(tmp_path, protocol)
    assert table.count("**best**") == 2
    assert "dequantised from 4 bits" in table
    assert "loses 10.0 points: enough, wanted were 5" in table
    # A best rate at an end of those tried says so: there may be a better one beyond it.
    assert table.count("| **best**, only rate |") == 1
    tried = sorted(protocol.configs["plain"][name]["lr"] for name in configs["plain"][:3])
    place = tried.index(protocol.configs["plain"][configs["plain"][1]]["lr"])
    assert f"| **best**{(', lowest rate', '', ', highest rate')[place]} |" in table
    # Of what was chosen every order and seed, and nothing else; of all methods the first place before the second.
    queue = modules["jobs"].Queue(protocol, "final", tmp_path)
    jobs = list(iter(queue.next, None))
    assert len(jobs) == len(chosen) * protocol.planned
    assert {(job.method, job.config) for job in jobs} == set(chosen.items())
    assert [job.method for job in jobs] == list(chosen) * protocol.planned
    assert len({(job.order, job.seed) for job in jobs[: len(chosen)]}) == 1


def test_final_runs_wait_for_their_own_method_alone(modules: dict[str, Any], tiny: Any, tmp_path: Path) -> None:
    queue = modules["jobs"].Queue(tiny, "all", tmp_path)
    started = list(iter(queue.next, None))
    assert [job.part for job in started] == ["entry"] * 2 + ["dev"] * 2
    plain, sculpt = started[-2:]
    pack_dev(modules, tmp_path, "sculpt", sculpt.config, (0.5, 0.5))
    queue.done(sculpt)
    assert [(job.part, job.method) for job in iter(queue.next, None)] == [("final", "sculpt")]
    # Without a result there is nothing to compare; the ablations come last.
    queue.done(plain)
    assert [(job.part, job.method) for job in iter(queue.next, None)] == [("ablation", "sculpt")]


def test_methods_are_compared_in_pairs(modules: dict[str, Any], protocol: Any, tmp_path: Path) -> None:
    for seed in (0, 1):
        for method, final in (("plain", (0.5, 0.75)), ("sculpt", (0.75, 0.75))):
            run = made(f"{method} {seed}", final, seed=seed)
            modules["results"].pack(run, tmp_path / "final", {"method": method, "config": "c", "order": "O1"})
    text = modules["tables"].final_tables(tmp_path, protocol)
    assert f"| plain | 2 of {protocol.planned} | 62.5 (62.5 to 62.5) | -30.0" in text
    assert "| sculpt - plain | 2 | +12.5 (" in text
    # By options all is right, before and after.
    (line,) = [line for line in text.splitlines() if line.startswith(f"| plain | 2 of {protocol.planned} |")]
    assert line.endswith("| 77.5 (77.5 to 77.5) | 100.0 | 0.0 | - |")
    by_options = text.split("### Differences by the likeliest option, paired by order and seed")[1]
    assert "| sculpt - plain | 2 | +0.0 (+0.0 to +0.0) | +0.0 (+0.0 to +0.0) |" in by_options
    # Where a run has none, neither columns nor table.
    run = made("plain 2", (0.5, 0.75), seed=2)
    run = replace(run, predictions=[replace(entry, option=None) for entry in run.predictions])
    modules["results"].pack(run, tmp_path / "final", {"method": "plain", "config": "c", "order": "O1"})
    assert "option" not in modules["tables"].final_tables(tmp_path, protocol)
    assert "| after all tasks | q accuracy |" in text
    assert "| before | 50.0 % |" in text
    assert "| sculpt | 75.0 % |" in text
    assert average_accuracy(made("x", (0.5, 0.75)).accuracy) == 0.625


def test_the_protocol_is_of_settings_that_there_are(modules: dict[str, Any], protocol: Any) -> None:
    jobs = modules["jobs"]
    finals = [
        job for m, configs in protocol.configs.items() for c in configs for job in jobs.final_jobs(protocol, m, c)
    ]
    first = [*jobs.entry_jobs(protocol), *jobs.dev_jobs(protocol, list(protocol.configs))]
    every = [*first, *finals, *jobs.ablation_jobs(protocol)]
    assert len({(job.part, job.name) for job in every}) == len(every)
    for job in every:
        settings = dict(job.settings)
        if "protect" in settings:
            settings["protect"] = parse_protect(settings["protect"])
        config = TrainConfig("model", ["task"], "output", **settings)
        assert protocol.reads_text or config.remember_text is None
        if not job.config.startswith("bound: "):
            ours = job.method.startswith("sculpt")
            assert config.method == job.method or (config.method == "sculpt" and (ours or job.method == "plain"))
            assert config.protects == (ours or job.method == "random")
    assert max(map(len, protocol.configs.values())) <= 6
    assert set(protocol.dev_order) <= set(protocol.datasets)
    assert all(sorted(order) == sorted(protocol.dev_order) for order in protocol.orders.values())
    assert tuple(protocol.dev_order) not in protocol.orders.values()


def test_what_was_settled_before_is_not_searched(modules: dict[str, Any], tiny: Any, tmp_path: Path) -> None:
    (config,) = tiny.configs["sculpt"]
    settled = replace(tiny, settled=("sculpt",), entry_rates=())
    queue = modules["jobs"].Queue(settled, "all", tmp_path)
    jobs = [queue.next(), queue.next()]
    assert [(job.part, job.method) for job in jobs] == [("dev", "plain"), ("final", "sculpt")]
    assert modules["tables"].choose(tmp_path, settled) == {"sculpt": config}


def test_the_foremost_methods_begin_before_the_others(modules: dict[str, Any], tiny: Any, tmp_path: Path) -> None:
    queue = modules["jobs"].Queue(replace(tiny, foremost=("sculpt",)), "all", tmp_path)
    entries = [queue.next() for _ in range(2)]
    assert {job.part for job in entries} == {"entry"}
    sculpt = queue.next()
    assert (sculpt.part, sculpt.method) == ("dev", "sculpt")
    pack_dev(modules, tmp_path, "sculpt", sculpt.config, (0.5, 0.5))
    queue.done(sculpt)
    assert [(job.part, job.method) for job in iter(queue.next, None)] == [("final", "sculpt"), ("dev", "plain")]


@pytest.mark.parametrize("count", [1, 2])
def test_the_whole_of_it_on_a_tiny_model(
    modules: dict[str, Any], tiny: Any, model_folder: Path, write_benchmark: Path, tmp_path: Path, count: int
) -> None:
    work, results = tmp_path / "work", tmp_path / "results"
    modules["data"].make_tasks([write_benchmark], model_folder, work, tiny)
    (tmp_path / "text.txt").write_text("what colour has the sky ? the sky is blue .\n")
    run = functools.partial(
        modules["running"].run,
        model=model_folder,
        work=work,
        results=results,
        ability=[tmp_path / "text.txt"],
    )
    wanted = {"entry": 2, "dev": 2, "final": 2, "ablation": 1}
    for _ in range(2):
        assert modules["workers"].work_off(modules["jobs"].Queue(tiny, "all", results), run, count) == 0
        found = {part: len(list((results / part).iterdir())) for part in wanted}
        assert found == wanted
    assert not [path for part in wanted for path in (work / "runs" / part).glob("*seed*")]
    readme = tmp_path / "README.md"
    begin = modules["tables"].BEGIN.format(scale="cpu")
    readme.write_text(f"before\n{begin}old\n{modules['tables'].END}after\n")
    modules["tables"].write_tables(results, readme, tiny, "cpu")
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text.splitlines()
    assert "](results/configurations.png)" in text
    assert (results / "configurations.png").stat().st_size > 10_000
    for heading in (
        "### Tasks that enter",
        "### Configurations",
        "### 4 test items a task",
        "### Besides the tasks",
        "### Differences",
        "### One factor",
    ):
        assert heading in text
    # Without results of the other comparison its part stays as it is.
    modules["tables"].write_tables(tmp_path / "none", readme, tiny, "gpu")
    assert readme.read_text() == text


def fail_or_end(job: Any) -> str:
    """A run that raises, one whose process ends, and others."""
    if job.order == "one":
        raise ValueError("no such luck")
    if job.order == "two":
        os._exit(3)
    return f"{job.label} is through"


def test_a_run_that_fails_ends_no_other(
    modules: dict[str, Any], tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert modules["workers"].work_off(modules["jobs"].Queue(tiny, "all", tmp_path), fail_or_end, 2) == 2
    text = capsys.readouterr().out
    assert "entry: plain, lr 5e-05, one, seed 0: FAILED" in text
    assert "no such luck" in text
    assert "entry: plain, lr 5e-05, two, seed 0: FAILED, its process ended with 3" in text
    assert text.count("is through") == 3


@pytest.mark.parametrize("count", [1, 2])
def test_nothing_begins_once_the_time_is_up(
    modules: dict[str, Any], tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    queue = modules["jobs"].Queue(tiny, "all", tmp_path)
    assert modules["workers"].work_off(queue, fail_or_end, count, seconds=0.0) == 0
    assert capsys.readouterr().out == ""
    assert queue.next().part == "entry"


def test_the_three_layouts_give_prompts_of_the_same_form(modules: dict[str, Any], write_benchmark: Path) -> None:
    tweets = write_benchmark / "datasets" / "emotion"
    tweets.mkdir(parents=True)
    (tweets / "mapping.txt").write_text("0\tanger\n1\tjoy\n")
    for part in ("train", "test"):
        (tweets / f"{part}_text.txt").write_text("so  cross \nso glad\n")
        (tweets / f"{part}_labels.txt").write_text("0\n1\n")
    intents = write_benchmark / "data"
    intents.mkdir()
    (intents / "domains.json").write_text(json.dumps({"work": ["pto_used", "payday"], "home": ["play_music"]}))
    rows = [["how many days off did i take", "pto_used"], ["play jazz", "play_music"], ["when am i paid", "payday"]]
    (intents / "data_full.json").write_text(json.dumps({"train": rows, "test": rows[2:]}))
    paths = ("TC/one", "datasets/emotion", "data/data_full.json/work")
    tasks = [modules["sources"].read_source([Path("nowhere"), write_benchmark], path) for path in paths]
    for task in tasks:
        for row in (*task.train, *task.test):
            question, options, text, cue = row.prompt.split("\n")
            assert question.endswith("Choose one from the option.")
            assert options == f"Option: {', '.join(task.options)}"
            assert text == " ".join(text.split())
            assert cue == "Answer:"
            assert row.answer in task.options
    assert [row.answer for row in tasks[2].train] == ["pto used", "payday"]
    assert [row.prompt.split("\n")[2] for row in tasks[1].test] == ["so cross", "so glad"]
    passages = write_benchmark / "BoolQA" / "BoolQA"
    passages.mkdir(parents=True)
    (passages / "labels.json").write_text(json.dumps(["True", "False"]))
    asked = [{"sentence": f"question: is it {i} ?\npassage: Of {i // 2}.", "label": "True"} for i in range(8)]
    for part, rows in (("train", asked), ("test", asked[:4])):
        (passages / f"{part}.json").write_text(json.dumps(rows))
    files = [write_benchmark / "measured.txt", write_benchmark / "known.txt"]
    modules["data"].make_texts([write_benchmark], *files)
    assert [file.read_text().split("\n\n") for file in files] == [["Of 0.", "Of 1."], ["Of 2.", "Of 3."]]
    with pytest.raises(ValueError, match=r"--data: none of .* has TC/three"):
        modules["sources"].read_source([write_benchmark], "TC/three")

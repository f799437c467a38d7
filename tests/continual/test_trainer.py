"""Whole runs of tiny models: what is learned, what is protected, what is written."""

from __future__ import annotations

import json
import math
import statistics
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from sculpt_ops import Subspaces
from sculpt_ops.continual import Example, RunResult, Task, TrainConfig, prepare, train, trainer
from sculpt_ops.continual.encoding import Collator, encode_task
from sculpt_ops.continual.evaluate import greedy_answers
from sculpt_ops.continual.leak_trace import LeakTrace
from sculpt_ops.ranks import Energy

transformers = pytest.importorskip("transformers", reason="the trainer needs pip install sculpt-ops[train]")

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def plain(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return train(TrainConfig(**settings, output=tmp_path_factory.mktemp("runs") / "plain", protect=None), quiet=True)


@pytest.fixture(scope="session")
def protected(settings: dict[str, Any], plain: RunResult, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    config = TrainConfig(**settings, output=tmp_path_factory.mktemp("runs") / "protected", protect=0.5)
    return train(config, zero_shot=plain, quiet=True)


def weights(folder: str | Path) -> Weights:
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


def test_cudnns_attention_is_left_out_while_training(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its backward has NaN for rows that are padded on the left, in batches of some lengths."""
    seen = []
    before = torch.backends.cuda.cudnn_sdp_enabled()

    def learned(*_: Any) -> None:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        raise FloatingPointError

    monkeypatch.setattr(trainer, "learn", learned)
    with pytest.raises(FloatingPointError):
        train(TrainConfig(**settings, output=tmp_path / "run", protect=None), quiet=True)
    assert before
    assert seen == [False]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.parametrize("run", ["plain", "protected"])
def test_each_task_is_learned_and_measured(run: str, request: pytest.FixtureRequest) -> None:
    result: RunResult = request.getfixturevalue(run)
    assert [len(row) for row in result.accuracy] == [2, 2, 2]
    assert max(result.accuracy[0]) == 0
    assert result.accuracy[1][0] >= 0.75
    assert result.accuracy[2][1] >= 0.75
    assert [task.name for task in result.learned] == result.tasks == ["colours", "sounds"]
    # 16 training rows in batches of 8, 40 times.
    assert [task.steps for task in result.learned] == [80, 80]
    assert [len(task.step_seconds) for task in result.learned] == [80, 80]
    assert result.learned[0].losses[-1][1] < 0.1 * result.learned[0].losses[0][1]
    assert result.peak_memory_bytes is not None
    assert result.peak_memory_bytes > 2**20


def test_the_change_lies_outside_the_protected_directions(
    settings: dict[str, Any], model_folder: Path, tmp_path: Path
) -> None:
    for protect in (0.5, None):
        change = {"max_steps": 15, "eval_items": 1, "order": ["colours"], "output": tmp_path / f"{protect}"}
        result = train(TrainConfig(**{**settings, **change}, protect=protect), quiet=True)
        before, after = weights(model_folder), weights(tmp_path / f"{protect}" / "model")
        for name, matrix in before.items():
            if "proj" not in name:
                continue
            left, _, right = torch.linalg.svd(matrix.double())
            rank = min(matrix.shape) // 2
            change = after[name].double() - matrix.double()
            inside = torch.stack([(left[:, :rank].T @ change).norm(), (change @ right[:rank].T).norm()]) / change.norm()
            if protect is None:
                assert inside.min() > 0.1
            else:
                assert inside.max() < 1e-5
                assert result.learned[0].leak[name] < 1e-5
                assert result.learned[0].layers[name]["rank"] == rank


def test_the_leak_is_followed_over_time(short: dict[str, Any], tmp_path: Path) -> None:
    change = {"max_steps": 11, "eval_items": 1, "order": ["colours"], "protect": 0.5}
    learned = train(TrainConfig(**{**short, **change}, output=tmp_path / "out"), quiet=True).learned[0]
    assert [step for step, _, _ in learned.leak_over_time] == [2, 4, 6, 8, 10, 11]
    assert all(0 < median <= largest < 1e-5 for _, median, largest in learned.leak_over_time)
    assert learned.leak_over_time[-1][1:] == (statistics.median(learned.leak.values()), max(learned.leak.values()))
    # What is promised for two sides is all outside their free block, the part inside either side included.
    for side in (learned.leak_left, learned.leak_right):
        assert side.keys() == learned.leak.keys()
        assert all(0 < share <= 1.0001 * learned.leak[name] for name, share in side.items())
    assert learned.leak_seconds > 0


@pytest.mark.parametrize(("every", "steps"), [(None, [3, 6, 9, 12, 15, 18, 21, 24, 25]), (10, [10, 20, 25]), (0, [25])])
def test_the_leak_is_measured_every_so_many_steps(llama: torch.nn.Module, every: int | None, steps: list[int]) -> None:
    trace = LeakTrace(Subspaces.from_model(llama, sides="left", targets="*.0.*.q_proj.weight"), every, 25)
    for step in range(1, 26):
        trace.on_step(step)
    trace.finish(25)
    assert trace.points == [(step, 0.0, 0.0) for step in steps]
    assert [leak.right for leak in trace.last.values()] == [None]


def test_measuring_the_leak_is_part_of_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from sculpt_ops.continual import hf_trainer

    now = 0.0
    monkeypatch.setattr(hf_trainer, "time", SimpleNamespace(perf_counter=lambda: now))

    class Slow:
        def on_step(self, step: int) -> None:
            nonlocal now
            now += 100

    state = transformers.TrainerState()
    clock = hf_trainer.StepClock("task", lambda steps: None, cast(LeakTrace, Slow()))
    clock.on_train_begin(None, state, None)
    for seconds in (1, 2, 3):
        now += seconds
        clock.on_step_end(None, state, None)
    assert clock.seconds == [1, 2, 3]


def test_the_moments_of_one_task_are_gone_before_the_next(
    short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sculpt_ops.continual.hf_trainer import SubspaceTrainer

    made: list[weakref.ref[torch.optim.Optimizer]] = []
    left: list[int] = []
    create, derive = SubspaceTrainer.create_optimizer, Subspaces.from_model

    def spy_create(self: SubspaceTrainer, model: Any = None) -> torch.optim.Optimizer:
        optimizer = create(self, model)
        made.append(weakref.ref(optimizer))
        return optimizer

    def spy_derive(*arguments: Any, **settings: Any) -> Any:
        left.append(sum(reference() is not None for reference in made))
        return derive(*arguments, **settings)

    monkeypatch.setattr(SubspaceTrainer, "create_optimizer", spy_create)
    monkeypatch.setattr(Subspaces, "from_model", spy_derive)
    train(TrainConfig(**short, output=tmp_path / "out"), quiet=True)
    assert len(made) == 2
    assert left == [0, 0]


def test_the_output_opens_with_nothing_of_ours(
    short: dict[str, Any], toy_tasks: list[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = torch.arange(3, 20)[None]
    kept: list[torch.Tensor] = []
    save = trainer.save_model

    def spy(model: torch.nn.Module, *arguments: Any) -> None:
        kept.append(model.eval()(input_ids=probe).logits.detach())
        save(model, *arguments)

    monkeypatch.setattr(trainer, "save_model", spy)
    result = train(TrainConfig(**short, output=tmp_path / "out"), quiet=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert type(model) is transformers.LlamaForCausalLM
    assert torch.equal(model(input_ids=probe).logits, kept[0])
    settings = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert "auto_map" not in settings
    # Trainer switches the cache off while training; users of the saved model want it on.
    assert settings["use_cache"] is True
    answers = greedy_answers(model, tokenizer, encode_task(toy_tasks[1], tokenizer, 64, seq2seq=False))
    chosen = prepare.measured_task(toy_tasks[1], TrainConfig(**short, output="unused")).test
    expected = [p.prediction for p in result.predictions if (p.row, p.task) == (2, "sounds")]
    assert [answers[list(toy_tasks[1].test).index(row)] for row in chosen] == expected
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["carried", "model", "predictions.jsonl", "run.json", "settings.yaml", "state.json"]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(short: dict[str, Any], tmp_path: Path) -> None:
    runs = {name: replace(TrainConfig(**short, output=tmp_path / name)) for name in ("a", "b", "c")}
    runs["c"] = replace(runs["c"], seed=1)
    results = {name: train(config, quiet=True) for name, config in runs.items()}
    assert results["a"].predictions == results["b"].predictions
    a, b, c = (weights(tmp_path / name / "model") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_plain_and_protected_see_the_same_batches(
    short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    collate = Collator.__call__

    def spy(self: Collator, rows: Any) -> dict[str, Any]:
        batch = collate(self, rows)
        seen.append(batch["input_ids"].flatten().tolist())
        return batch

    monkeypatch.setattr(Collator, "__call__", spy)
    train(TrainConfig(**short, output=tmp_path / "plain", protect=None), quiet=True)
    plain_batches = seen.copy()
    seen.clear()
    train(TrainConfig(**short, output=tmp_path / "protected", protect=Energy(0.5), sides="block"), quiet=True)
    assert seen == plain_batches
    assert len({tuple(batch) for batch in seen}) > 3


def test_gradients_are_projected_before_they_are_clipped(
    llama: torch.nn.Module, toy_tasks: list[Task], tokenizer: Any, tmp_path: Path
) -> None:
    from sculpt_ops.continual.hf_trainer import SubspaceTrainer, training_arguments

    config = TrainConfig(model="unused", tasks=toy_tasks, output="unused", max_grad_norm=1e-3, cpu=True)
    subspaces = Subspaces.from_model(llama, protect=0.75)
    arguments = training_arguments(config, str(tmp_path), 0)
    clipping = SubspaceTrainer(llama, arguments, train_dataset=[], subspaces=subspaces)
    clipping.create_optimizer()
    torch.manual_seed(0)
    total = 0.0
    for name, weight in llama.named_parameters():
        weight.grad = torch.randn_like(weight)
        free = weight.grad
        if name in subspaces:
            left, _, right = torch.linalg.svd(weight.detach())
            rank = int(0.75 * min(weight.shape))
            free = free - left[:, :rank] @ (left[:, :rank].T @ free)
            free = free - (free @ right[:rank].T) @ right[:rank]
        total += float(free.square().sum())
    assert float(clipping._clip_grad_norm(llama)) == pytest.approx(total**0.5, rel=1e-4)
    clipped = sum(float(weight.grad.square().sum()) for weight in llama.parameters()) ** 0.5
    assert clipped == pytest.approx(1e-3, rel=1e-3)


def test_decay_leaves_norms_alone(llama: torch.nn.Module, toy_tasks: list[Task], tmp_path: Path) -> None:
    from sculpt_ops.continual.hf_trainer import SubspaceTrainer, training_arguments

    config = TrainConfig(model="unused", tasks=toy_tasks, output="unused", weight_decay=0.1, lr=0.02, cpu=True)
    arguments = training_arguments(config, str(tmp_path), 0)
    optimizer = SubspaceTrainer(llama, arguments, train_dataset=[]).create_optimizer()
    decay = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    assert decay.keys() == dict(llama.named_parameters()).keys()
    assert {name for name, value in decay.items() if value == 0} == {name for name in decay if "norm" in name}
    assert {group["lr"] for group in optimizer.param_groups} == {0.02}


def test_a_zero_shot_row_is_taken_over(plain: RunResult, protected: RunResult) -> None:
    rows = [[p for p in result.predictions if p.row == 0] for result in (plain, protected)]
    assert rows[0] == rows[1]
    assert protected.evaluation_seconds[0] == 0 < plain.evaluation_seconds[0]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"max_length": 48}, "had max_length=64, this one has 48"),
        ({"eval_items": 3}, "not measured on the same items"),
        ({"order": ["sounds"]}, "not measured on the same items"),
    ],
)
def test_a_zero_shot_row_of_another_measurement_is_refused(
    change: dict[str, Any], complaint: str, settings: dict[str, Any], plain: RunResult, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=complaint):
        train(TrainConfig(**{**settings, **change}, output=tmp_path / "out"), zero_shot=plain, quiet=True)
    assert not (tmp_path / "out").exists()


def test_only_seen_tasks_are_measured_where_that_is_asked_for(short: dict[str, Any], tmp_path: Path) -> None:
    result = train(TrainConfig(**short, output=tmp_path / "out", eval_rows="seen"), quiet=True)
    measured = {(p.row, p.task) for p in result.predictions}
    assert measured == {(0, "colours"), (0, "sounds"), (1, "colours"), (2, "colours"), (2, "sounds")}
    assert math.isnan(result.accuracy[1][1])
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["accuracy"][1][1], record["complete"]) == (None, True)
    final = sum(result.accuracy[2]) / 2
    assert RunResult.load(tmp_path / "out").metrics.average_accuracy.value == pytest.approx(final)


def test_only_learned_tasks_are_measured_where_that_is_asked_for(short: dict[str, Any], tmp_path: Path) -> None:
    three = {**short, "tasks": [*short["tasks"], replace(short["tasks"][0], name="again")]}
    result = train(TrainConfig(**three, output=tmp_path / "out", eval_rows="learned"), quiet=True)
    names = [task.name for task in three["tasks"]]
    ends = {(row, name) for row in (0, 3) for name in names}
    assert {(p.row, p.task) for p in result.predictions} == ends | {(1, names[0]), (2, names[1])}
    assert not math.isnan(result.metrics.backward_transfer.value)


def test_options_are_compared_unless_they_are_not_to_be(short: dict[str, Any], tmp_path: Path) -> None:
    compared = train(TrainConfig(**short, output=tmp_path / "a"), quiet=True)
    options = {"colours": {"black", "deep blue", "green", "white"}, "sounds": {"bark", "meow", "moo", "quack"}}
    assert all(p.option in options[p.task] for p in compared.predictions)
    assert all(0 <= share <= 1 for row in compared.option_accuracy for share in row)
    alone = train(TrainConfig(**short, output=tmp_path / "b", eval_options=False), quiet=True)
    assert {p.option for p in alone.predictions} == {None}
    assert [p.prediction for p in alone.predictions] == [p.prediction for p in compared.predictions]


def test_rows_of_similar_length_share_a_batch(
    short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spread: dict[bool, list[int]] = {True: [], False: []}
    collate = Collator.__call__

    def spy(self: Collator, rows: Any) -> dict[str, Any]:
        lengths = [len(row.prompt) + len(row.answer) for row in rows]
        spread[grouped].append(max(lengths) - min(lengths))
        return collate(self, rows)

    monkeypatch.setattr(Collator, "__call__", spy)
    rows = [Example("word " * (1 + index % 8), "yes") for index in range(32)]
    for grouped in (True, False):
        change = {"tasks": [Task("words", rows, rows[:1])], "batch_size": 4, "max_steps": 8, "group_by_length": grouped}
        train(TrainConfig(**{**short, **change}, output=tmp_path / f"{grouped}", protect=None), quiet=True)
    assert sum(spread[True]) < 0.5 * sum(spread[False])


def test_a_run_is_read_back_as_it_was_written(plain: RunResult, protected: RunResult) -> None:
    for result in (plain, protected):
        loaded = RunResult.load(result.output)
        assert loaded.predictions == result.predictions
        assert loaded.accuracy == result.accuracy
        assert loaded.metrics == result.metrics
        assert [task.layers for task in loaded.learned] == [task.layers for task in result.learned]
        assert loaded.seconds_per_step == result.seconds_per_step
        assert [bool(task.leak_over_time) for task in loaded.learned] == [result is protected] * 2
    record = json.loads((Path(protected.output) / "run.json").read_text())
    assert record["accuracy"] == protected.accuracy
    assert record["config"]["protect"] == "0.5"
    assert {"python", "torch", "transformers", "accelerate", "device"} <= record["versions"].keys()


def test_measured_on_held_out_rows_the_test_rows_are_not_looked_at(
    short: dict[str, Any], toy_tasks: list[Task], tmp_path: Path
) -> None:
    secret = [Example("never read me", "secret")]
    tasks = [replace(task, test=secret) for task in toy_tasks]
    config = TrainConfig(**{**short, "tasks": tasks, "eval_items": None}, output=tmp_path / "out", dev_items=4)
    result = train(config, quiet=True)
    assert {prediction.answer for prediction in result.predictions}.isdisjoint({"secret"})
    assert [(task.train_items, task.test_items) for task in result.learned] == [(12, 4), (12, 4)]
    assert result.learned[0].note == "measured on 4 training rows held out (seed 0), not on the test rows"


def test_measured_items_are_the_same_for_every_seed(settings: dict[str, Any], toy_tasks: list[Task]) -> None:
    config = TrainConfig(**settings, output="unused", eval_items=3)
    chosen = prepare.measured_task(toy_tasks[0], config).test
    assert len(chosen) == 3
    assert chosen == prepare.measured_task(toy_tasks[0], replace(config, seed=7)).test
    assert prepare.measured_task(toy_tasks[0], replace(config, eval_items=99)) is toy_tasks[0]


def test_t5_learns(settings: dict[str, Any], t5_folder: Path, tmp_path: Path) -> None:
    config = TrainConfig(**{**settings, "model": t5_folder, "epochs": 30}, output=tmp_path / "out", protect=0.25)
    result = train(config, quiet=True)
    assert result.accuracy[1][0] >= 0.75
    assert result.accuracy[2][1] >= 0.75
    assert max(task.leak[name] for task in result.learned for name in task.leak) < 1e-5
    opened = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out" / "model")
    assert type(opened) is transformers.T5ForConditionalGeneration


def test_autocast_checkpointing_and_accumulation_over_two_tasks(
    short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[torch.nn.Module] = []
    save = trainer.save_model
    monkeypatch.setattr(trainer, "save_model", lambda model, *rest: (models.append(model), save(model, *rest)))
    open_model, trained_in = prepare.open_model, []

    def watched(*arguments: Any) -> Any:
        model, tokenizer = open_model(*arguments)
        projection = model.model.layers[0].self_attn.q_proj
        projection.register_forward_hook(
            lambda module, _, out: trained_in.append(out.dtype) if module.training else None
        )
        return model, tokenizer

    monkeypatch.setattr(prepare, "open_model", watched)
    config = TrainConfig(
        **{**short, "batch_size": 4},
        output=tmp_path / "out",
        bf16=True,
        gradient_checkpointing=True,
        gradient_accumulation_steps=2,
        lr_scheduler_type="cosine",
        warmup_steps=1,
    )
    result = train(config, quiet=True)
    assert [task.steps for task in result.learned] == [3, 3]
    assert models[0].model.layers[0].gradient_checkpointing
    # In the second task too. Two tasks of 3 steps, 2 passes each, every one computed once more for its gradient.
    assert trained_in == [torch.bfloat16] * 24
    # Autocast was taken off again: wrapped once more for every task, it would be there twice.
    assert models[0](input_ids=torch.arange(3, 9)[None]).logits.dtype == torch.float32
    assert not hasattr(models[0].forward, "__wrapped__")
    assert weights(tmp_path / "out" / "model")["lm_head.weight"].dtype == torch.float32


def test_frozen_others_keep_their_weights(short: dict[str, Any], model_folder: Path, tmp_path: Path) -> None:
    train(TrainConfig(**short, output=tmp_path / "out", others="freeze"), quiet=True)
    before, after = weights(model_folder), weights(tmp_path / "out" / "model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "proj" in name}


def test_a_run_that_diverges_says_so_and_keeps_what_it_has(short: dict[str, Any], tmp_path: Path) -> None:
    config = TrainConfig(**{**short, "lr": 1e30, "max_grad_norm": 0.0}, output=tmp_path / "out", protect=None)
    with pytest.raises(FloatingPointError, match=r"task colours: the loss is nan by step \d; try a smaller lr"):
        train(config, quiet=True)
    kept = RunResult.load(tmp_path / "out")
    assert (len(kept.accuracy), kept.complete) == (1, False)
    with pytest.raises(ValueError, match="the run stopped after 0 of 2 tasks"):
        kept.metrics  # noqa: B018


def test_progress_is_sparse_lines_without_a_terminal(
    short: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(TrainConfig(**short, output=tmp_path / "loud", protect=None))
    loud = capfd.readouterr()
    train(TrainConfig(**short, output=tmp_path / "quiet", protect=None), quiet=True)
    quiet = capfd.readouterr()
    lines = [line for line in loud.err.splitlines() if ": " in line]
    assert lines[1].startswith("task 1/2 colours: training: 3/3")
    assert len(lines) == 5
    assert (loud.out, quiet.out, quiet.err) == ("", "", "")


def test_tasks_may_be_folders(
    short: dict[str, Any], toy_tasks: list[Task], write_task: Callable[[Task], Path], tmp_path: Path
) -> None:
    folders = [write_task(task) for task in toy_tasks]
    change = {"tasks": [folders[0].parent], "order": ["sounds", "colours"]}
    result = train(TrainConfig(**{**short, **change}, output=tmp_path / "out"), quiet=True)
    assert result.tasks == ["sounds", "colours"]
    assert result.config["tasks"] == [str(folders[0].parent)]


def test_the_real_benchmark_fits_the_trainer(benchmark_folder: Path, model_folder: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        model=model_folder,
        tasks=[benchmark_folder],
        order=["CB", "COPA"],
        output=tmp_path / "out",
        max_steps=2,
        max_length=128,
        eval_items=5,
        cpu=True,
    )
    result = train(config, quiet=True)
    assert [task.train_items for task in result.learned] == [250, 400]
    assert result.notes[0].startswith("2 of the 15 tasks of the published benchmark; it lacks yelp, amazon, MNLI, QQP")


def test_float16_weights_train(short: dict[str, Any], tmp_path: Path) -> None:
    """With moments in float16 the first step divides by 0."""
    settings = {**short, "dtype": "float16", "max_steps": 4, "eval_items": 1, "lr": 1e-3}
    result = train(TrainConfig(**settings, output=tmp_path / "out"), quiet=True)
    assert all(math.isfinite(loss) for task in result.learned for _, loss in task.losses)
    assert TrainConfig(**settings, output=tmp_path, moment_dtype="bfloat16").adam_dtype == "bfloat16"

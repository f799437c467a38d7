"""The optimizer and the leak in a `transformers.Trainer` that is not ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sculpt_ops import AdamW, Subspaces
from sculpt_ops.continual import Task, TrainConfig, train
from sculpt_ops.continual.encoding import Collator, encode_task

pytest.importorskip("transformers", reason="the trainer needs pip install sculpt-ops[train]")
import transformers

from sculpt_ops.continual import LeakCallback, optimizer_for_trainer


class Recorder(transformers.TrainerCallback):  # type: ignore[misc]
    """As a reporting callback."""

    folders: list[str]

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))
        Recorder.folders.append(args.output_dir)


@pytest.mark.parametrize("options", [{}, {"state": "subspace"}])
def test_a_plain_trainer_trains_in_the_free_space(
    options: dict[str, Any], llama: torch.nn.Module, toy_tasks: list[Task], tokenizer: Any, tmp_path: Path
) -> None:
    start = {name: weight.detach().clone() for name, weight in llama.named_parameters()}
    subspaces = Subspaces.from_model(llama, protect=0.5)
    Recorder.folders = []
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, learning_rate=2e-3, adam_beta2=0.95, weight_decay=0.1, logging_steps=2,
        per_device_train_batch_size=8, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        remove_unused_columns=False,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=llama,
        args=args,
        train_dataset=encode_task(toy_tasks[0], tokenizer, 64, seq2seq=False).train,
        data_collator=Collator(llama, tokenizer),
        optimizer_cls_and_kwargs=optimizer_for_trainer(subspaces, args, **options),
        callbacks=[recorder := Recorder()],
    )
    LeakCallback(subspaces).add_to(trainer)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is AdamW
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    assert all(0 < entry["leak"] <= entry["leak_max"] < 1e-5 for entry in logged)
    assert [entry["leak"] for entry in recorder.logs if "leak" in entry] == [entry["leak"] for entry in logged]
    exact = subspaces.leak({name: start[name] for name in subspaces})
    assert max(leak.total for leak in exact.values()) < 1e-5
    assert all(not torch.equal(start[name], weight) for name, weight in llama.named_parameters() if "proj" in name)


def test_what_is_reported_lies_in_the_run(
    short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations import integration_utils

    Recorder.folders = []
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Recorder)
    train(TrainConfig(**short, output=tmp_path / "out", report_to="tensorboard"), quiet=True)
    logs = tmp_path / "out" / "logs"
    assert set(Recorder.folders) == {str(logs / "task-1"), str(logs / "task-2")}


def test_a_report_that_is_not_there_is_refused(short: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="report_to: got 'smoke'"):
        train(TrainConfig(**short, output=tmp_path / "out", report_to="smoke"), quiet=True)
    assert not (tmp_path / "out").exists()

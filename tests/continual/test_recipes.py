"""The recipes under examples/: read as they are, and learned by with tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sculpt_ops.continual import Task, train
from sculpt_ops.continual.benchmark import SEQUENCES
from sculpt_ops.continual.settings import make_config

pytest.importorskip("transformers", reason="the trainer needs pip install sculpt-ops[train]")

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = ("llama2/standard.yaml", "llama2/trace.yaml", "t5/standard.yaml")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def task_folders(recipe: str, tasks: list[Task], folder: Path) -> Path:
    """Two tasks of the recipe's sequence, in the layout that it has."""
    layout = "json" if "trace" in recipe else "jsonl"
    names = ("C-STANCE", "FOMC") if "trace" in recipe else ("dbpedia", "agnews")
    for name, task in zip(names, tasks, strict=True):
        (folder / name).mkdir(parents=True)
        for part, rows in (("train", task.train), ("test", task.test)):
            records = [{"prompt": row.prompt, "answer": row.answer} for row in rows]
            text = json.dumps(records) if layout == "json" else "\n".join(map(json.dumps, records))
            (folder / name / f"{part}.{layout}").write_text(text)
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_learns_on_a_tiny_model(
    recipe: str, toy_tasks: list[Task], tokenizer: Any, model_folder: Path, t5_folder: Path, tmp_path: Path
) -> None:
    tasks = task_folders(recipe, toy_tasks, tmp_path / "tasks")
    model = t5_folder if recipe.startswith("t5") else model_folder
    if "trace" in recipe:
        import transformers

        model = tmp_path / "chat"
        transformers.AutoModelForCausalLM.from_pretrained(model_folder).save_pretrained(model)
        tokenizer.save_pretrained(model)
        settings = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    given = {
        "model": model,
        "tasks": [tasks],
        "output": tmp_path / "out",
        "max_length": 64,
        "max_steps": 3,
        "cpu": True,
    }
    if "trace" in recipe:
        # One for each task that is there.
        given["task_epochs"] = [5, 3]
    config = make_config(EXAMPLES / recipe, given)
    published = make_config(EXAMPLES / recipe, {"tasks": ["TASKS"], "output": "OUT"})
    assert published.sequence in SEQUENCES
    assert published.lr == 1e-5
    assert published.protects
    if "trace" in recipe:
        assert published.task_epochs == [5, 3, 7, 5, 3, 5, 5, 7]
    result = train(config, quiet=True)
    assert result.complete
    assert any("it lacks" in note for note in result.notes)
    assert [len(task.step_seconds) for task in result.learned] == [3, 3]
    for task in result.learned[1:]:
        assert {layer["rank"] for layer in task.layers.values()} != {0}


def test_epochs_are_those_of_each_task(short: dict[str, Any], tmp_path: Path) -> None:
    settings = {**short, "max_steps": None, "task_epochs": [1.0, 2.0], "batch_size": 8}
    from sculpt_ops.continual import TrainConfig

    result = train(TrainConfig(**settings, output=tmp_path / "out"), quiet=True)
    rows = [len(task.train) for task in short["tasks"]]
    assert [task.steps for task in result.learned] == [-(-rows[0] // 8), 2 * -(-rows[1] // 8)]
    with pytest.raises(ValueError, match="task_epochs: got 1 numbers for 2 tasks: colours, sounds"):
        train(TrainConfig(**{**settings, "task_epochs": [1.0]}, output=tmp_path / "other"), quiet=True)
    with pytest.raises(ValueError, match=r"sequence: got 'trace' with 2 tasks, wanted one folder"):
        TrainConfig(**settings, output=tmp_path / "other", sequence="trace")

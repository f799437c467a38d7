"""The rows of a run's accuracy matrix."""

from __future__ import annotations

import time
from collections.abc import Sequence

from .ability import measure_ability
from .evaluate import answer_task
from .result import Prediction, RunResult
from .run import Run

__all__ = ["measure_abilities", "measure_row", "take_over"]

# What has to agree for one run's zero-shot answers to be another's.
ZERO_SHOT_SETTINGS = ("model", "max_length", "chat_template", "dtype", "bf16", "eval_options")


def measure_row(run: Run, row: int) -> None:
    """Answer the items of the tasks that are to be measured after `row` tasks and have no answers there, and write the
    results."""
    there = {prediction.task for prediction in run.result.predictions if prediction.row == row}
    wanted = run.config.measured_after(row, len(run.tasks))
    missing = [index for index in wanted if run.tasks[index].name not in there]
    if missing:
        _answer(run, row, missing)
        run.write()


def _answer(run: Run, row: int, indices: Sequence[int]) -> None:
    start = time.perf_counter()
    label = "zero-shot" if row == 0 else f"after task {row}/{len(run.tasks)}"
    with run.progress.bar(f"{label}: evaluating", sum(len(run.tasks[index].test) for index in indices)) as advance:
        for index in indices:
            answers = answer_task(
                run.model,
                run.tokenizer,
                run.tasks[index],
                run.encoded[index],
                batch_size=run.config.eval_batch_size,
                bf16=run.config.bf16,
                advance=advance,
                world=run.world,
                options=run.config.eval_options,
            )
            run.result.predictions.extend(
                Prediction(row, run.tasks[index].name, item, example.answer, answer.text, answer.option, answer.score)
                for item, (example, answer) in enumerate(zip(run.tasks[index].test, answers, strict=True))
            )
    seconds = run.world.share("evaluation", time.perf_counter() - start)[0]
    # A row that a task was added to is measured twice.
    if row < len(run.result.evaluation_seconds):
        run.result.evaluation_seconds[row] += seconds
    else:
        run.result.evaluation_seconds.append(seconds)


def measure_abilities(run: Run, when: str) -> None:
    """What the model can do besides the tasks, "before" the first or "after" the last."""
    config = run.config
    if not config.ability or when in run.result.ability:
        return
    run.progress.say(f"measuring {', '.join(str(source) for source in config.ability)}")

    def measure() -> dict[str, float]:
        return measure_ability(
            run.model,
            run.tokenizer,
            list(config.ability or ()),
            items=config.ability_items,
            batch_size=config.eval_batch_size,
            bf16=config.bf16,
        )

    found = run.world.share("ability", measure())[0]
    run.result.ability[when] = found
    run.write()


def take_over(run: Run, earlier: RunResult) -> None:
    """Take the answers before the first task from an earlier run; ValueError unless they would be the same."""
    for setting in ZERO_SHOT_SETTINGS:
        theirs, ours = earlier.config.get(setting), run.result.config[setting]
        if theirs != ours:
            raise ValueError(f"zero_shot: that run had {setting}={theirs}, this one has {ours}")
    taken = [prediction for prediction in earlier.predictions if prediction.row == 0]
    wanted = [(task.name, item, example.answer) for task in run.tasks for item, example in enumerate(task.test)]
    if sorted((p.task, p.item, p.answer) for p in taken) != sorted(wanted):
        raise ValueError("zero_shot: that run was not measured on the same items of the same tasks")
    run.result.predictions.extend(taken)
    run.result.evaluation_seconds.append(0.0)

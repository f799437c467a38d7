"""General ability by EleutherAI's lm-eval, where it is installed: `pip install lm-eval`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["HARNESS_TASKS", "harness_arguments", "harness_figures", "run_harness"]

# lm-eval's names of what continual-learning papers report besides their tasks.
HARNESS_TASKS = ("mmlu", "gsm8k", "bbh", "tydiqa_goldp", "boolq", "piqa")


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] = HARNESS_TASKS,
    *,
    limit: int | None = None,
    fewshot: int | None = None,
    batch_size: int = 8,
) -> dict[str, float]:
    """`harness_figures` of lm-eval's tasks on the model as it is in memory; downloads their data where it is not there.

    limit: items of each task. fewshot: examples in the prompt, None as each task has it. ImportError without lm-eval.
    """
    try:
        lm_eval = importlib.import_module("lm_eval")
        hugging_face = importlib.import_module("lm_eval.models.huggingface")
    except ImportError as error:
        raise ImportError("general ability by lm-eval needs lm_eval; pip install lm-eval") from error
    training = model.training
    model.eval()
    try:
        wrapped = hugging_face.HFLM(**wrapper_arguments(model, tokenizer, batch_size))
        return harness_figures(lm_eval.simple_evaluate(wrapped, **harness_arguments(tasks, limit, fewshot)))
    finally:
        model.train(training)


def wrapper_arguments(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> dict[str, Any]:
    """What lm-eval's HFLM is made with; it guesses neither the kind of model nor the device of a model it is given."""
    backend = "seq2seq" if model.config.is_encoder_decoder else "causal"
    device = str(model.device)
    return {
        "pretrained": model,
        "tokenizer": tokenizer,
        "backend": backend,
        "device": device,
        "batch_size": batch_size,
    }


def harness_arguments(tasks: Sequence[str], limit: int | None, fewshot: int | None) -> dict[str, Any]:
    """Arguments of lm-eval's simple_evaluate; ValueError for no tasks, a limit below 1 or a negative number of shots.

    No bootstrap: before and after are compared on the same items, which its standard errors know nothing of.
    """
    if not tasks:
        raise ValueError(f"tasks: got none, wanted lm-eval's names, as {', '.join(HARNESS_TASKS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}, wanted 1 or more, or None")
    if fewshot is not None and fewshot < 0:
        raise ValueError(f"fewshot: got {fewshot}, wanted 0 or more, or None")
    return {
        "tasks": list(tasks),
        "limit": limit,
        "num_fewshot": fewshot,
        "bootstrap_iters": 0,
        "log_samples": False,
    }


def harness_figures(results: Mapping[str, Any]) -> dict[str, float]:
    """lm-eval's results as "TASK METRIC": value, of the tasks and groups it was asked for and their parts; without
    standard errors. The metric keeps its filter where that is not "none" ("gsm8k exact_match,strict-match")."""
    return {
        f"{task} {metric.removesuffix(',none')}": float(value)
        for task, figures in results["results"].items()
        for metric, value in figures.items()
        if isinstance(value, int | float) and "," in metric and "_stderr" not in metric
    }

"""A tiny model, its tokenizer and two toy tasks, all made here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sculpt_ops.continual import Example, Task

if TYPE_CHECKING:
    import transformers

COLOURS = {"sky": "deep blue", "grass": "green", "snow": "white", "coal": "black"}
SOUNDS = {"dog": "bark", "cat": "meow", "cow": "moo", "duck": "quack"}
FILLER = ["old", "new", "big", "small", "cold", "warm"]


def toy_task(name: str, facts: dict[str, str], question: str) -> Task:
    """Every fact with every filler word in training; two fillers are kept for the test."""
    rows = {
        filler: [Example(f"{question} the {filler} {thing} ?\nAnswer:", answer) for thing, answer in facts.items()]
        for filler in FILLER
    }
    train = [row for filler in FILLER[:-2] for row in rows[filler]]
    test = [row for filler in FILLER[-2:] for row in rows[filler]]
    return Task(name, train, test, sorted(set(facts.values())))


@pytest.fixture(scope="session")
def toy_tasks() -> list[Task]:
    return [toy_task("colours", COLOURS, "what colour has"), toy_task("sounds", SOUNDS, "what sound makes")]


@pytest.fixture(scope="session")
def tokenizer(toy_tasks: list[Task]) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE, as the models that people use have it."""
    transformers = pytest.importorskip("transformers", reason="the trainer needs pip install sculpt-ops[train]")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [f"{row.prompt} {row.answer}" for task in toy_tasks for row in [*task.train, *task.test]]
    tokens.train_from_iterator(lines, trainer)
    tokens.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def make_llama(vocabulary: int) -> transformers.LlamaForCausalLM:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture
def llama(tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.LlamaForCausalLM:
    return make_llama(len(tokenizer))


@pytest.fixture(scope="session")
def model_folder(tokenizer: transformers.PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def t5_folder(tokenizer: transformers.PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=2,
        eos_token_id=1,
        decoder_start_token_id=2,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-t5"
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def settings(model_folder: Path, toy_tasks: list[Task]) -> dict[str, Any]:
    """Enough to learn both toy tasks."""
    return {
        "model": model_folder,
        "tasks": toy_tasks,
        "lr": 1e-2,
        "epochs": 40,
        "batch_size": 8,
        "max_length": 64,
        "cpu": True,
    }


@pytest.fixture(scope="session")
def short(settings: dict[str, Any]) -> dict[str, Any]:
    """A few steps, for what does not depend on learning."""
    return {**settings, "max_steps": 3, "eval_items": 3}


@pytest.fixture
def write_task(tmp_path: Path) -> Callable[[Task], Path]:
    """Writes a task as a folder of train.jsonl, test.jsonl and options.json under tasks/."""

    def write(task: Task) -> Path:
        folder = tmp_path / "tasks" / task.name
        folder.mkdir(parents=True)
        for part, rows in (("train", task.train), ("test", task.test)):
            lines = [json.dumps({"prompt": row.prompt, "answer": row.answer}) for row in rows]
            (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
        (folder / "options.json").write_text(json.dumps(task.options))
        return folder

    return write


@pytest.fixture(scope="session")
def benchmark_folder() -> Path:
    """The public benchmark, where it lies beside the checkout or where SCULPT_CL_BENCHMARK says."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data" / "cl_benchmark"
    folder = Path(os.environ.get("SCULPT_CL_BENCHMARK", beside))
    if not folder.is_dir():
        pytest.skip("no public benchmark: set SCULPT_CL_BENCHMARK to the folder CL_Benchmark of the O-LoRA repository")
    return folder

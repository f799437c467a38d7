"""General ability: figures against whole sequences by themselves, files that are read or refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sculpt_ops.continual.ability import (
    Choice,
    check_sources,
    measure_ability,
    multiple_choice,
    perplexity,
    read_choices,
)
from sculpt_ops.continual.harness import (
    HARNESS_TASKS,
    harness_arguments,
    harness_figures,
    run_harness,
    wrapper_arguments,
)

transformers = pytest.importorskip("transformers", reason="the trainer needs pip install sculpt-ops[train]")

TEXT = "the old dog has a deep blue sky and the new cat has green grass ; " * 6
ROWS = [
    {"question": "what is it ?", "options": "\nA. grass\nB. deep blue\nC. snow", "answer": "B. deep blue"},
    # PIQA: no line break in front, a space behind.
    {"question": "what now ?", "options": "A. bark \nB. moo ", "answer": "A. bark "},
    # The question has run into the options.
    {"question": "where\nA. here", "options": "\nB. there\nC. home", "answer": "B. there"},
]


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


@pytest.fixture
def sharp(llama: transformers.LlamaForCausalLM) -> transformers.LlamaForCausalLM:
    """With opinions: new weights say nearly the same of every token."""
    for parameter in llama.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(6)
    return llama.eval()


@torch.no_grad()
def log_probabilities(model: transformers.PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Of every token but the first, given all before it."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_perplexity_of_one_window_is_its_definition(
    sharp: transformers.LlamaForCausalLM, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    ids = tokenizer(TEXT)["input_ids"]
    expected = math.exp(-float(log_probabilities(sharp, ids).mean()))
    assert perplexity(sharp, tokenizer, TEXT, window=len(ids)) == pytest.approx(expected, rel=1e-5)


def test_perplexity_scores_every_token_once_with_enough_before_it(
    sharp: transformers.LlamaForCausalLM, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    ids = tokenizer(TEXT)["input_ids"]
    window, stride = 24, 7
    found: list[float] = log_probabilities(sharp, ids[:window]).tolist()
    for start in range(window, len(ids), stride):
        end = min(len(ids), start + stride)
        found += log_probabilities(sharp, ids[end - window : end])[-(end - start) :].tolist()
    assert len(found) == len(ids) - 1
    expected = math.exp(-sum(found) / len(found))
    for batch_size in (1, 32):
        value = perplexity(sharp, tokenizer, TEXT, window=window, stride=stride, batch_size=batch_size)
        assert value == pytest.approx(expected, rel=1e-5)


def test_perplexity_refuses_what_it_cannot_measure(
    llama: transformers.LlamaForCausalLM, tokenizer: transformers.PreTrainedTokenizerFast, t5_folder: Path
) -> None:
    with pytest.raises(ValueError, match="stride: got 24, wanted 1 to 23"):
        perplexity(llama, tokenizer, TEXT, window=24, stride=24)
    with pytest.raises(ValueError, match="needs a decoder-only model, got T5ForConditionalGeneration"):
        perplexity(transformers.T5ForConditionalGeneration.from_pretrained(t5_folder), tokenizer, TEXT)


@pytest.mark.parametrize("seq2seq", [False, True])
def test_the_likeliest_option_is_chosen(
    seq2seq: bool,
    sharp: transformers.LlamaForCausalLM,
    tokenizer: transformers.PreTrainedTokenizerFast,
    t5_folder: Path,
) -> None:
    model = transformers.T5ForConditionalGeneration.from_pretrained(t5_folder).eval() if seq2seq else sharp
    options = ("grass", "deep blue", "snow", "the new cat has green grass")
    questions = [Choice(f"what is {thing} ?", options, thing % 4) for thing in range(6)]
    expected = []
    for question in questions:
        prompt = f"Question: {question.question}\nAnswer:"
        scores = []
        for option in options:
            if seq2seq:
                ids, target = (torch.tensor([tokenizer(text)["input_ids"]]) for text in (prompt, option))
                with torch.no_grad():
                    logits = model(input_ids=ids, labels=target).logits[0].log_softmax(-1)
                scores.append(float(logits.gather(1, target.T).sum()))
            else:
                ids = tokenizer(f"{prompt} {option}")["input_ids"]
                scores.append(float(log_probabilities(model, ids)[len(tokenizer(prompt)["input_ids"]) - 1 :].sum()))
        expected.append(scores.index(max(scores)) == question.answer)
    assert True in expected
    assert False in expected
    assert multiple_choice(model, tokenizer, questions, batch_size=5) == expected


def test_langtests_files_are_read(tmp_path: Path) -> None:
    assert read_choices(write(tmp_path / "validation.jsonl", ROWS)) == [
        Choice("what is it ?", ("grass", "deep blue", "snow"), 1),
        Choice("what now ?", ("bark", "moo"), 0),
    ]


def test_options_may_be_a_list_and_answers_letters(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"question": "what ?", "options": ["red", "blue"], "answer": "blue"},
        {"question": "what ?", "options": ["red", "blue"], "answer": "A"},
        # The text of an option goes before the letter of another.
        {"question": "what ?", "options": ["B", "A"], "answer": "A"},
        {"question": "what ?", "options": "A. red\nB. blue", "answer": "B"},
    ]
    assert [choice.answer for choice in read_choices(write(tmp_path / "list.jsonl", rows))] == [1, 0, 1, 1]
    bad = [{**row, "answer": "green"} for row in rows]
    with pytest.raises(ValueError, match="no questions in most of 8 rows, first in line 1; wanted `options` as a list"):
        read_choices(write(tmp_path / "bad.jsonl", [*bad, *bad]))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin\.txt: not UTF-8"):
        check_sources([tmp_path / "latin.txt"], False)


def test_a_file_without_answers_is_refused(tmp_path: Path) -> None:
    rows = [{"question": "what ?", "options": "A. a\nB. b"}]
    with pytest.raises(ValueError, match=r"test\.jsonl, line 1: wanted `question`, `options` and `answer`"):
        read_choices(write(tmp_path / "test.jsonl", rows))
    with pytest.raises(ValueError, match="no questions"):
        read_choices(write(tmp_path / "all-bad.jsonl", ROWS[2:]))


def test_figures_have_the_names_of_their_files(
    llama: transformers.LlamaForCausalLM, tokenizer: transformers.PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    first = write(tmp_path / "PIQA" / "validation.jsonl", ROWS * 4)
    text = tmp_path / "news.txt"
    text.write_text(TEXT)
    llama.train()
    before = {name: weight.clone() for name, weight in llama.state_dict().items()}
    figures = measure_ability(llama, tokenizer, [first, text], items=5)
    assert set(figures) == {"PIQA accuracy", "PIQA items", "news perplexity"}
    assert figures["PIQA items"] == 5
    assert figures == measure_ability(llama, tokenizer, [first, text], items=5, batch_size=3)
    assert llama.training
    assert all(torch.equal(weight, before[name]) for name, weight in llama.state_dict().items())
    with pytest.raises(ValueError, match="sources: got two files of the name PIQA"):
        measure_ability(llama, tokenizer, [first, first])
    with pytest.raises(ValueError, match="there is no file"):
        measure_ability(llama, tokenizer, [tmp_path / "nowhere.txt"])


def test_the_harness_is_asked_for_before_and_after(llama: transformers.LlamaForCausalLM) -> None:
    assert harness_arguments(HARNESS_TASKS, 100, None) == {
        "tasks": ["mmlu", "gsm8k", "bbh", "tydiqa_goldp", "boolq", "piqa"],
        "limit": 100,
        "num_fewshot": None,
        "bootstrap_iters": 0,
        "log_samples": False,
    }
    for arguments, complaint in (
        (([], None, None), "tasks: got none"),
        ((["piqa"], 0, None), "limit: got 0"),
        ((["piqa"], None, -1), "fewshot: got -1"),
    ):
        with pytest.raises(ValueError, match=complaint):
            harness_arguments(*arguments)
    wrapper = wrapper_arguments(llama, SimpleNamespace(), 4)
    assert wrapper["pretrained"] is llama
    assert (wrapper["backend"], wrapper["device"], wrapper["batch_size"]) == ("causal", "cpu", 4)


def test_the_harnesss_figures_are_named_by_task_and_metric() -> None:
    results = {
        "results": {
            "piqa": {"alias": "piqa", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.6},
            "gsm8k": {"exact_match,strict-match": 0.1, "exact_match_stderr,strict-match": "N/A"},
        }
    }
    assert harness_figures(results) == {
        "piqa acc": 0.5,
        "piqa acc_norm": 0.6,
        "gsm8k exact_match,strict-match": 0.1,
    }


def test_without_the_harness_the_error_says_what_to_install(
    llama: transformers.LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ImportError, match="pip install lm-eval"):
        run_harness(llama, SimpleNamespace(), ["piqa"])

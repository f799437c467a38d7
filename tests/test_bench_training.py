"""The table of training costs, dry: every row on a model made here, and what the table says of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import train_cpu
from training_data import load_batches
from training_measure import Settings
from training_methods import METHODS, Method, nbytes, tensors_of
from training_table import BEGIN, END, lost, markdown, write_between_marks

QUESTION = "what colour has the {} ?"
FACTS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A LLaMA of two layers with a vocabulary of words, and a task in its words."""
    pytest.importorskip("transformers", reason="the table needs pip install sculpt-ops[train]")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("training")
    words = ["</s>", *QUESTION.replace("{} ", "").split(), *FACTS, *FACTS.values()]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="</s>").save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    rows = [{"prompt": QUESTION.format(thing), "answer": colour} for thing, colour in FACTS.items()] * 12
    task = folder / "colours"
    task.mkdir()
    for part in ("train", "test"):
        (task / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Settings(folder / "model", task, steps=5, lr=1e-3, rows=2, length=16, held_out=1, threads=1)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows_of(settings: Settings, *families: str) -> dict[tuple[str, float | None], dict[str, Any]]:
    rows = {}
    for method in METHODS:
        if method.family in families:
            row = train_cpu.one(method, settings)
            if (note := row.get("note", "")).startswith("not installed"):
                pytest.skip(note)
            assert not note
            rows[method.name, method.protect] = row
    return rows


def test_rows_of_ours(settings: Settings) -> None:
    """Only the plain step leaks, and each option shows where it should: in the gradients, the states or the bases."""
    rows = rows_of(settings, "torch", "sculpt")
    plain, fused = rows["torch AdamW", None], rows["torch AdamW fused", None]
    assert plain["leak"] > 0.5
    assert plain["leak"] == pytest.approx(fused["leak"], rel=1e-3)
    assert plain["losses"] == rows["torch AdamW, again", None]["losses"]
    assert all(row["matrices"] == 14 for row in rows.values())

    protected = {key: row for key, row in rows.items() if row["protect"] and row["dtype"] == "float32"}
    leaky = protected.pop(("sculpt full, project gradient", 0.5))
    assert 0.01 < leaky["leak"] < plain["leak"]
    for row in protected.values():
        assert row["leak_max"] < 2e-5, row["name"]
        assert row["loss_before"] == plain["loss_before"]
        assert row["loss_after"] < row["loss_before"]

    full, subspace = rows["sculpt full", 0.75], rows["sculpt subspace", 0.75]
    assert full["owned"]["states"] == plain["owned"]["states"]
    assert subspace["owned"]["states"] < full["owned"]["states"] / 2
    half, rounded = rows["sculpt subspace", 0.5], rows["sculpt subspace, bf16 bases", 0.5]
    assert rounded["owned"]["bases"] < half["owned"]["bases"]
    assert half["owned"]["gradients"] == half["owned"]["weights"]
    assert rows["sculpt subspace, in backward", 0.5]["owned"]["gradients"] == 0
    guard = rows["torch AdamW + sculpt guard", 0.5]
    assert guard["owned"]["bases"] > half["owned"]["bases"]
    assert guard["saved"] - guard["owned"]["bases"] == plain["saved"]

    split = rows["sculpt subspace, bf16 weights, split", 0.5]
    assert split["leak_max"] < 2e-5
    assert split["owned"]["weights"] == half["owned"]["weights"] / 2
    assert split["owned"]["states"] == half["owned"]["states"] + half["owned"]["weights"] / 2


@pytest.mark.parametrize("family", ["peft", "mini_trainer"])
def test_rows_of_peers(settings: Settings, family: str) -> None:
    """Driven as their users drive them: the loss starts where the model's is, and falls; the known leak is there."""
    rows = rows_of(settings, family)
    plain = train_cpu.one(METHODS[0], settings)
    assert {protect for _, protect in rows} == {0.25, 0.5, 0.75}
    for row in rows.values():
        assert row["matrices"] == 14
        assert row["loss_before"] == pytest.approx(plain["loss_before"], abs=1e-5)
        assert row["loss_after"] < row["loss_before"]
        assert (row["leak"] > 0.05) == (family == "peft")
        assert (row["owned"]["bases"] > 0) == (family == "peft")
        assert row["owned"]["gradients"] < row["owned"]["weights"]
    assert rows[min(rows)]["owned"]["states"] > rows[max(rows)]["owned"]["states"]


def test_a_row_has_its_own_process(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One row end to end, to the results file and from there into a document."""
    arguments = ["--model", str(settings.model), "--task", str(settings.task), "--rows", "^torch AdamW None$"]
    sizes = ["--steps", "4", "--rows-a-step", "2", "--length", "16", "--held-out", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [train_cpu.__file__, *arguments, *sizes, "--results", str(tmp_path)])
    train_cpu.main()
    (written,) = tmp_path.glob("train-cpu-*.json")
    results = json.loads(written.read_text())
    (row,) = results["rows"]
    assert row["name"] == "torch AdamW"
    assert len(row["steps_s"]) == 2
    assert row["peak"] > row["owned_total"]
    assert results["settings"]["task"] == "colours"
    assert str(settings.model.parent) not in written.read_text()
    assert "torch AdamW" in capsys.readouterr().out

    document = tmp_path / "training.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["train_cpu.py", "--markdown", str(written), "--document", str(document)])
    train_cpu.main()
    text = document.read_text()
    assert text.startswith(f"before\n{BEGIN}\n| method |")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "| torch AdamW | - |" in text


def test_a_method_that_fails_is_a_row(settings: Settings) -> None:
    def absent() -> None:
        raise ImportError("No module named 'peer'")

    def failing(model: Any, lr: float) -> Any:
        raise ArithmeticError("no convergence\nafter 10 steps")

    row = train_cpu.one(Method("peer", "peft", 0.5, failing, load=absent), settings)
    assert row["note"] == "not installed: No module named 'peer'"
    row = train_cpu.one(Method("peer", "peft", 0.5, failing), settings)
    assert row["note"] == "failed: ArithmeticError: no convergence"
    printed = markdown({"machine": MACHINE, "settings": SETTINGS, "rows": [row]})
    assert "| peer | 0.50 | failed: ArithmeticError: no convergence |" in printed


MACHINE = {"date": "today", "processor": "some", "threads": 2, "torch": "2", "peft": "1", "allocator": "default"} | {
    "rhai-innovation-mini-trainer": "1"
}
SETTINGS = {"model": "m", "task": "t", "rows": 4, "length": 128, "steps": 12, "lr": 1e-5}


def row_of(name: str, family: str, protect: float | None, **costs: float) -> dict[str, Any]:
    row = {"setup_s": 1.0, "step_s": 1.0, "peak": 1.0, "owned_total": 1.0, "saved": 1.0, "leak": 0.1, "loss_after": 2.0}
    return {"name": name, "family": family, "protect": protect, "dtype": "float32"} | row | costs


def test_where_ours_loses() -> None:
    mine = row_of("sculpt full", "sculpt", 0.5, setup_s=3.0, step_s=1.5, leak=0.2, loss_after=2.1)
    plain = row_of("torch AdamW", "torch", None)
    slow = row_of("PEFT OSF", "peft", 0.5, step_s=2.0, setup_s=9.0, leak=0.3, loss_after=2.2)
    assert lost([mine, plain, slow]) == ["sculpt full at 0.50, behind torch AdamW (step 1.50 times, loss 0.1000 above)"]
    quick = row_of("PEFT OSF", "peft", 0.5, loss_after=2.2)
    assert lost([mine, quick]) == [
        "sculpt full at 0.50, behind PEFT OSF (set-up 3.00 times, step 1.50 times, leak 2.00 times)"
    ]
    assert lost([mine, quick | {"protect": 0.25}, plain | {"dtype": "bfloat16"}]) == []
    assert lost([mine, {"name": "PEFT OSF", "protect": 0.5, "note": "not installed"}]) == []


def test_the_table_needs_its_marks(tmp_path: Path) -> None:
    document = tmp_path / "training.md"
    document.write_text("no marks")
    with pytest.raises(ValueError, match=r"training\.md: wanted the lines"):
        write_between_marks(document, "text")
    assert document.read_text() == "no marks"


def test_tied_weights_count_once() -> None:
    tensor = torch.zeros(4, 4)
    assert nbytes([tensor, tensor, tensor[:2]]) == 64
    assert nbytes(tensors_of({"a": [tensor], "b": {"c": (torch.zeros(2), 3)}})) == 64 + 8


def test_batches_are_the_same_blocks_of_text(settings: Settings) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    sizes = {"held_out": 1, "rows": 2, "length": 16}
    few, more = (load_batches(settings.task, tokenizer, steps=steps, **sizes) for steps in (2, 4))
    assert [tuple(batch.shape) for batch in more.train] == [(2, 16)] * 4
    torch.testing.assert_close(few.train, more.train[:2])
    with pytest.raises(ValueError, match=r"task: colours has \d+ tokens, wanted 32000 for 1000 steps"):
        load_batches(settings.task, tokenizer, steps=1000, **sizes)

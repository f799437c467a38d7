"""The README's Python runs as printed, on a small model in place of the one that it opens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = Path(__file__).resolve().parents[1] / "README.md"


def tokenize(text: str, return_tensors: str) -> Any:
    """Every letter a token."""
    from transformers import BatchEncoding

    ids = torch.tensor([[ord(letter) % 64 for letter in text]])
    return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def test_every_python_block_of_the_readme(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers", reason="the trainer's dependencies are not installed")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda name, dtype: transformers.LlamaForCausalLM(config)
    )
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenize)
    given: dict[str, Any] = {}
    # Its 4096 x 1024 SVD takes seconds; the statements are the same at a sixteenth of the size.
    blocks = [
        b.replace("4096, 1024", "256, 64").replace(":64]", ":16]").replace("weight, 64", "weight, 16")
        for b in re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    ]
    assert len(blocks) == 6
    for block in blocks:
        exec(block, given)
    printed = capsys.readouterr().out.splitlines()
    norms = [float(x) for x in re.findall(r"tensor\((.*?)\)", printed[0])]
    assert max(norms) < 1e-4
    assert "model.layers.0.self_attn.q_proj.weight" in "\n".join(printed) or "self_attn.q_proj" in "\n".join(printed)
    assert float(printed[-1]) < 1e-2  # a few tiny steps: mostly the rounding of the weights

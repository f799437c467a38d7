"""What `sculpt inspect --output` says of a model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sculpt_ops.continual.inspection import Spectrum, spectra_of, write_inspection
from sculpt_ops.ranks import Energy, Fraction

pytest.importorskip("matplotlib", reason="the pictures need pip install sculpt-ops[train]")


def test_spectra_are_those_of_the_svd() -> None:
    torch.manual_seed(0)
    weights = {"tall": torch.randn(40, 24), "wide": torch.randn(24, 40), "half": torch.randn(16, 16).bfloat16()}
    weights["poor"] = torch.randn(20, 3) @ torch.randn(3, 20)
    for spectrum in spectra_of(weights):
        values = torch.linalg.svdvals(weights[spectrum.name].double())
        assert (spectrum.values - values).abs().max() < 1e-6 * values[0]


def test_ranks_and_energies() -> None:
    spectrum = Spectrum("w", (4, 6), torch.tensor([4.0, 2.0, 2.0, 1.0]).double())
    assert spectrum.energy(0.5) == pytest.approx(20 / 25)
    assert spectrum.rank(Fraction(0.5)) == 2
    assert [spectrum.rank(Energy(share)) for share in (0.6, 0.9)] == [1, 3]


def test_an_inspection_names_what_is_protected_and_what_is_not(llama: Any, tmp_path: Path) -> None:
    path = write_inspection(llama, "tiny", tmp_path / "new", summaries={"--protect 0.25": "layer  shape"})
    text = path.read_text()
    assert text.endswith("## With `--protect 0.25`\n\n```text\nlayer  shape\n```\n")
    total = sum(p.numel() for p in llama.parameters())
    embedding = llama.model.embed_tokens.weight.numel()
    assert (
        f"| **not protected** | `model.embed_tokens.weight` | 1 | {embedding:,} | {100 * embedding / total:.2f} |"
        in text
    )
    assert "| protected | `model.layers.*.mlp.up_proj.weight` | 2 | 4,096 |" in text
    row = next(line for line in text.splitlines() if line.startswith("| `model.layers.*.self_attn.k_proj.weight`"))
    assert row.split(" | ")[1:5] == ["16 x 32", "4", "8", "12"]
    for name in ("spectra.png", "energies.png"):
        assert (path.parent / name).read_bytes()[:4] == b"\x89PNG"
    # The effective rank of a flat spectrum is all of it.
    with torch.no_grad():
        llama.model.layers[0].self_attn.k_proj.weight.copy_(torch.eye(16, 32))
    text = write_inspection(llama, "tiny", tmp_path / "flat", ["model.layers.0.self_attn.k_proj.weight"]).read_text()
    row = next(line for line in text.splitlines() if "k_proj.weight` | 16 x 32 |" in line)
    assert row.endswith("| 25 | 50 | 75 | 100 |")
    assert math.isclose(sum(p.numel() for p in llama.parameters()), total)


def test_a_model_without_known_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="targets"):
        write_inspection(torch.nn.Linear(3, 3), "linear", tmp_path / "out")
    assert not (tmp_path / "out").exists()

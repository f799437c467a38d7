"""What the benchmark tables rest on: the errors they print, and that a peer that is missing or fails is a row."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from accuracy import Bases, Factors, accuracy, model_energy, spectral_norm
from interleave import Competitor, interleave
from test_decompose_cpu import ahead, show
from weights import Matrix, decaying, hard, measured


class Benchmark:
    """The part of pytest-benchmark's fixture that `interleave` uses."""

    def pedantic(self, target: Any, setup: Any, rounds: int) -> None:
        for _ in range(rounds):
            arguments, _ = setup()
            target(*arguments)
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[1.0] * rounds))


DIAGONAL = Matrix(torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0])), torch.tensor([8.0, 4.0, 2.0, 1.0]).double())


def test_errors_of_the_wrong_directions() -> None:
    """Rank 2 of diag(8, 4, 2, 1) with the third direction in place of the second."""
    basis = torch.eye(4)[:, [0, 2]]
    for values in (torch.tensor([8.0, 2.0]), None):
        found = accuracy(DIAGONAL, Factors(basis, values, basis))
        assert found["spectral"] == pytest.approx(4 / 2)
        assert found["frobenius"] == pytest.approx((17 / 5) ** 0.5)
        assert found["energy"] == pytest.approx(68 / 80)
        assert found["orthogonality"] == 0


def test_a_side_that_is_worse_counts() -> None:
    good, bad = torch.eye(4)[:, :2], torch.eye(4)[:, [0, 2]]
    for left, right in ((good, bad), (bad, good)):
        assert accuracy(DIAGONAL, Factors(left, None, right))["spectral"] == pytest.approx(2)
        assert accuracy(DIAGONAL, Factors(left, None, right))["energy"] == pytest.approx(68 / 80)


@pytest.mark.parametrize("kind", ["flat", "exponential", "clustered", "rank-deficient"])
def test_a_full_svd_is_the_optimum(kind: Any) -> None:
    matrix = hard(kind, size=192)
    U, S, Vh = torch.linalg.svd(matrix.values)
    found = accuracy(matrix, Factors(U[:, :64], S[:64], Vh[:64].mT))
    assert found["spectral"] <= 1.001
    assert found["frobenius"] <= 1.001
    assert found["energy"] == pytest.approx(1, abs=1e-5)


def test_spectral_norm_is_that_of_an_svd() -> None:
    matrix = decaying(300, 500, "attention")
    assert spectral_norm(matrix.values) == pytest.approx(1, rel=1e-4)
    tail = matrix.values - torch.linalg.svd(matrix.values).U[:, :40] @ (
        torch.linalg.svd(matrix.values).U[:, :40].mT @ matrix.values
    )
    assert spectral_norm(tail) == pytest.approx(float(matrix.sigma[40]), rel=1e-4)
    assert spectral_norm(torch.zeros(3, 5)) == 0


def test_the_decay_is_the_one_asked_for() -> None:
    matrix = decaying(160, 96, "feed-forward")
    torch.testing.assert_close(measured(matrix.values).sigma, matrix.sigma, rtol=1e-4, atol=1e-6)
    assert float(matrix.sigma[0]) == 1


def test_a_model_is_as_good_as_its_worst_side() -> None:
    weights = {"a": DIAGONAL.values, "b": torch.cat((DIAGONAL.values, torch.zeros(2, 4)))}
    top, free = torch.eye(4)[:, :2], torch.eye(4)[:, 2:]
    bases = {
        "a": Bases(top, False, free, True),
        "b": Bases(torch.eye(6)[:, [0, 2]], False, top, False),
    }
    assert model_energy(weights, bases) == pytest.approx(
        {"matrices": 2, "energy": 68 / 80, "energy_mean": (3 + 68 / 80) / 4}
    )


def test_peers_that_are_missing_or_fail_are_rows() -> None:
    calls: list[str] = []

    def absent() -> None:
        raise ImportError("No module named 'peer'")

    def failing() -> None:
        calls.append("failing")
        raise ArithmeticError("no convergence\nafter 10 steps")

    ours = Competitor("sculpt", lambda made: calls.append(made), prepare=lambda: "ours")
    others = [
        Competitor("absent", lambda: calls.append("absent"), warm=absent),
        Competitor("failing", failing),
        Competitor("slow", lambda: calls.append("slow"), rounds=2),
    ]
    entries = interleave(Benchmark(), ours, others, rounds=3)
    assert calls == ["failing", "slow", "ours", "slow", "ours", "ours"]
    assert entries[1] == {"name": "absent", "note": "not installed: No module named 'peer'"}
    assert entries[2] == {"name": "failing", "note": "failed: ArithmeticError: no convergence"}
    assert [entry.get("rounds") for entry in entries] == [3, None, None, 2]
    printed = "\n".join(show({"op": "op", "case": "case", "competitors": entries}))
    assert "not installed: No module named 'peer'" in printed


def test_ahead_is_faster_than_what_we_have_at_that_accuracy() -> None:
    quick = {"name": "sculpt rsvd", "ms": 1.0, "spectral": 1.1, "frobenius": 1.0, "energy": 0.99}
    exact = {"name": "sculpt top_subspace", "ms": 5.0, "spectral": 1.0, "frobenius": 1.0, "energy": 1.0}
    peer = {"name": "peer", "ms": 2.0, "spectral": 1.0, "frobenius": 1.0, "energy": 1.0}
    assert ahead(peer, [quick, exact, peer])
    assert not ahead(peer | {"ms": 6.0}, [quick, exact, peer])
    assert not ahead(peer | {"spectral": 1.09, "energy": 0.992}, [quick, exact, peer])
    assert not ahead({"name": "floor", "ms": 0.1}, [quick, exact, peer])

import itertools

import pytest
import torch
from torch import Tensor

from sculpt_ops.basis import Basis
from sculpt_ops.layer import LayerSubspace
from sculpt_ops.leak import LayerLeak, measure_exact, measure_sketched, sketch_weight
from sculpt_ops.optim import AdamW
from sculpt_ops.subspaces import Subspaces

from .training import SHAPES, Shapes, layer_of, start_of, train

SIDES = ("both", "left", "right", "block")


def parts(layer: LayerSubspace, change: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P_L dW, dW P_R and what `sides` promises away, written out with full projectors."""
    m, n = layer.shape
    p_left, p_right = torch.zeros(m, m).double(), torch.zeros(n, n).double()
    if layer.left is not None:
        inside = layer.left.double() @ layer.left.double().mT
        p_left = torch.eye(m).double() - inside if layer.keep_left else inside
    if layer.right is not None:
        inside = layer.right.double() @ layer.right.double().mT
        p_right = torch.eye(n).double() - inside if layer.keep_right else inside
    if layer.block:
        return p_left @ change, change @ p_right, p_left @ change @ p_right
    free = (torch.eye(m).double() - p_left) @ change @ (torch.eye(n).double() - p_right)
    return p_left @ change, change @ p_right, change - free


@pytest.mark.parametrize(("sides", "rank"), list(itertools.product(SIDES, (0, 5, 20))))
def test_exact_leak_against_full_projectors(sides: str, rank: int) -> None:
    start = torch.randn(24, 40)
    weight = start + 0.1 * torch.randn(24, 40)
    layer = layer_of(start, rank, sides)  # type: ignore[arg-type]
    leak = measure_exact(layer, weight, start)
    change = weight.double() - start.double()
    left, right, total = (float(part.norm()) for part in parts(layer, change))
    assert leak.change == pytest.approx(float(change.norm()))
    assert leak.total_norm == pytest.approx(total, rel=1e-6)
    assert leak.total == pytest.approx(total / leak.change, rel=1e-6)
    if sides == "right":
        assert leak.left is None
        assert leak.left_norm is None
    else:
        assert leak.left_norm == pytest.approx(left, abs=1e-9)
    if sides == "left":
        assert leak.right is None
    else:
        assert leak.right_norm == pytest.approx(right, abs=1e-9)
        assert leak.right == pytest.approx(right / leak.change, abs=1e-9)


@pytest.mark.parametrize(("sides", "rank"), list(itertools.product(SIDES, (5, 20))))
def test_sketched_leak_is_near_the_exact_one(sides: str, rank: int) -> None:
    start = torch.randn(24, 40)
    weight = start + 0.1 * torch.randn(24, 40)
    layer = layer_of(start, rank, sides)  # type: ignore[arg-type]
    exact = measure_exact(layer, weight, start)
    ratios = []
    for seed in range(50):
        sketch = sketch_weight(layer, start, f"layer.{seed}")
        sketched = measure_sketched(layer, weight, sketch, f"layer.{seed}")
        ratios.append([(sketched.total_norm / exact.total_norm) ** 2, (sketched.change / exact.change) ** 2])
    squares = torch.tensor(ratios)
    # Unbiased in the square, and its deviation no more than sqrt(2 / 16).
    assert torch.allclose(squares.mean(0), torch.ones(2), atol=4 * (2 / 16 / 50) ** 0.5)
    assert (squares.std(0) < 0.5).all()


def test_no_change_is_no_leak() -> None:
    start = torch.randn(8, 8)
    layer = layer_of(start, 4)
    assert measure_exact(layer, start, start) == LayerLeak(0.0, 0.0, 0.0, 0.0)
    assert measure_exact(layer, start, start).total == 0.0
    assert measure_sketched(layer, start, sketch_weight(layer, start, "w"), "w").total == 0.0


def test_weights_of_nan_have_no_leak_of_zero() -> None:
    start = torch.randn(24, 40)
    leak = measure_exact(layer_of(start, 5, "both"), start * torch.nan, start)
    assert all(share != share for share in (leak.total, leak.left, leak.right))


def test_sketch_of_a_name_is_fixed() -> None:
    # A saved sketch must be readable by later releases: these signs may never change.
    layer = LayerSubspace((4, 3), 0, 0.0, Basis(torch.zeros(4, 0), "protected"))
    signs = sketch_weight(layer, torch.eye(4, 3), "model.layers.0.self_attn.q_proj.weight") * 4
    rows = ["".join("+" if x > 0 else "-" for x in row) for row in signs[:3].tolist()]
    assert rows == ["++--+---+-++++++", "---+++--+++----+", "-+++-+++++++-+++"]


def test_leak_from_start_weights_and_from_sketches() -> None:
    model = Shapes()
    subspaces = Subspaces.from_model(model, 0.5, targets=list(SHAPES))
    start = start_of(model)
    train(model, torch.optim.SGD(model.parameters(), lr=1e-3), 5)
    exact, sketched = subspaces.leak({f"module.{name}": tensor for name, tensor in start.items()}), subspaces.leak()
    for name in subspaces:
        assert exact[name].total > 0.05
        assert sketched[name].total == pytest.approx(exact[name].total, rel=0.5)
    with pytest.raises(ValueError, match="start lacks the weights of tall"):
        subspaces.leak({name: start[name] for name in ("square", "wide")})
    with pytest.raises(ValueError, match=r"start\['wide'\] has shape \(2, 2\), wanted \(24, 56\)"):
        subspaces.leak(start | {"wide": torch.zeros(2, 2)})


def test_leak_of_what_takes_the_place_of_the_weights() -> None:
    """The bits that bfloat16 weights lack are most of a small change."""
    model = Shapes(torch.bfloat16)
    subspaces = Subspaces.from_model(model, 0.5, targets=list(SHAPES))
    start = start_of(model)
    optimizer = AdamW(model.parameters(), lr=1e-5, subspaces=subspaces, master="split")
    train(model, optimizer, 5)
    for given in (None, start):
        rounded, master = subspaces.leak(given), subspaces.leak(given, read=optimizer.master_weight)
        for name in subspaces:
            assert rounded[name].total > 0.1
            assert 0 < master[name].total < 1e-2 * rounded[name].total


@pytest.mark.parametrize(("sides", "rank"), list(itertools.product(SIDES, (5, 20))))
def test_sketch_sees_a_leak_of_a_millionth(sides: str, rank: int) -> None:
    start = torch.randn(24, 40).double()
    layer = layer_of(start, rank, sides)  # type: ignore[arg-type]
    change, leaked = torch.randn(2, 24, 40).double() * 1e-3
    _, _, promised = parts(layer, change)
    weight = start + change - promised + 1e-6 * leaked
    exact = measure_exact(layer, weight, start)
    sketched = measure_sketched(layer, weight, sketch_weight(layer, start, "w"), "w")
    assert 1e-7 < exact.total < 1e-5
    assert sketched.total == pytest.approx(exact.total, rel=0.5)


def test_sketch_does_not_depend_on_how_bases_are_stored() -> None:
    """Made anew from reflectors they are 1e-7 away: much more than the leak, relative to ||W||."""
    model = Shapes()
    subspaces = Subspaces.from_model(model, 0.4, targets=list(SHAPES))
    optimizer = AdamW(model.parameters(), lr=1e-5, subspaces=subspaces)
    train(model, optimizer, 5)
    before = subspaces.leak()
    subspaces.use_reflectors()
    for name, after in subspaces.leak().items():
        assert before[name].change > 0
        assert after.change == before[name].change
        assert after.total_norm == pytest.approx(before[name].total_norm, abs=1e-6 * after.change)

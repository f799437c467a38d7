import gc
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sculpt_ops.layer import LayerSubspace
from sculpt_ops.linalg import Spectrum, complement
from sculpt_ops.ranks import Energy, Rank
from sculpt_ops.subspaces import Subspaces

from .training import SHAPES, Shapes, start_of


def projector(layer: LayerSubspace, side: str) -> Tensor:
    """The projector onto the protected directions of one side, in float64."""
    basis, keep = (layer.left, layer.keep_left) if side == "left" else (layer.right, layer.keep_right)
    assert basis is not None
    inside = basis.double() @ basis.double().mT
    return torch.eye(len(inside), dtype=torch.float64) - inside if keep else inside


def assert_orthonormal(basis: Tensor) -> None:
    gram = basis.double().mT @ basis.double()
    assert torch.allclose(gram, torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=3e-7)


@pytest.mark.parametrize("sides", ["both", "left", "right", "block"])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_bases_span_the_top_singular_directions(share: float, sides: str) -> None:
    model = Shapes()
    subspaces = Subspaces.from_model(model, share, sides=sides, targets=list(SHAPES))  # type: ignore[arg-type]
    assert list(subspaces) == list(SHAPES)
    for name, layer in subspaces.items():
        m, n = layer.shape
        u, s, vt = torch.linalg.svd(getattr(model, name).detach().double())
        rank = int(share * min(m, n))
        assert (layer.rank, layer.block) == (rank, sides == "block")
        assert layer.energy == pytest.approx(float((s[:rank] ** 2).sum() / (s**2).sum()), abs=1e-12)
        assert (layer.left is None, layer.right is None) == (sides == "right", sides == "left")
        for side, width, keep, basis, top in (
            ("left", m, layer.keep_left, layer.left, u[:, :rank]),
            ("right", n, layer.keep_right, layer.right, vt[:rank].mT),
        ):
            if basis is None:
                continue
            assert basis.dtype == torch.float32
            assert keep == (sides != "block" and width - rank < rank)
            assert basis.shape == (width, width - rank if keep else rank)
            assert_orthonormal(basis)
            assert torch.allclose(projector(layer, side), top @ top.mT, rtol=0, atol=1e-6)


@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 24), st.integers(0, 24), st.integers(0, 10**6))
def test_rank_deficient_weights_have_orthonormal_bases(m: int, n: int, inner: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, inner, generator=generator) @ torch.randn(inner, n, generator=generator)
    rank = min(rank, m, n)
    layer = LayerSubspace.from_spectrum(Spectrum.of(weight), rank, "both", torch.float32)
    for side, width in (("left", m), ("right", n)):
        basis = layer.left if side == "left" else layer.right
        assert basis is not None
        assert_orthonormal(basis)
        assert float(projector(layer, side).trace()) == pytest.approx(rank, abs=1e-4)
        assert basis.shape[1] == min(rank, width - rank)
    if inner <= rank:  # then all of the weight is protected
        outside = weight.double() - projector(layer, "left") @ weight.double()
        assert float(outside.norm()) <= 1e-5 * max(1.0, float(weight.norm()))


def test_ill_conditioned_weight_has_orthonormal_bases() -> None:
    u, v = (torch.linalg.qr(torch.randn(32, 20, dtype=torch.float64)).Q for _ in range(2))
    weight = u @ torch.diag(10.0 ** -torch.arange(20, dtype=torch.float64)) @ v.mT
    for rank in (4, 10, 19, 25):
        layer = LayerSubspace.from_spectrum(Spectrum.of(weight), rank, "both", torch.float32)
        for basis in (layer.left, layer.right):
            assert basis is not None
            assert_orthonormal(basis)
    layer = LayerSubspace.from_spectrum(Spectrum.of(weight), 4, "both", torch.float64)
    assert torch.allclose(projector(layer, "right"), v[:, :4] @ v[:, :4].mT, rtol=0, atol=1e-6)


def test_complement_of_a_full_or_empty_space() -> None:
    square = torch.randn(5, 5, dtype=torch.float64)
    assert complement(square).shape == (5, 0)
    assert torch.equal(complement(square[:, :0]), torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_bases_are_fp32_for_half_precision_weights(dtype: torch.dtype) -> None:
    layer = Subspaces.from_model(Shapes(dtype), 0.5, targets="square")["square"]
    assert layer.left is not None
    assert layer.left.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_orthonormal(layer.left)


def test_rank_policies_reach_every_layer() -> None:
    model = Shapes()
    targets = list(SHAPES)
    assert {layer.rank for layer in Subspaces.from_model(model, Rank(30), targets=targets).values()} == {24, 30}
    assert [s.rank for s in Subspaces.from_model(model, targets=targets).values()] == [16, 12, 12]
    quarter = Subspaces.from_model(model, unfreeze_rank_ratio=0.75, targets=targets)
    assert [layer.rank for layer in quarter.values()] == [8, 6, 6]
    for layer in Subspaces.from_model(model, Energy(0.9), targets=targets).values():
        assert layer.energy >= 0.9


def test_project_gradients() -> None:
    model = Shapes()
    subspaces = Subspaces.from_model(model, 0.5, targets=list(SHAPES))
    grads = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    model.square.grad, model.wide.grad = grads["square"].clone(), grads["wide"].clone()
    model.bias.grad = torch.ones(7)
    subspaces.project_gradients()
    for name in ("square", "wide"):
        left, right = (projector(subspaces[name], side) for side in ("left", "right"))
        grad = grads[name].double()
        wanted = grad - left @ grad
        wanted -= wanted @ right
        assert torch.allclose(getattr(model, name).grad.double(), wanted, rtol=0, atol=1e-5)
    assert model.tall.grad is None
    assert torch.equal(model.bias.grad, torch.ones(7))


def test_sparse_gradient_is_refused() -> None:
    model = Shapes()
    subspaces = Subspaces.from_model(model, targets="square")
    model.square.grad = torch.eye(32).to_sparse()
    with pytest.raises(RuntimeError, match="square has a sparse gradient"):
        subspaces.project_gradients()


def test_others_freeze_leaves_the_targets_trainable() -> None:
    model = Shapes()
    Subspaces.from_model(model, 0.0, targets=["square", "wide"], others="freeze")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"square", "wide"}


def _poison(model: Shapes) -> None:
    with torch.no_grad():
        model.tall[3, 2] = float("nan")


@pytest.mark.parametrize(
    ("arguments", "prepare", "error", "message"),
    [
        ({"sides": "top"}, None, ValueError, "sides must be one of both, left, right, block; got 'top'"),
        ({"others": "drop"}, None, ValueError, "others must be 'train' or 'freeze', got 'drop'"),
        ({"protect": 0.5, "unfreeze_rank_ratio": 0.5}, None, ValueError, "not both"),
        ({"targets": "nothing.*"}, None, ValueError, "nothing"),
        ({}, _poison, torch.linalg.LinAlgError, "tall cannot be decomposed: the matrix holds NaN or Inf"),
    ],
)
def test_failed_calls_change_nothing(
    arguments: dict[str, object], prepare: Callable[[Shapes], None] | None, error: type[Exception], message: str
) -> None:
    model = Shapes()
    if prepare:
        prepare(model)
    before = start_of(model)
    with pytest.raises(error, match=message):
        Subspaces.from_model(model, **({"targets": list(SHAPES), "others": "freeze"} | arguments))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num())
        assert parameter.requires_grad
        assert parameter.grad is None


def test_subspaces_do_not_keep_the_model_alive() -> None:
    model = Shapes()
    subspaces = Subspaces.from_model(model, targets="square")
    assert subspaces.parameter("square") is model.square
    del model
    gc.collect()
    assert subspaces.parameter("square") is None
    with pytest.raises(RuntimeError, match=r"no parameter is bound to the bases of square: call bind\(model\)"):
        subspaces.project_gradients()
    again = Shapes()
    assert subspaces.bind(again) is subspaces
    assert subspaces.parameter("square") is again.square


def test_bind_refuses_another_model() -> None:
    model = Shapes()
    subspaces = Subspaces.from_model(model, targets=["square", "tall"])
    with pytest.raises(ValueError, match="lacks parameters that have a basis: square, tall"):
        subspaces.bind(nn.Linear(2, 2))
    other = Shapes()
    other.square = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"square is for shape \(32, 32\), the model's parameter has \(3, 3\)"):
        subspaces.bind(other)
    assert subspaces.parameter("tall") is model.tall


def test_memory_counts_what_is_stored() -> None:
    subspaces = Subspaces.from_model(Shapes(), 0.75, targets=["square", "wide"])
    bases = 4 * (32 * 8 * 2 + 24 * 6 + 56 * 18)
    sketches = 8 * 32 * (32 + 24)
    assert subspaces.memory() == bases + sketches


def test_summary_tells_what_is_not_protected() -> None:
    model = Shapes()
    model.norms = nn.ParameterList([torch.ones(4), torch.ones(4)])
    model.norms[0].requires_grad_(False)
    lines = Subspaces.from_model(model, Rank(17), targets=["square", "wide"]).summary().splitlines()
    rows = [line.split() for line in lines]
    assert rows[0] == ["layer", "shape", "rank", "energy", "left", "right"]
    assert rows[1][:5] == ["square", "32", "x", "32", "17"]
    assert rows[1][6:] == ["15", "free", "15", "free"]
    assert rows[2][6:] == ["7", "free", "17", "protected"]
    text = "\n".join(lines[4:])
    assert "NOT protected, trained: 3 without a basis, 1,355 elements" in text
    assert "1 x tall, 1,344 elements" in text
    assert "NOT protected, frozen: 1 without a basis, 4 elements" in text
    assert "1 x norms.*, 4 elements" in text
    assert "rank 0: square" in Subspaces.from_model(model, 0.0, targets="square").summary()


def test_progress_bar_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = Subspaces.from_model(Shapes(), targets=list(SHAPES))
    shown = Subspaces.from_model(Shapes(), targets=list(SHAPES), progress=True)
    assert shown.summary() == quiet.summary()

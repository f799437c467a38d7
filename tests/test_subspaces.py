import gc
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sculpt_ops import decompose, derive
from sculpt_ops.layer import LayerSubspace
from sculpt_ops.linalg import complement
from sculpt_ops.ranks import Energy, Rank, Schedule, SizePolicy
from sculpt_ops.subspaces import Subspaces

from .training import SHAPES, Shapes, layer_of, start_of


def projector(layer: LayerSubspace, side: str) -> Tensor:
    """The projector onto the protected directions of one side, in float64."""
    basis, keep = (layer.left, layer.keep_left) if side == "left" else (layer.right, layer.keep_right)
    assert basis is not None
    inside = basis.double() @ basis.double().mT
    return torch.eye(len(inside), dtype=torch.float64) - inside if keep else inside


class Matrices(nn.Module):
    """One matrix for each of `shapes`, with the decay of a weight matrix's spectrum."""

    def __init__(self, *shapes: tuple[int, int]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.weights = nn.ParameterList(
            torch.randn(shape, generator=generator) * torch.arange(1, shape[1] + 1) ** -0.5 for shape in shapes
        )


@pytest.fixture
def search_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for large matrices: few directions are found by a search."""
    monkeypatch.setattr(decompose, "_KRYLOV_SIZE", 128)


def assert_same(ours: Subspaces, theirs: Subspaces) -> None:
    assert list(ours) == list(theirs)
    for name, layer in ours.items():
        assert layer.rank == theirs[name].rank
        for side in ("left", "right"):
            assert torch.allclose(projector(layer, side), projector(theirs[name], side), rtol=0, atol=1e-5)


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
    layer = layer_of(weight, rank)
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
        layer = layer_of(weight.float(), rank)
        for basis in (layer.left, layer.right):
            assert basis is not None
            assert_orthonormal(basis)
    layer = layer_of(weight, 4)
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


class Third(SizePolicy):
    def rank_of(self, size: int) -> int:
        return size // 3 if size < 32 else 1000


class AboveAverage:
    """A policy of one's own: it gets the whole spectrum."""

    def choose(self, squares: Tensor) -> int:
        assert squares.dtype == torch.float64
        assert bool((squares.diff() <= 0).all())
        return int((squares > squares.mean()).sum())


def test_policies_of_ones_own() -> None:
    model = Shapes()
    ranks = {name: layer.rank for name, layer in Subspaces.from_model(model, Third(), targets=list(SHAPES)).items()}
    assert ranks == {"square": 32, "wide": 8, "tall": 8}
    for name, layer in Subspaces.from_model(model, AboveAverage(), targets=list(SHAPES)).items():
        squares = torch.linalg.svdvals(getattr(model, name).detach().double()).square()
        assert layer.rank == int((squares > squares.mean()).sum())

    class Half:
        def choose(self, squares: Tensor) -> int:
            return len(squares) / 2  # type: ignore[return-value]

    with pytest.raises(TypeError, match=r"protect: the policy's choose has returned 16\.0, wanted an int"):
        Subspaces.from_model(model, Half(), targets="square")


@pytest.mark.usefixtures("search_small")
def test_energy_finds_the_smallest_rank_that_holds_it() -> None:
    model = Matrices((40, 70), (96, 40), (140, 130))
    for share in (0.3, 0.9):
        for name, layer in Subspaces.from_model(model, Energy(share), targets="*").items():
            squares = torch.linalg.svdvals(model.get_parameter(name).detach().double()).square()
            held = squares.cumsum(0) / squares.sum()
            smallest = int((held < share).sum()) + 1
            assert smallest <= layer.rank <= 1.01 * smallest + 1
            assert layer.energy == pytest.approx(float(held[layer.rank - 1]), abs=1e-3)
            assert held[layer.rank - 1] >= share
    model.weights[0].data.zero_()
    assert Subspaces.from_model(model, Energy(0.9), targets="weights.0")["weights.0"].rank == 0
    assert Subspaces.from_model(model, Energy(0.0), targets="weights.1")["weights.1"].rank == 0


def test_nothing_is_protected_at_the_first_task_of_a_schedule() -> None:
    model = Shapes()
    ranks = [
        [layer.rank for layer in Subspaces.from_model(model, Schedule(task, 4), targets=list(SHAPES)).values()]
        for task in (1, 2, 4)
    ]
    assert ranks == [[0, 0, 0], [8, 6, 6], [24, 18, 18]]


def test_equal_shapes_are_decomposed_together_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(40, 30), (24, 36), (40, 30), (24, 36), (40, 30), (40, 30)]
    model = Matrices(*shapes)
    whole = Subspaces.from_model(model, 0.4, targets="*")
    assert [layer.shape for layer in whole.values()] == shapes
    calls: list[list[torch.Size]] = []
    together = derive.top_subspaces

    def spy(matrices: list[Tensor], *args: object, **kwargs: object) -> object:
        calls.append([matrix.shape for matrix in matrices])
        return together(matrices, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(derive, "top_subspaces", spy)
    monkeypatch.setattr(derive, "CHUNK", 3 * 40 * 30)
    done: list[None] = []
    targets = dict(model.named_parameters())
    layers, _ = derive.derive_layers(targets, dict.fromkeys(targets, 12), "both", {}, lambda: done.append(None))
    assert calls == [[(40, 30)] * 3, [(40, 30)], [(24, 36)] * 2]
    assert len(done) == 6
    monkeypatch.setattr(derive, "CHUNK", 1)
    alone = Subspaces.from_model(model, 0.4, targets="*")
    assert [len(call) for call in calls[3:]] == [1] * 6
    assert_same(alone, whole)
    assert list(layers) == list(whole)


@pytest.mark.usefixtures("search_small")
@pytest.mark.parametrize("policy", [Rank(10), Energy(0.3), 0.5])
def test_previous_subspaces_change_the_way_not_the_result(policy: Rank | Energy | float) -> None:
    model = Matrices((140, 130), (48, 40))
    earlier = Subspaces.from_model(model, policy, targets="*")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * parameter.norm() * torch.randn(parameter.shape) / parameter.numel() ** 0.5
    ranks = {name: layer.rank for name, layer in Subspaces.from_model(model, policy, targets="*").items()}
    later = Subspaces.from_model(model, policy, targets="*", previous=earlier)
    for name, layer in later.items():
        weight = model.get_parameter(name).detach().double()
        best = float(torch.linalg.svdvals(weight)[: layer.rank].square().sum())
        assert abs(layer.rank - ranks[name]) <= 0.01 * ranks[name] + 1
        for side, held in (("left", projector(layer, "left") @ weight), ("right", weight @ projector(layer, "right"))):
            assert float(held.square().sum()) >= (1 - 2e-4) * best, side


@pytest.mark.usefixtures("search_small")
def test_only_thin_subspaces_are_a_start() -> None:
    model = Matrices((140, 130), (48, 40))
    thin, none, half = (Subspaces.from_model(model, Rank(rank), targets="*") for rank in (10, 0, 65))
    starts = derive.search_starts(thin)
    assert list(starts) == ["weights.0"]
    assert starts["weights.0"] is thin["weights.0"]
    assert derive.search_starts(none) == derive.search_starts(half) == {}
    given: list[list[Tensor | None]] = []
    together = derive.top_subspaces

    def spy(*args: object, starts: list[Tensor | None], **kwargs: object) -> object:
        given.append(starts)
        return together(*args, starts=starts, **kwargs)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(derive, "top_subspaces", spy)
        Subspaces.from_model(model.bfloat16(), Rank(10), targets="*", previous=thin)
    assert given == [[thin["weights.0"].right], [None]]


@pytest.mark.usefixtures("search_small")
def test_previous_subspaces_of_other_shapes_are_passed_over() -> None:
    other = Subspaces.from_model(Matrices((130, 140), (48, 40)), Rank(12), targets="*")
    model = Matrices((140, 130))
    again = Subspaces.from_model(model, Rank(12), targets="*", previous=other)
    assert_same(again, Subspaces.from_model(model, Rank(12), targets="*"))


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
        ({}, _poison, torch.linalg.LinAlgError, "from_model: tall: given NaN or Inf, wanted finite"),
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
    sketches = 8 * 16 * (2 * 32 + 32 + 2 * 24 + 56)
    assert subspaces.memory() == bases + sketches


def test_memory_counts_neighbours_of_empty_tensors(tmp_path: Path) -> None:
    subspaces = Subspaces.from_model(Shapes(), 1.0, targets=list(SHAPES), basis_dtype=torch.bfloat16)
    subspaces.save(tmp_path / "bases")
    assert Subspaces.load(tmp_path / "bases").memory() == subspaces.memory()


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


def test_summary_by_kinds_has_their_smallest_and_largest_figures() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False))
    subspaces = Subspaces.from_model(model, 0.75, targets="*.weight")
    kinds, total = subspaces.summary(kinds=True).splitlines()[1:3]
    cells = re.split(" {2,}", kinds)
    energies = sorted(layer.energy for layer in subspaces.values())
    assert cells == [
        *("*.weight", "3", "8 x 8, 16 x 8, 8 x 16", "6"),
        *(f"{energies[0]:.1%} to {energies[-1]:.1%}", "2 free, 6 protected", "2 free, 6 protected"),
    ]
    assert total.startswith("3 matrices, ")
    alike = Subspaces.from_model(nn.ModuleList([nn.Linear(8, 8, bias=False)]), 0.75, targets="*.weight")
    assert alike.summary(kinds=True).splitlines()[1].split()[1:6] == ["1", "8", "x", "8", "6"]


def test_progress_bar_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = Subspaces.from_model(Shapes(), targets=list(SHAPES))
    assert capsys.readouterr() == ("", "")
    shown = Subspaces.from_model(Shapes(), targets=list(SHAPES), progress=True)
    assert shown.summary() == quiet.summary()
    # Standard output is the caller's own.
    assert capsys.readouterr().out == ""

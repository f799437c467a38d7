"""What earlier tasks taught is protected: bases of their weight changes, and of the inputs that they feed a layer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sculpt_ops import AdamW, Importance, Remember, RememberInputs, Subspaces
from sculpt_ops.layer import Sides
from sculpt_ops.storage import pack, unpack

from .ops.accuracy import gaussian
from .test_importance import Conv1D
from .training import SHAPES, Shapes, assert_kept, start_of, train

pytestmark = pytest.mark.usefixtures("one_thread")

TARGETS = list(SHAPES)
CHANGES = Remember(2)


def learn(model: nn.Module, seed: int, rank: int = 2) -> dict[str, Tensor]:
    """Change every target by a matrix of low rank, as large as a quarter of it; returns the changes."""
    changes: dict[str, Tensor] = {}
    for i, (name, weight) in enumerate(p for p in model.named_parameters() if p[0] in TARGETS):
        m, n = weight.shape
        change = gaussian(m, rank, seed=seed + i) @ gaussian(rank, n, seed=seed + i + 100)
        changes[name] = (change * 0.25 * float(weight.detach().norm()) / change.norm()).float()
        weight.data += changes[name]
    return changes


def derive(model: nn.Module, previous: Any = None, remember: Any = CHANGES, **arguments: Any) -> Subspaces:
    return Subspaces.from_model(
        model, **{"protect": 0.25, "targets": TARGETS, "remember": remember, "previous": previous, **arguments}
    )


def sequence(tasks: int = 2, **arguments: Any) -> tuple[Shapes, list[dict[str, Tensor]], Subspaces]:
    """A model after `tasks` tasks, what each has changed, and the subspaces of the next."""
    model, changes, subspaces = Shapes(), [], None
    for task in range(tasks):
        subspaces = derive(model, subspaces, **arguments)
        changes.append(learn(model, 10 * task))
    return model, changes, derive(model, subspaces, **arguments)


def protected_share(subspaces: Subspaces, name: str, change: Tensor) -> float:
    """||P dW|| / ||dW||, by the bases as they are stored."""
    layer = subspaces[name]
    free = change.double()
    if layer.left_basis is not None:
        free = free - layer.left_basis.protected(free)
    if layer.right_basis is not None:
        free = free - layer.right_basis.protected(free.mT.contiguous()).mT
    return float((change.double() - free).norm() / change.double().norm())


def test_derived_anew_nothing_that_was_learned_is_protected() -> None:
    """Both sides at a fixed rank: an update in the free space stays there, unless its directions are remembered."""
    shares = {}
    for remember in (None, Remember(1.0), Remember(0.25)):
        model = Shapes()
        subspaces = derive(model, remember=remember)
        optimizer = AdamW(model.parameters(), lr=2e-4, subspaces=subspaces)
        start = start_of(model)
        train(model, optimizer, 20)
        changes = {name: weight.detach() - start[name] for name, weight in model.named_parameters()}
        after = derive(model, subspaces if remember else None, remember)
        shares[remember] = {name: protected_share(after, name, changes[name]) for name in TARGETS}
        if remember is not None:
            assert after.remembered_share() == pytest.approx(shares[remember], rel=1e-5, abs=1e-6)
    assert max(shares[None].values()) < 0.1
    assert min(shares[Remember(1.0)].values()) > 1 - 1e-5
    assert min(shares[Remember(0.25)].values()) > 0.7


@pytest.mark.parametrize("protect", [0.25, 0.0])
@pytest.mark.parametrize("sides", ["both", "left", "right"])
def test_the_space_is_that_of_the_weights_joined_with_that_of_every_change(sides: Sides, protect: float) -> None:
    model, changes, subspaces = sequence(3, sides=sides, protect=protect)
    for name, layer in subspaces.items():
        weight = dict(model.named_parameters())[name].detach().double()
        U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
        rank = int(protect * min(weight.shape))
        left = [U[:, :rank], *(torch.linalg.svd(c[name].double()).U[:, :2] for c in changes)]
        right = [Vh[:rank].mT, *(torch.linalg.svd(c[name].double()).Vh[:2].mT for c in changes)]
        assert layer.rank == rank
        wanted = [rank + 6 if sides in ("both", side) else 0 for side in ("left", "right")]
        assert layer.protected_dims == tuple(min(d, length) for d, length in zip(wanted, weight.shape, strict=True))
        for basis, spans in ((layer.left_basis, left), (layer.right_basis, right)):
            if basis is None:
                continue
            reference = torch.linalg.qr(torch.cat(spans, dim=1)).Q
            every = torch.eye(basis.length).double()
            assert (basis.protected(every) - reference @ reference.mT).norm() < 1e-4
            # Orthonormal as any other basis is, and the narrower of the two is stored.
            assert basis.columns.shape[1] == min(basis.free, basis.length - basis.free)
            gram = basis.columns.double().mT @ basis.columns.double()
            assert (gram - torch.eye(len(gram))).norm() < 1e-5
        for change in changes:
            assert protected_share(subspaces, name, change[name]) > 1 - 1e-4


def test_at_the_first_task_there_is_nothing_to_remember() -> None:
    both = [Remember(4), RememberInputs(0.9)]
    plain, first = derive(Mapped(), remember=None, targets=MAPS), derive(Mapped(), remember=both, targets=MAPS)
    for name, layer in first.items():
        assert layer.protected_dims == plain[name].protected_dims
    assert first.remembered_share() == {}
    nothing = derive(Shapes(), protect=0.0)
    assert not any(layer.protects for layer in nothing.values())
    assert "NOT protected, rank 0: square, wide, tall" in nothing.summary()


@pytest.mark.parametrize("basis_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("state", ["full", "subspace"])
@pytest.mark.parametrize("protect", [0.25, 0.0])
def test_steps_keep_what_is_remembered(protect: float, state: str, basis_dtype: torch.dtype | None) -> None:
    model, changes, subspaces = sequence(2, protect=protect, basis_dtype=basis_dtype)
    start = start_of(model)
    optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, subspaces=subspaces, state=state)
    train(model, optimizer)
    assert_kept(subspaces, start)
    for name, weight in model.named_parameters():
        if name in TARGETS:
            # What an earlier task reads and writes: its change's own rows and columns do not see the step.
            moved = (weight.detach() - start[name]).double()
            U = torch.linalg.svd(changes[0][name].double()).U[:, :2]
            assert float((U.mT @ moved).norm()) < (1e-4 if basis_dtype is None else 1e-2) * float(moved.norm())


@pytest.mark.parametrize("offload", [False, True])
def test_a_guard_puts_back_what_is_remembered(offload: bool, tmp_path: Path) -> None:
    model, _, subspaces = sequence()
    start = start_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    guard = subspaces.guard(optimizer, offload=offload)
    train(model, optimizer)
    assert_kept(subspaces, start)
    guard.save(tmp_path / "guard.safetensors")
    guard.remove()
    again = subspaces.guard(optimizer, start=tmp_path / "guard.safetensors")
    train(model, optimizer, 10)
    again.remove()
    assert_kept(subspaces, start)


def test_gradients_lose_what_is_remembered() -> None:
    model, changes, subspaces = sequence(2, protect=0.0)
    for name, weight in model.named_parameters():
        weight.grad = changes[0][name].clone() if name in TARGETS else None
    subspaces.project_gradients()
    for name in TARGETS:
        grad = dict(model.named_parameters())[name].grad
        assert grad is not None
        assert grad.norm() < 1e-4 * changes[0][name].norm()


@pytest.mark.parametrize("state", ["full", "subspace"])
def test_an_optimizer_takes_the_larger_spaces_over(state: str) -> None:
    model = Shapes()
    first = derive(model)
    optimizer = AdamW(model.parameters(), lr=1e-3, subspaces=first, state=state)
    train(model, optimizer, 20)
    second = derive(model, first, Remember(6))
    start = start_of(model)
    optimizer.set_subspaces(second)
    train(model, optimizer)
    assert_kept(second, start)


def test_where_nothing_is_left_free_weights_stay() -> None:
    model = Shapes()
    first = derive(model)
    learn(model, 0, rank=24)
    full = derive(model, first, Remember(1.0))
    assert full["square"].protected_dims == (32, 32)
    start = start_of(model)
    optimizer = AdamW(model.parameters(), lr=1e-2, subspaces=full)
    train(model, optimizer, 10)
    assert_kept(full, start, 10, moved=-1)
    # Where the smaller side is full nothing is left either.
    for name in TARGETS:
        weight = dict(model.named_parameters())[name].detach()
        assert (weight - start[name]).norm() <= 1e-5 * start[name].norm()


def test_rounding_of_the_weights_is_not_remembered() -> None:
    model = Shapes(torch.float32)
    first = derive(model)
    noise = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data *= 1 + 2**-24 * (2 * torch.rand(weight.shape, generator=noise) - 1)
    assert derive(model, first, Remember(8))["square"].protected_dims == (8, 8)
    learn(model, 0)
    assert derive(model, first, Remember(8))["square"].protected_dims == (10, 10)


class Mapped(nn.Module):
    """Two linear maps and a Conv1D that are fed the same tensor, then one that is fed theirs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.query, self.key = nn.Linear(24, 16), nn.Linear(24, 16, bias=False)
        self.value, self.out = Conv1D(24, 16), nn.Linear(16, 20)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.out(torch.tanh(self.query(x) + self.key(x) + self.value(x)))


MAPS = ["query.weight", "key.weight", "value.weight", "out.weight"]


def inputs(seed: int, tokens: int = 30, rank: int = 5) -> Tensor:
    """A batch of three rows in a space of `rank` dimensions."""
    return (gaussian(3 * tokens, rank, seed=seed) @ gaussian(rank, 24, seed=seed + 50)).float().reshape(3, tokens, 24)


def after(model: Mapped, energy: float, *batches: Any, **arguments: Any) -> Subspaces:
    """The subspaces after as many tasks as there are batches, whose inputs these are."""
    arguments = {"targets": MAPS, "protect": 0.0, **arguments}
    subspaces = derive(model, None, RememberInputs(energy), **arguments)
    for batch in batches:
        subspaces = derive(model, subspaces, RememberInputs(energy), batches=[batch], **arguments)
    return subspaces


def test_what_a_layer_does_to_earlier_inputs_stays() -> None:
    model = Mapped()
    subspaces = after(model, 1.0, inputs(0), inputs(1))
    old = [inputs(0), inputs(1)]
    outputs = [model(x).detach() for x in old]
    assert subspaces["query.weight"].protected_dims == (0, 10)
    assert subspaces["value.weight"].protected_dims == (10, 0)
    optimizer = AdamW([dict(model.named_parameters())[name] for name in MAPS], lr=1e-2, subspaces=subspaces)
    for step in range(30):
        optimizer.zero_grad()
        model(inputs(5 + step)).square().sum().backward()
        optimizer.step()
    assert float((model(inputs(9)) - Mapped()(inputs(9))).detach().norm()) > 1.0
    # The last layer's inputs span all of R^16: it cannot move.
    for x, output in zip(old, outputs, strict=True):
        assert float((model(x) - output).detach().norm()) < 1e-4 * float(output.norm())


def test_directions_are_those_of_gradient_projection_memory() -> None:
    """Saha et al., equations 8 and 9, from the covariance as numpy has it."""
    model, energy = Mapped(), 0.9
    first, second = inputs(0, rank=24) * torch.linspace(1, 0.05, 24), inputs(1, rank=24) * torch.linspace(0.05, 1, 24)
    subspaces = after(model, energy, first, second)
    known = torch.zeros(24, 0).double()
    for x in (first, second):
        rows = x.reshape(-1, 24).double()
        total = float(rows.square().sum())
        outside = rows - rows @ known @ known.mT
        held = total - float(outside.square().sum())
        _, singular, Vh = torch.linalg.svd(outside, full_matrices=False)
        rank = int(((held + singular.square().cumsum(0)) < energy * total).sum()) + 1
        known = torch.linalg.qr(torch.cat([known, Vh[:rank].mT], dim=1)).Q
    basis = subspaces["key.weight"].right_basis
    assert basis is not None
    assert (basis.protected(torch.eye(24).double()) - known @ known.mT).norm() < 1e-4
    assert subspaces["key.weight"].protected_dims == (0, known.shape[1])


def test_layers_with_one_input_share_its_basis(tmp_path: Path) -> None:
    subspaces = after(Mapped(), 0.9, inputs(0), sides="both")
    query, key, value = (subspaces[name] for name in MAPS[:3])
    assert query.right_basis is key.right_basis is value.left_basis
    assert subspaces.remembered[MAPS[0]].inputs is subspaces.remembered[MAPS[2]].inputs
    alone = after(Mapped(), 0.9, inputs(0), sides="both", targets=["query.weight", "out.weight"])
    # Two more matrices, and no more bases.
    assert subspaces.memory_of_tasks is not None
    sketches = (subspaces._sketches, subspaces.memory_of_tasks.start_sketches)
    more = sum(each[name].nbytes for each in sketches for name in MAPS[1:3])
    assert subspaces.memory() == alone.memory() + more
    subspaces.save(tmp_path / "subspaces.safetensors")
    loaded = Subspaces.load(tmp_path / "subspaces.safetensors")
    assert loaded[MAPS[0]].right_basis is loaded[MAPS[2]].left_basis
    assert loaded.memory() == subspaces.memory()


def test_padding_is_no_input() -> None:
    x = inputs(0)
    mask = torch.ones(3, 30)
    mask[1, 10:] = 0
    padded = x.clone()
    padded[1, 10:] = 100 * gaussian(20, 24, seed=7).float()
    x[1, 10:] = 0
    masked = after(Mapped(), 0.95, {"x": padded, "attention_mask": mask})["query.weight"].right_basis
    zeroed = after(Mapped(), 0.95, x)["query.weight"].right_basis
    assert masked is not None
    assert zeroed is not None
    every = torch.eye(24).double()
    assert (masked.protected(every) - zeroed.protected(every)).norm() < 1e-5


def test_both_memories_are_joined() -> None:
    model = Mapped()
    both = [Remember(2), RememberInputs(1.0)]
    first = derive(model, None, both, targets=MAPS, protect=0.0)
    change = (gaussian(16, 2) @ gaussian(2, 24)).float()
    model.query.weight.data += change
    second = derive(model, first, both, targets=MAPS, protect=0.0, batches=[inputs(3)])
    layer = second["query.weight"]
    assert layer.protected_dims == (2, 7)
    assert layer.right_basis is not None
    for rows in (change, inputs(3)[0]):
        outside = rows.double() - layer.right_basis.protected(rows.mT.double().contiguous()).mT
        assert outside.norm() < 1e-4 * rows.norm()


@pytest.mark.parametrize("carried", [False, True])
def test_a_loaded_memory_goes_on_to_the_bit(carried: bool, tmp_path: Path) -> None:
    model, _, subspaces = sequence(2)
    subspaces.save(tmp_path / "subspaces.safetensors")
    loaded = Subspaces.load(tmp_path / "subspaces.safetensors")
    assert loaded.remembered_share() == subspaces.remembered_share()
    learn(model, 77)
    ours, theirs = derive(model, subspaces), derive(model, loaded.carry() if carried else loaded)
    assert ours["square"].protected_dims == (14, 14)
    for name, layer in ours.items():
        for a, b in zip(layer.tensors(), theirs[name].tensors(), strict=True):
            assert torch.equal(a, b)
    assert ours.remembered_share() == theirs.remembered_share()


def test_an_older_file_knows_the_share_of_the_last_change() -> None:
    _, _, subspaces = sequence(2)
    tensors, header = pack(subspaces, {})
    header["remembered_share"] = {name: shares[-1] for name, shares in header.pop("remembered_shares").items()}
    assert Subspaces(*unpack(tensors, header, "older")).remembered_shares() == subspaces.remembered_shares()


def test_memory_counts_start_weights_and_what_is_remembered() -> None:
    model, _, subspaces = sequence(2)
    weights = sum(dict(model.named_parameters())[name].nbytes for name in TARGETS)
    assert subspaces.memory() > derive(model, remember=None).memory() + weights
    assert subspaces.carry().memory_of_tasks is subspaces.memory_of_tasks
    summary = subspaces.summary()
    assert "remembered" in summary.splitlines()[0]
    assert summary.splitlines()[1].endswith("4 left, 4 right")
    assert "on the CPU, what is remembered and start weights" in summary


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"sides": "block"}, ValueError, "remember: given with sides='block', wanted 'both', 'left' or 'right'"),
        ({"remember": "rank"}, TypeError, r"remember: given 'rank', wanted Remember\(...\), RememberInputs\(...\)"),
        ({"remember": [Remember(1), Remember(2)]}, TypeError, "one of each"),
        ({"remember": RememberInputs(0.9)}, ValueError, "square is in a Shapes, wanted a Linear or a Conv1D"),
        ({"previous": {}}, ValueError, r"previous: it remembers nothing, .* None at the first task"),
        ({"targets": ["square", "bi*"]}, ValueError, "bias"),
    ],
)
def test_what_cannot_be_remembered_is_refused(arguments: dict[str, Any], error: type, words: str) -> None:
    model, _, subspaces = sequence(1)
    start = start_of(model)
    with pytest.raises(error, match=words):
        derive(model, **{"previous": subspaces, "others": "freeze", **arguments})
    assert model.bias.requires_grad
    for name, weight in model.named_parameters():
        assert torch.equal(weight, start[name])


def test_a_memory_of_other_weights_is_refused() -> None:
    model, _, subspaces = sequence(1)
    fewer = derive(Shapes(), targets=["square"])
    with pytest.raises(ValueError, match="previous: it remembers nothing of wide, tall, wanted subspaces of the same"):
        derive(model, fewer)
    mapped = after(Mapped(), 0.9)
    with pytest.raises(ValueError, match=r"previous: it has no start weights of .*remember=Remember"):
        derive(Mapped(), mapped, targets=MAPS)
    model.square = nn.Parameter(torch.randn(32, 31))
    with pytest.raises(ValueError, match=r"what it remembers of square is of another shape, wanted \(32, 31\)"):
        derive(model, subspaces)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Remember(0), "Remember: rank: given 0, wanted 1 or more"),
        (lambda: Remember(1.5), r"Remember: rank: given 1.5, wanted an int, or a float in \(0, 1\]"),
        (lambda: Remember(True), "Remember: rank: given True"),
        (lambda: RememberInputs(0), r"RememberInputs: energy: given 0, wanted a number in \(0, 1\]"),
        (lambda: RememberInputs("0.9"), "RememberInputs: energy: given '0.9', wanted a number"),  # type: ignore[arg-type]
    ],
)
def test_ranks_and_energies_out_of_range(make: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        make()


def test_inputs_that_cannot_be_had_are_refused() -> None:
    model = Mapped()
    first = derive(model, None, RememberInputs(0.9), targets=MAPS)
    for batches, words in (
        (None, "batches: given None, wanted model inputs"),
        ([], "batches: empty, wanted at least one model input"),
        (iter(()), "batches: empty, wanted at least one model input"),
        ([inputs(0) * float("nan")], "batches: the inputs of .* are not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            derive(model, first, RememberInputs(0.9), targets=MAPS, batches=batches)
    with pytest.raises(ValueError, match=r"leaves the inputs of query\.weight free; wanted 'both' or 'right'"):
        derive(model, first, RememberInputs(0.9), targets=MAPS, sides="left", batches=[inputs(0)])


def test_batches_serve_importance_and_inputs_alike() -> None:
    model = Mapped()
    policy = Importance(0.1, 0.5)
    targets = ["query.weight", "key.weight", "out.weight"]
    with torch.no_grad():
        for name in targets:
            weight = dict(model.named_parameters())[name]
            weight.mul_(0.1).add_(torch.eye(*weight.shape))
    first = derive(model, None, RememberInputs(0.9), targets=targets, protect=policy, batches=iter([inputs(0)]))
    second = derive(model, first, RememberInputs(0.9), targets=targets, protect=policy, batches=iter([inputs(0)]))
    assert second["query.weight"].protected_dims[1] > first["query.weight"].protected_dims[1]


@pytest.mark.parametrize("saved", [False, True])
def test_with_inputs_alone_the_protected_share_of_a_change_is_estimated(saved: bool, tmp_path: Path) -> None:
    """Of a weight whose change lies among the remembered inputs, one where nothing of it does, and two in between."""
    model = Mapped()
    how = RememberInputs(1.0)
    first = derive(model, None, how, targets=MAPS, protect=0.0)
    assert first.remembered_share() == {}
    if saved:
        first.save(tmp_path / "first.safetensors")
        first = Subspaces.load(tmp_path / "first.safetensors")
    start = start_of(model)
    rows = inputs(3)
    known = torch.linalg.svd(rows.double().reshape(-1, 24), full_matrices=False).Vh[:5].mT
    weights = dict(model.named_parameters())
    for name, inside in (("query.weight", 1.0), ("key.weight", 0.0)):
        change = gaussian(16, 24)
        among = change @ known @ known.mT
        weights[name].data += (among if inside else change - among).float()
    for name in ("value.weight", "out.weight"):
        weights[name].data += gaussian(*weights[name].shape).float()
    second = derive(model, first, how, targets=MAPS, protect=0.0, batches=[rows])
    shares, exact = second.remembered_share(), second.leak(start)
    assert list(shares) == MAPS
    assert (shares["query.weight"] > 1 - 1e-5, shares["key.weight"] < 1e-5) == (True, True)
    for name, share in shares.items():
        assert share == pytest.approx(exact[name].total, rel=0.3, abs=1e-5), name
    # Of both tasks as the third begins: of the first one, whose change is the start of the second less its own.
    if saved:
        second.save(tmp_path / "second.safetensors")
        second = Subspaces.load(tmp_path / "second.safetensors")
    between = start_of(model)
    for name in MAPS:
        weights[name].data += gaussian(*weights[name].shape).float()
    third = derive(model, second, how, targets=MAPS, protect=0.0, batches=[inputs(4)])
    changes = [{name: between[name] - start[name] for name in MAPS}, start_of(model)]
    changes[1] = {name: changes[1][name] - between[name] for name in MAPS}
    assert {name: shares[-1] for name, shares in third.remembered_shares().items()} == third.remembered_share()
    for name, (of_first, of_second) in third.remembered_shares().items():
        layer = third[name]
        for estimate, change in zip((of_first, of_second), (each[name].double() for each in changes), strict=True):
            basis = layer.left_basis if name == "value.weight" else layer.right_basis
            assert basis is not None
            inside = basis.protected(change if name == "value.weight" else change.mT.contiguous())
            assert estimate == pytest.approx(float(inside.norm() / change.norm()), rel=0.3, abs=1e-5), name
        assert of_first >= shares[name] - 1e-5

"""Moments in free coordinates when the subspaces change, and what is refused on the way."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sculpt_ops.basis import Basis
from sculpt_ops.layer import LayerSubspace
from sculpt_ops.linalg import complement
from sculpt_ops.optim import AdamW
from sculpt_ops.optim.rebase import rebase_first, rebase_second
from sculpt_ops.subspaces import Subspaces

from .ops.accuracy import gaussian, orthonormal
from .training import SHAPES, Kinds, Shapes, assert_kept, feed, recorded, start_of, train

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {name: layer.with_reflectors() for name, layer in Kinds().subspaces.items()}


def turned(layer: LayerSubspace) -> LayerSubspace:
    """The same free spaces with other bases: a reflector becomes a free basis, which is turned."""

    def other(basis: Basis | None) -> Basis | None:
        if basis is None:
            return None
        span = basis.span().double()
        free = span if basis.keep else complement(span)
        return Basis.store((free @ orthonormal(free.shape[1], free.shape[1], torch.float64, 4)).float(), "free")

    return replace(layer, left_basis=other(layer.left_basis), right_basis=other(layer.right_basis))


def moments_of(layer: LayerSubspace) -> tuple[Tensor, Tensor]:
    first = gaussian(*layer.free_shape, dtype=torch.float32)
    return first, gaussian(*layer.free_shape, seed=7, dtype=torch.float32) ** 2


@pytest.mark.parametrize("name", KINDS)
def test_same_subspaces_leave_the_moments_as_they_are(name: str) -> None:
    layer = KINDS[name]
    first, second = moments_of(layer)
    assert (rebase_first(first, layer, layer) - first).norm() <= 2e-6 * first.norm()
    assert torch.equal(rebase_second(second, layer, layer), second)


@pytest.mark.parametrize("name", KINDS)
def test_other_bases_of_the_same_space(name: str) -> None:
    """The first moment stays the same matrix; the second, of sums of squares, keeps its total."""
    layer, other = KINDS[name], turned(KINDS[name])
    first, second = moments_of(layer)
    moved, squares = rebase_first(first, layer, other), rebase_second(second, layer, other)
    assert (other.from_coordinates(moved) - layer.from_coordinates(first)).norm() <= 3e-6 * first.norm()
    assert (moved - first).norm() > 0.1 * first.norm()
    assert (squares > 0).all()
    assert float(squares.sum()) == pytest.approx(float(second.sum()), rel=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_second_moment_is_that_of_uncorrelated_coordinates(name: str) -> None:
    layer, other = KINDS[name], turned(KINDS[name])
    second = moments_of(layer)[1]
    samples = gaussian(4000, *layer.free_shape, seed=9) * second.double().sqrt()
    change = [
        torch.eye(d).double() if a is None or b is None else b.free_columns().double().mT @ a.free_columns().double()
        for a, b, d in zip(
            (layer.left_basis, layer.right_basis), (other.left_basis, other.right_basis), layer.shape, strict=True
        )
    ]
    exact = (change[0] @ samples @ change[1].mT).square().mean(0)
    # A mean of 4000 squares deviates by 2.2 % of itself.
    assert torch.allclose(rebase_second(second, layer, other).double(), exact, rtol=0.15, atol=0.0)


def test_another_space_keeps_what_lies_in_it() -> None:
    """Of the first moment the common part. The second takes the mean for what is not known: all the same stay so."""
    old = KINDS["both_75_32"]
    one_side = LayerSubspace(old.shape, old.rank, 1.0, turned(old).left_basis, None)
    left, right = (Basis.store(orthonormal(d, d - 4, torch.float32, d), "free") for d in old.shape)
    wide = LayerSubspace(old.shape, 4, 1.0, left, right)
    first, _ = moments_of(old)
    for to in (one_side, wide):
        full = old.from_coordinates(first).double()
        kept = to.from_coordinates(rebase_first(first, old, to)).double()
        P, Q = (
            torch.eye(d).double() if b is None else b.free_columns().double() @ b.free_columns().double().mT
            for b, d in zip((to.left_basis, to.right_basis), to.shape, strict=True)
        )
        assert (kept - P @ full @ Q).norm() <= 3e-6 * full.norm()
        same = rebase_second(torch.full(old.free_shape, 0.25), old, to)
        assert same.shape == to.free_shape
        assert torch.allclose(same, torch.tensor(0.25), rtol=1e-5)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_from_task_to_task(amsgrad: bool) -> None:
    """No subspaces, some, others, none: moments go along and nothing that is protected leaks."""
    model = Shapes()
    optimizer = AdamW(model.parameters(), 1e-2, state="subspace", amsgrad=amsgrad)
    train(model, optimizer, 10)
    state = optimizer.state[dict(model.named_parameters())["wide"]]
    full = state["exp_avg"].clone()
    for share in (0.5, 0.75, 0.25):
        subspaces = Subspaces.from_model(model, share, targets=list(SHAPES))
        optimizer.set_subspaces(subspaces)
        layer = subspaces["wide"]
        full = layer.from_coordinates(layer.to_coordinates(full))
        assert torch.allclose(layer.from_coordinates(state["exp_avg"]), full, atol=1e-6)
        assert all((s[name] >= 0).all() for s in optimizer.state.values() for name in s if name.endswith("sq"))
        start = start_of(model)
        train(model, optimizer, 30)
        assert_kept(subspaces, start, 30)
        full = layer.from_coordinates(state["exp_avg"])
    optimizer.set_subspaces(None)
    assert torch.equal(state["exp_avg"], full)
    assert state["exp_avg_sq"].shape == (24, 56)
    train(model, optimizer, 3)
    assert min(leak.total for leak in subspaces.leak(start).values()) > 1e-3


def test_start_of_the_decay_is_that_of_the_task() -> None:
    """After a second set_subspaces the weights decay toward what they were then."""
    model = Kinds()
    optimizer = AdamW(model.parameters(), 1e-2, subspaces=model.subspaces, state="subspace", decay_to="start")
    train(model, optimizer, 5)
    optimizer.set_subspaces(model.subspaces)
    start = start_of(model)
    train(model, optimizer, 5)
    for name, parameter in model.named_parameters():
        assert torch.equal(optimizer.state[parameter]["start"], start[name])


def test_refused_subspaces_leave_the_old_ones() -> None:
    model = Kinds()
    subspaces = model.subspaces
    optimizer = AdamW(model.parameters(), 1e-2, subspaces=subspaces, state="subspace")
    train(model, optimizer, 2)
    start = start_of(model)
    before = {p: {name: value.clone() for name, value in s.items()} for p, s in optimizer.state.items()}
    other = Shapes()
    foreign = Subspaces.from_model(other, targets="wide")
    block = Subspaces({n: replace(layer, block=True) for n, layer in subspaces.items() if n.startswith("both")}, {})
    block.bind(model)
    with pytest.raises(ValueError, match="lacks parameters that have a basis: wide"):
        optimizer.set_subspaces(foreign)
    with pytest.raises(ValueError, match="4 matrices have 'block'"):
        optimizer.set_subspaces(block)
    feed(model, recorded(model, 1)[0])
    optimizer.compress_gradients()
    with pytest.raises(RuntimeError, match="gradients wait in the old coordinates"):
        optimizer.set_subspaces(None)
    optimizer.zero_grad()
    for parameter, state in before.items():
        for name, value in state.items():
            assert torch.equal(optimizer.state[parameter][name], value)
    train(model, optimizer, 20)
    assert_kept(subspaces, start, 20)


def test_states_of_another_shape_are_refused_before_anything_changes() -> None:
    """torch's fused kernel checks no shapes: it read beyond the end of the smaller moments and crashed."""
    model = Kinds()
    saved = AdamW(model.parameters(), subspaces=model.subspaces, state="subspace")
    train(model, saved, 2)
    start = start_of(model)
    words = r"the exp_avg of a parameter of shape \(32, 32\) has shape \(24, 24\), wanted \(32, 32\): load what"
    late = AdamW(model.parameters(), state="subspace")
    for optimizer in (AdamW(model.parameters(), subspaces=model.subspaces), late):
        optimizer.load_state_dict(saved.state_dict())
        feed(model, recorded(model, 1)[0])
        with pytest.raises(ValueError, match=words):
            optimizer.step()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, start[name])
    with pytest.raises(ValueError, match=words):
        late.set_subspaces(model.subspaces)
    plain = AdamW(model.parameters())
    train(model, plain, 1)
    saved.load_state_dict(plain.state_dict())
    feed(model, recorded(model, 1)[0])
    with pytest.raises(ValueError, match=r"has shape \(32, 32\), wanted \(24, 24\)"):
        saved.step()

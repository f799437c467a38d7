import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from sculpt_ops.optim import AdamW
from sculpt_ops.ranks import Rank
from sculpt_ops.subspaces import Subspaces

from .training import SHAPES, Shapes, assert_kept, assert_same_weights, start_of, train

pytestmark = pytest.mark.usefixtures("one_thread")


def test_named_parameters_bind_by_canonical_name() -> None:
    model, replaced = Shapes(), Shapes()
    subspaces = Subspaces.from_model(model, targets=list(SHAPES))
    for prefix in ("", "module.", "_orig_mod.module."):
        named = [(prefix + name, parameter) for name, parameter in replaced.named_parameters()]
        optimizer = AdamW([{"params": named}], 1e-2, subspaces=subspaces)
        start = start_of(replaced)
        train(replaced, optimizer, 20)
        assert_kept(subspaces.bind(replaced), start, 20)
        subspaces.bind(model)


def test_a_deep_copy_is_bound_to_the_copy_of_the_model() -> None:
    model = Shapes()
    subspaces = Subspaces.from_model(model, targets=list(SHAPES))
    copied, theirs = copy.deepcopy((model, subspaces))
    assert all(theirs.parameter(name) is copied.get_parameter(name) for name in SHAPES)
    for name in SHAPES:
        copied.get_parameter(name).grad = torch.ones_like(copied.get_parameter(name))
    theirs.project_gradients()
    left = theirs["square"].left
    assert left is not None
    assert copied.square.grad is not None
    assert float((left.mT @ copied.square.grad).abs().max()) < 1e-5
    assert subspaces.parameter("square") is model.square
    assert model.square.grad is None


def test_copies_without_their_model_are_bound_to_none() -> None:
    model = Shapes()
    subspaces = Subspaces.from_model(model, targets=list(SHAPES))
    for alone in (copy.deepcopy(subspaces), pickle.loads(pickle.dumps(subspaces))):
        with pytest.raises(RuntimeError, match=r"no parameter is bound to the bases of square, .*: call bind\(model\)"):
            alone.project_gradients()
        assert alone.bind(model).parameter("square") is model.square
        assert torch.equal(alone["square"].left, subspaces["square"].left)
    model.subspaces = subspaces  # a module that holds its own
    assert copy.deepcopy(model).subspaces.parameter("square") is not model.square


def test_basis_without_a_parameter_is_refused() -> None:
    model = Shapes()
    subspaces = Subspaces.from_model(model, targets=list(SHAPES))
    with pytest.raises(ValueError, match="lacks parameters that have a basis: square, tall; it was made without names"):
        AdamW([model.wide], subspaces=subspaces)
    optimizer = AdamW([("wide", model.wide), ("bias", model.bias)])
    with pytest.raises(ValueError, match=r"lacks parameters that have a basis: square, tall$"):
        optimizer.set_subspaces(subspaces)
    other = Shapes()
    other.wide = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"wide is for shape \(24, 56\), the parameter has \(2, 2\)"):
        AdamW(other.named_parameters(), subspaces=subspaces)
    with pytest.raises(ValueError, match=r"is torch\.float32, the parameter torch\.float64"):
        AdamW(Shapes(torch.float64).named_parameters(), subspaces=subspaces)


def test_basis_on_another_device_is_refused() -> None:
    model = Shapes()
    subspaces = Subspaces.from_model(model, targets="square").to("meta")
    with pytest.raises(ValueError, match=r"square is on meta, the parameter on cpu: call subspaces\.to\('cpu'\)"):
        AdamW(model.parameters(), subspaces=subspaces)


@pytest.fixture
def process_group() -> Iterator[None]:
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_bases_of_unsharded_parameters_do_not_fit_sharded_ones() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(8, 8))
    subspaces = Subspaces.from_model(model, targets="0.weight")
    before = AdamW(model.parameters(), subspaces=subspaces)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"0\.weight is sharded, what its basis was made for is not"):
        AdamW(model.named_parameters(), subspaces=subspaces)
    AdamW(model.named_parameters(), subspaces=subspaces.bind(model))
    before.param_groups[0]["params"] = list(model.parameters())
    with pytest.raises(RuntimeError, match="no longer in the optimizer"):
        before.step()


def test_set_subspaces_binds_late_and_unbinds() -> None:
    model, plain = Shapes(), Shapes()
    optimizer, reference = AdamW(model.parameters(), 1e-2), torch.optim.AdamW(plain.parameters(), 1e-2)
    train(model, optimizer, 3)
    train(plain, reference, 3)
    assert_same_weights(model, plain)
    subspaces = Subspaces.from_model(model, Rank(8), targets=list(SHAPES))
    start = start_of(model)
    optimizer.set_subspaces(subspaces)
    train(model, optimizer, 20)
    assert_kept(subspaces, start, 20)
    optimizer.set_subspaces(None)
    train(model, optimizer, 3)
    assert min(leak.total for leak in subspaces.leak(start).values()) > 1e-3


def test_replaced_parameters_are_noticed() -> None:
    model = Shapes()
    optimizer = AdamW(model.parameters(), subspaces=Subspaces.from_model(model, targets=list(SHAPES)))
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.zeros(32, 32))
    with pytest.raises(RuntimeError, match="1 parameters with a basis are no longer in the optimizer"):
        optimizer.step()

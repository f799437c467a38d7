import itertools
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sculpt_ops.guard import Guard
from sculpt_ops.layer import LayerSubspace
from sculpt_ops.optim import AdamW
from sculpt_ops.subspaces import Subspaces

from .training import SHAPES, STEPS, Shapes, assert_kept, assert_same_weights, gradients, start_of, train

pytestmark = pytest.mark.usefixtures("one_thread")

SIDES = ("both", "left", "right", "block")
# Where a library lies that others must not find: transformers imports torchao wherever it is installed.
OPTIMIZERS = Path(sys.prefix) / "optimizers"


def lion(parameters: Any) -> torch.optim.Optimizer:
    package = pytest.importorskip("lion_pytorch")
    return package.Lion(parameters, lr=1e-3, weight_decay=0.1)  # type: ignore[no-any-return]


def muon(parameters: Any) -> torch.optim.Optimizer:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    return torch.optim.Muon([p for p in parameters if p.dim() == 2], lr=2e-3, weight_decay=0.1)


OPTIMIZER = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=0.1),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "AdamW, one kernel": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
    "Muon": muon,
    "Lion": lion,
}


def subspaces_of(model: nn.Module, share: float = 0.5, **options: Any) -> Subspaces:
    return Subspaces.from_model(model, share, targets=list(SHAPES), **options)


def kept(guard: Guard) -> dict[str, list[str]]:
    """The parts that are stored for every matrix."""
    return {name: sorted(start) for name, start in guard._starts.items()}


@pytest.mark.parametrize("name", OPTIMIZER)
@pytest.mark.parametrize("share", [0.25, 0.75])
def test_any_optimizer_keeps_the_promise(name: str, share: float) -> None:
    model = Shapes()
    subspaces = subspaces_of(model, share)
    start = start_of(model)
    optimizer = OPTIMIZER[name](model.parameters())
    subspaces.guard(optimizer)
    train(model, optimizer, 200)
    assert_kept(subspaces, start, 200)


def hold_with_eight_bit_moments() -> None:
    """Run in a process of its own by the test below."""
    from torchao.optim import AdamW8bit  # type: ignore[import-not-found]

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.Linear(96, 64, bias=False))
    subspaces = Subspaces.from_model(model, 0.5, targets="*.weight")
    start = start_of(model)
    optimizer = AdamW8bit(model.parameters(), lr=1e-3)
    subspaces.guard(optimizer)
    # Its step is made to be compiled, which takes 13 s and a C++ compiler.
    with torch.compiler.set_stance("force_eager"):
        train(model, optimizer, 200)
    assert all("8bit" in type(state["exp_avg"]).__name__ for state in optimizer.state.values())
    assert_kept(subspaces, start, 200)


def test_eight_bit_adam_keeps_the_promise() -> None:
    path = [str(Path(__file__).parents[1]), str(OPTIMIZERS)]
    code = f"from {__name__} import hold_with_eight_bit_moments as hold; hold()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if "No module named 'torchao'" in done.stderr:
        pytest.skip("torchao is not installed")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("sides", "share"), list(itertools.product(SIDES, (0.2, 0.8))))
@pytest.mark.parametrize("wrapped", [False, True])
def test_every_kind_of_subspace_is_held(sides: str, share: float, wrapped: bool) -> None:
    model = Shapes()
    subspaces = subspaces_of(model, share, sides=sides)
    start = start_of(model)
    optimizer = OPTIMIZER["SGD"](model.parameters())
    subspaces.guard(SimpleNamespace(optimizer=optimizer) if wrapped else optimizer)
    train(model, optimizer)
    assert_kept(subspaces, start)


@pytest.mark.parametrize("share", [0.2, 0.8])
@pytest.mark.parametrize("form", ["reflector", "bfloat16", "float16"])
def test_bases_in_every_storage_are_held(share: float, form: str) -> None:
    model = Shapes()
    subspaces = subspaces_of(model, share, basis_dtype=None if form == "reflector" else getattr(torch, form))
    subspaces.use_reflectors()
    start = start_of(model)
    optimizer = OPTIMIZER["Adam"](model.parameters())
    subspaces.guard(optimizer)
    train(model, optimizer)
    assert_kept(subspaces, start)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_leaks_one_rounding(dtype: torch.dtype, share: float) -> None:
    model = Shapes(dtype)
    subspaces = subspaces_of(model, share)
    start = start_of(model)
    optimizer = OPTIMIZER["SGD"](model.parameters())
    subspaces.guard(optimizer)
    train(model, optimizer, 200)
    for name, leak in subspaces.leak(start).items():
        # Of the weights that are there, however many steps have gone by: half a unit in the last place.
        weight = getattr(model, name).detach().double()
        assert leak.total_norm <= torch.finfo(dtype).eps / 2 * float(weight.norm())
        assert leak.change > 0.05 * float(weight.norm())


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_double_precision(share: float) -> None:
    model = Shapes(torch.float64)
    subspaces = subspaces_of(model, share)
    start = start_of(model)
    optimizer = OPTIMIZER["Adam"](model.parameters())
    subspaces.guard(optimizer)
    train(model, optimizer)
    assert max(leak.total for leak in subspaces.leak(start).values()) < 1e-13


@pytest.mark.parametrize(("share", "most"), [(0.25, 1e-6), (0.8, 0.0)])
def test_an_untouched_weight_stays(share: float, most: float) -> None:
    """To the bit where the weight itself is stored, to rounding where images are."""
    model = Shapes()
    start = start_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    guard = subspaces_of(model, share).guard(optimizer)
    assert kept(guard) == dict.fromkeys(SHAPES, ["weight"] if most == 0.0 else ["left_image", "right_image"])
    train(model, optimizer, 20)
    for name, parameter in model.named_parameters():
        assert float((parameter.detach() - start[name]).norm()) <= most * float(start[name].norm())


def test_the_smaller_form_is_stored() -> None:
    def parts(dtype: torch.dtype, share: float, sides: str = "both") -> tuple[list[str], int]:
        model = Shapes(dtype)
        guard = subspaces_of(model, share, sides=sides).guard(torch.optim.SGD(model.parameters(), lr=0.1))
        return kept(guard)["wide"], sum(t.nbytes for t in guard._starts["wide"].values())

    images, weight = ["left_image", "right_image"], ["weight"]
    assert parts(torch.float32, 0.25) == (images, 4 * 6 * (24 + 56))
    assert parts(torch.float32, 0.75) == (weight, 4 * 24 * 56)  # 12 of 24 would do, but the left basis spans 6
    assert parts(torch.float32, 0.75, "right") == (["right_image"], 4 * 24 * 18)
    assert parts(torch.float32, 0.75, "block") == (["core"], 4 * 18 * 18)
    assert parts(torch.bfloat16, 0.25) == (images, 4 * 6 * (24 + 56))
    assert parts(torch.bfloat16, 0.5) == (weight, 2 * 24 * 56)
    assert parts(torch.bfloat16, 1.0, "block") == (["core"], 4 * 24 * 24)
    assert parts(torch.float64, 0.25) == (images, 8 * 6 * (24 + 56))


class Largest(TorchDispatchMode):
    """Elements of the largest float64 tensor that an op has returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype is torch.float64:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("share", [0.1, 0.8])
def test_no_matrix_is_copied_to_float64(share: float) -> None:
    model = Shapes()
    subspaces = subspaces_of(model, share)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Largest() as largest:
        subspaces.guard(optimizer)
        train(model, optimizer, 1)
    assert largest.elements <= 3 * 56  # of the thin factors and images, or none


@pytest.mark.parametrize("share", [0.25, 0.8])
def test_offloading_changes_nothing(share: float) -> None:
    here, away = Shapes(), Shapes()
    for model, offload in ((here, False), (away, True)):
        optimizer = OPTIMIZER["Adam"](model.parameters())
        guard = subspaces_of(model, share).guard(optimizer, offload=offload)
        assert all(part.device.type == "cpu" for start in guard._starts.values() for part in start.values())
        train(model, optimizer, 10)
    assert_same_weights(here, away)


def test_removed_guard_ends_and_frees() -> None:
    model = Shapes()
    subspaces = subspaces_of(model)
    optimizer = OPTIMIZER["Adam"](model.parameters())
    step = optimizer.step
    guard = subspaces.guard(optimizer)
    train(model, optimizer, 3)
    assert max(leak.total for leak in subspaces.leak().values()) < 1e-3
    assert optimizer.step == step
    assert guard.nbytes == sum(part.nbytes for start in guard._starts.values() for part in start.values()) > 0
    parts = [weakref.ref(part) for start in guard._starts.values() for part in start.values()]
    guard.remove()
    assert guard.nbytes == 0
    assert all(part() is None for part in parts)
    train(model, optimizer, 3)
    assert min(leak.total for leak in subspaces.leak().values()) > 0.05


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = Shapes()
    subspaces = subspaces_of(model)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = accelerator.prepare(OPTIMIZER["Adam"](model.parameters()))
    subspaces.guard(optimizer)
    start = start_of(model)
    for _ in gradients(model, STEPS):
        with accelerator.accumulate(model):
            optimizer.step()
    assert_kept(subspaces, start)


def test_frozen_weights_and_those_without_a_basis_are_left_alone() -> None:
    model = Shapes()
    subspaces = subspaces_of(model, 0.8)
    model.wide.requires_grad_(False)
    start = start_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    subspaces.guard(optimizer)
    for _ in gradients(model, 3):
        model.wide.grad = None
        optimizer.step()
    assert torch.equal(model.wide, start["wide"])
    assert not torch.equal(model.bias, start["bias"])
    assert model.square.requires_grad
    assert model.square.is_leaf


def resumed(tmp_path: Path, share: float, start_for: Callable[[dict[str, Tensor]], Any]) -> tuple[Shapes, Shapes]:
    """A run of ten steps, and one whose process ended after five."""
    whole, first, second = Shapes(), Shapes(), Shapes()
    start = start_of(whole)
    for model in (whole, first):
        subspaces = subspaces_of(model, share)
        optimizer = OPTIMIZER["SGD"](model.parameters())
        guard = subspaces.guard(optimizer)
        for step, _ in enumerate(gradients(model, 10), start=1):
            if model is first and step > 5:
                break
            optimizer.step()
    guard.save(tmp_path / "guard.safetensors")
    subspaces.save(tmp_path / "bases.safetensors")
    second.load_state_dict(first.state_dict())
    loaded = Subspaces.load(tmp_path / "bases.safetensors", second)
    continued = OPTIMIZER["SGD"](second.parameters())
    continued.load_state_dict(optimizer.state_dict())
    loaded.guard(continued, start=start_for(start))
    for step, _ in enumerate(gradients(second, 10), start=1):
        if step > 5:
            continued.step()
    return whole, second


@pytest.mark.parametrize("share", [0.25, 0.8])
def test_a_resumed_guard_is_the_same_to_the_bit(tmp_path: Path, share: float) -> None:
    assert_same_weights(*resumed(tmp_path, share, lambda start: tmp_path / "guard.safetensors"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bases.safetensors", "guard.safetensors"]
    assert_same_weights(*resumed(tmp_path, share, lambda start: {f"module.{name}": w for name, w in start.items()}))


def test_start_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = Shapes()
    subspaces = subspaces_of(model, 0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    path = tmp_path / "guard.safetensors"
    guard = subspaces.guard(optimizer)
    guard.save(path)
    whole = path.read_bytes()
    guard.remove()
    start = start_of(model)

    def refused(start: Any, match: str, given: Subspaces = subspaces, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=match):
            given.guard(optimizer, start=start)
        assert not optimizer._optimizer_step_post_hooks

    refused(tmp_path / "absent", "absent", error=FileNotFoundError)
    for size in (0, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path, r"guard\.safetensors is truncated or not a safetensors file")
    subspaces.save(path)
    refused(path, r"was not written by Guard\.save")
    path.write_bytes(whole)
    refused(path, r"of the start of square it has .*\(8, 32\).*wanted .*\(16, 32\)", given=subspaces_of(model, 0.5))
    free = subspaces_of(model, 0.75)
    refused(path, r"of the start of square it has .* wanted \{'weight': \(32, 32\)\}", given=free)
    refused({"square": start["square"]}, "start lacks the weights of wide, tall")
    refused(start | {"tall": torch.zeros(2, 2)}, r"start\['tall'\] has shape \(2, 2\), wanted \(56, 24\)")
    train(model, optimizer, 20)
    refused(start_of(model), "for square it is not the weight that the basis was made from")
    refused(path, "for square it is not the weight", given=subspaces_of(model, 0.25))
    # The same space, in the coordinates of another basis: what is put back would be noise.
    subspaces.use_reflectors()
    refused(path, "or not with this basis")


def test_loading_leaves_the_weights_alone(tmp_path: Path) -> None:
    model = Shapes()
    subspaces = subspaces_of(model, 0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    subspaces.guard(optimizer).save(tmp_path / "guard.safetensors")
    drifted = start_of(model)
    drifted["square"] += 0.1
    model.load_state_dict(drifted)
    subspaces.guard(optimizer, start=tmp_path / "guard.safetensors")
    assert torch.equal(model.square, drifted["square"])


def test_unusable_optimizers_are_refused() -> None:
    model = Shapes()
    subspaces = subspaces_of(model)
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer or wrap one, got Shapes"):
        subspaces.guard(model)
    partial = torch.optim.SGD([model.wide], lr=0.1)
    with pytest.raises(ValueError, match="lacks parameters that have a basis: square, tall; it was made without names"):
        subspaces.guard(partial)
    assert not partial._optimizer_step_post_hooks
    half = Shapes(torch.bfloat16)
    with pytest.raises(ValueError, match=r"got an AdamW with master='split', whose weights have low bits"):
        subspaces_of(half).guard(AdamW(half.parameters(), master="split"))
    subspaces.guard(AdamW(model.parameters(), master="split"))  # float32 has none


def test_replaced_parameters_are_noticed() -> None:
    model = Shapes()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    subspaces_of(model).guard(optimizer)
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.zeros(32, 32))
    with pytest.raises(RuntimeError, match="1 parameters with a basis are no longer in the optimizer"):
        optimizer.step()


def test_a_subspace_without_rank_needs_no_guard() -> None:
    model = Shapes()
    subspaces = subspaces_of(model, 0.0)
    assert all(isinstance(layer, LayerSubspace) and layer.rank == 0 for layer in subspaces.values())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert subspaces.guard(optimizer).nbytes == 0
    train(model, optimizer, 1)

"""Models of bare matrices, and training steps without data: shared by the tests of leaks and optimizers."""

import copy
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from sculpt_ops.decompose import top_subspaces
from sculpt_ops.layer import LayerSubspace, Sides
from sculpt_ops.leak import measure_exact, sketch_weight
from sculpt_ops.subspaces import Subspaces

T = TypeVar("T")

SHAPES = {"square": (32, 32), "wide": (24, 56), "tall": (56, 24)}
STEPS = 100


class Shapes(nn.Module):
    """The matrices of `SHAPES` and a vector that no target matches."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        for name, shape in SHAPES.items():
            weight = torch.randn(shape, generator=generator) / shape[1] ** 0.5
            self.register_parameter(name, nn.Parameter(weight.to(dtype)))
        self.bias = nn.Parameter(torch.randn(7, generator=generator).to(dtype))


class Kinds(nn.Module):
    """A matrix for every kind of subspace: sides, a quarter or three quarters protected, bases in 32 or 16 bit."""

    def __init__(self, dtypes: Sequence[torch.dtype] = (torch.float32,)) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        layers, sketches = {}, {}
        all_sides: tuple[Sides, ...] = ("both", "left", "right")
        kinds = itertools.product(all_sides, (0.25, 0.75), (None, torch.bfloat16))
        for i, (sides, share, basis_dtype) in enumerate(kinds):
            m, n = list(SHAPES.values())[(i + i // 3) % 3]
            weight = torch.randn(m, n, generator=generator) / n**0.5
            parameter = nn.Parameter(weight.to(dtypes[(i + i // 2) % len(dtypes)]))
            name = f"{sides}_{int(100 * share)}_{16 if basis_dtype else 32}"
            self.register_parameter(name, parameter)
            layers[name] = layer_of(parameter, int(share * min(m, n)), sides, basis_dtype)
            sketches[name] = sketch_weight(layers[name], parameter, name)
        self.subspaces = Subspaces(layers, sketches).bind(self)


def layer_of(weight: Tensor, rank: int, sides: Sides = "both", basis_dtype: torch.dtype | None = None) -> LayerSubspace:
    """The subspace of one matrix, rank 0 included."""
    return LayerSubspace.from_top_subspace(top_subspaces([weight], rank)[0], sides, basis_dtype)


def gradients(model: nn.Module, steps: int) -> Iterator[None]:
    """Set gradients with a constant and a random part, as training has; the same for every model of these shapes."""
    generator = torch.Generator().manual_seed(3)
    trend = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
    for _ in range(steps):
        for p, t in zip(model.parameters(), trend, strict=True):
            p.grad = (t + torch.randn(p.shape, generator=generator)).to(p.dtype)
        yield


def recorded(model: nn.Module, steps: int) -> list[list[Tensor]]:
    """The gradients of `gradients`, to be fed to more than one model."""
    return [[p.grad for p in model.parameters() if p.grad is not None] for _ in gradients(model, steps)]


def feed(model: nn.Module, grads: Sequence[Tensor]) -> None:
    """Copies of `grads`, in each parameter's dtype."""
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        parameter.grad = grad.to(parameter.dtype, copy=True)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> None:
    for _ in gradients(model, steps):
        optimizer.step()


def copied(objects: T, how: str) -> T:
    """As "deepcopy" or "pickle" copies them: parameters stay those of the models that are copied with them."""
    if how == "deepcopy":
        return copy.deepcopy(objects)
    buffer = io.BytesIO()
    torch.save(objects, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # type: ignore[no-any-return]


def start_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(model: nn.Module, other: nn.Module) -> None:
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def assert_kept(
    subspaces: Subspaces,
    start: Mapping[str, Tensor],
    steps: int = STEPS,
    *,
    weights: Mapping[str, Tensor] | None = None,
    moved: float = 0.05,
) -> None:
    """The promise for fp32, ||P dW|| <= 1e-6 ||dW|| + 2^-24 sqrt(steps) ||W||, on weights that have moved.

    weights: in place of the parameters that `subspaces` are bound to. moved: the smallest ||dW|| / ||W||.
    """
    if weights is None:
        leaks = subspaces.leak(start)
    else:
        leaks = {name: measure_exact(layer, weights[name], start[name]) for name, layer in subspaces.items()}
    for name, leak in leaks.items():
        assert leak.change > moved * float(start[name].norm())
        bound = 1e-6 * leak.change + 2**-24 * steps**0.5 * float(start[name].norm())
        promised = [leak.total_norm] if subspaces[name].block else [leak.total_norm, leak.left_norm, leak.right_norm]
        for norm in promised:
            assert norm is None or norm <= bound, name

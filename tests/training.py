"""A model of three bare matrices, and training steps without data: shared by the tests of leaks and optimizers."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sculpt_ops.decompose import top_subspaces
from sculpt_ops.layer import LayerSubspace, Sides
from sculpt_ops.subspaces import Subspaces

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


def layer_of(weight: Tensor, rank: int, sides: Sides = "both") -> LayerSubspace:
    """The subspace of one matrix, rank 0 included."""
    return LayerSubspace.from_top_subspace(top_subspaces([weight], rank)[0], sides)


def gradients(model: nn.Module, steps: int) -> Iterator[None]:
    """Set gradients with a constant and a random part, as training has; the same for every model of these shapes."""
    generator = torch.Generator().manual_seed(3)
    trend = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
    for _ in range(steps):
        for p, t in zip(model.parameters(), trend, strict=True):
            p.grad = (t + torch.randn(p.shape, generator=generator)).to(p.dtype)
        yield


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> None:
    for _ in gradients(model, steps):
        optimizer.step()


def start_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(model: nn.Module, other: nn.Module) -> None:
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def assert_kept(subspaces: Subspaces, start: dict[str, Tensor], steps: int = STEPS) -> None:
    """The promise for fp32, ||P dW|| <= 1e-6 ||dW|| + 2^-24 sqrt(steps) ||W||, on weights that have moved."""
    for name, leak in subspaces.leak(start).items():
        assert leak.change > 0.05 * float(start[name].norm())
        bound = 1e-6 * leak.change + 2**-24 * steps**0.5 * float(start[name].norm())
        promised = [leak.total_norm] if subspaces[name].block else [leak.total_norm, leak.left_norm, leak.right_norm]
        for norm in promised:
            assert norm is None or norm <= bound, name

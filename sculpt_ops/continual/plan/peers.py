"""The layers that PEFT's OSF and mini_trainer's OSFT put in place of a linear one, as far as memory and products go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gpus import Work

__all__ = ["OsfLinear", "OsftLinear", "factorise"]


def _factors(m: int, n: int, rank: int, dtype: torch.dtype, requires_grad: bool) -> nn.ParameterList:
    """U (m, rank), S (rank), V (rank, n)."""
    shapes = ((m, rank), (rank,), (rank, n))
    return nn.ParameterList([nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad) for shape in shapes])


def _projected(grad: Tensor, length: int, rank: int) -> Work:
    """`grad`, one factor's, projected with `rank` vectors of `length`."""
    return Work(2 * grad.nbytes + length * rank * grad.element_size(), 4 * grad.numel() * rank)


class OsfLinear(nn.Module):
    """peft 0.21.2, tuners/osf/layer.py: the frozen weight, U_low, S_low, V_low trained, the same once more as they
    were, and U_high or V_high where that factor is no square one. Factors are float32 whatever the weight is
    (`autocast_adapter_dtype`)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        m, n = self.shape = base.weight.shape
        self.rank, self.free = rank, min(m, n) - rank
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.base = base.requires_grad_(False)
        self.low = _factors(m, n, self.free, dtype, True)
        self.start = _factors(m, n, self.free, dtype, False)
        high = torch.empty(0 if m == n else rank, max(m, n), dtype=dtype)
        self.high = nn.Parameter(high, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        (U, S, V), (U0, S0, V0) = self.low, self.start
        out: Tensor = self.base(x)
        A = torch.cat([U * S.unsqueeze(0), -(U0 * S0.unsqueeze(0))], dim=1)
        B = torch.cat([V, V0], dim=0)
        change: Tensor = F.linear(F.linear(x.to(A.dtype), B), A)
        return out + change.to(x.dtype)

    @property
    def weight(self) -> Tensor:
        """T5 asks its dtype."""
        return self.base.weight

    def bases(self) -> int:
        """Bytes kept beside weight and trained factors."""
        return sum(factor.nbytes for factor in (self.high, *self.start))

    def projections(self) -> list[Work]:
        """Of the gradients of U and V, each with what spans its free space, or with `high`."""
        sides = zip((self.low[0], self.low[2]), self.shape, strict=True)
        return [_projected(g, length, self.free if length == min(self.shape) else self.rank) for g, length in sides]


class OsftLinear(nn.Module):
    """mini_trainer 0.9.0, osft_utils.py: frozen U, S, V of the protected directions and trained ones of the others, in
    the weight's dtype; the weight itself is gone."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        m, n = self.shape = base.weight.shape
        self.rank = min(rank, min(m, n) - 1)
        self.high = _factors(m, n, self.rank, base.weight.dtype, False)
        self.low = _factors(m, n, min(m, n) - self.rank, base.weight.dtype, True)
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        high, low = (((x @ V.mT) * S) @ U.mT for U, S, V in (self.high, self.low))
        out: Tensor = high + low
        return out if self.bias is None else out + self.bias

    def bases(self) -> int:
        return 0

    def projections(self) -> list[Work]:
        """Of the gradients before and of the factors after the step."""
        sides = zip((self.low[0], self.low[2]), self.shape, strict=True)
        return 2 * [_projected(factor, length, self.rank) for factor, length in sides]


def factorise(
    model: nn.Module,
    ranks: Mapping[str, int],
    kind: type[OsfLinear] | type[OsftLinear],
    others: Literal["train", "freeze"],
) -> None:
    """Replace the layer of every weight named in `ranks`, the protected rank of each, by `kind`, in place; `others`:
    the parameters without one. ValueError, with nothing done, if one of the layers is no `torch.nn.Linear`."""
    found = {name: model.get_submodule(name.rpartition(".")[0]) for name in ranks}
    layers = {name: layer for name, layer in found.items() if isinstance(layer, nn.Linear)}
    if odd := {type(found[name]).__name__ for name in found if name not in layers}:
        raise ValueError(f"not for {', '.join(sorted(odd))} layers")
    if others == "freeze":
        model.requires_grad_(False)
    for name, layer in layers.items():
        parent, _, attribute = name.removesuffix(".weight").rpartition(".")
        setattr(model.get_submodule(parent), attribute, kind(layer, ranks[name]))

"""The tolerance of the ops: against float64, relative to the plain torch expression in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REMOVE_AND_KEEP = (
    {},
    {"keep_left": True},
    {"keep_right": True},
    {"keep_left": True, "keep_right": True},
    {"block": True},
)


def orthonormal(rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, cols, dtype=torch.float64, generator=generator))[0].to(dtype)


def gaussian(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sides(left: Tensor, right: Tensor, flags: dict[str, bool]) -> list[tuple[Tensor | None, Tensor | None]]:
    """The bases that go with the flags: one, the other, both."""
    wanted = [(left, None), (None, right), (left, right)]
    if flags.get("block"):
        return [(left, right)]
    return [
        (a, b)
        for a, b in wanted
        if not (flags.get("keep_left") and a is None) and not (flags.get("keep_right") and b is None)
    ]


class Extended:
    """A matrix in 80-bit floating point, with the few methods that the plain twins use: float64's own yardstick."""

    dtype = torch.float64

    def __init__(self, array: Any) -> None:
        self.array = array.double().numpy().astype(np.longdouble) if isinstance(array, Tensor) else array

    def to(self, dtype: torch.dtype, copy: bool = False) -> Extended:
        return self

    @property
    def mT(self) -> Extended:
        return Extended(np.swapaxes(self.array, -1, -2))

    def __matmul__(self, other: Extended) -> Extended:
        return Extended(self.array @ other.array)

    def __sub__(self, other: Extended) -> Extended:
        return Extended(self.array - other.array)

    def __add__(self, other: Extended) -> Extended:
        return Extended(self.array + other.array)

    def clone(self) -> Extended:
        return self

    def copy_(self, other: Extended) -> Extended:
        return other


def errors(result: Tensor, exact: Any) -> Tensor:
    """|result - exact| in float64, with ``exact`` in float64 or 80-bit."""
    if isinstance(exact, Extended):
        return torch.from_numpy(np.abs(result.double().numpy().astype(np.longdouble) - exact.array).astype(np.float64))
    return (result.double() - exact).abs()


def assert_accurate(
    ours: Tensor | Sequence[Tensor], plain: Callable[..., Any], *args: Any, scale: float | None = None, **kwargs: Any
) -> None:
    """``ours``, one result or several, against ``plain(*args)`` evaluated in float64 (80-bit for float64 itself).

    Max and mean error at most twice those of ``plain`` in the arguments' own dtype, plus twice the rounding of the
    exact result to that dtype, plus a floor of a few eps of the input's magnitude: where everything cancels, the plain
    expression's own error can be exactly 0.
    """
    results = [ours] if isinstance(ours, Tensor) else ours
    naive_result = plain(*args, **kwargs)
    dtype = naive_result.dtype
    raise_to = Extended if dtype is torch.float64 else Tensor.double
    assert all(result.shape == naive_result.shape and result.dtype is dtype for result in results)
    if naive_result.numel() == 0:
        return
    exact = plain(*[raise_to(a) if isinstance(a, Tensor) else a for a in args], **kwargs)
    rounded = torch.from_numpy(exact.array.astype(np.float64)) if isinstance(exact, Extended) else exact.to(dtype)
    naive, rounding = errors(naive_result, exact), errors(rounded, exact)
    # A half-precision result of fp32 arithmetic has an fp32 floor; otherwise the dtype's own.
    eps = torch.finfo(torch.float32 if dtype.itemsize == 2 else dtype).eps
    floor = 4 * eps * float(args[0].double().abs().max() if scale is None else scale)
    for result in results:
        error = errors(result, exact)
        assert error.max() <= 2 * naive.max() + 2 * rounding.max() + floor, (
            error.max(),
            naive.max(),
            rounding.max(),
            floor,
        )
        assert error.mean() <= 2 * naive.mean() + 2 * rounding.mean() + floor

"""How much of a weight's accumulated change lies where it should not: exact, or from a sketch of the start weights."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .layer import LayerSubspace
from .names import canonical_name, list_names

__all__ = [
    "LayerLeak",
    "check_start_weights",
    "measure_exact",
    "measure_sketched",
    "sketch_shape",
    "sketch_side",
    "sketch_weight",
]

SKETCH_COLUMNS = 16


@dataclass(frozen=True)
class LayerLeak:
    """Frobenius norms of dW = W - W0 and of its part in the protected space, with P_L and P_R the projectors onto the
    protected left and right directions (from the bases as stored).

    change: ||dW||.
    left_norm: ||P_L dW||, right_norm: ||dW P_R||; None on a side that is not protected. With sides="block" they are
        reported but not promised to be small.
    total_norm: what is promised to be small: ||dW - (I - P_L) dW (I - P_R)|| for two sides, ||P_L dW|| or ||dW P_R||
        for one, ||P_L dW P_R|| for a block.
    `left`, `right` and `total` are these norms as a share of ||dW||, 0.0 where dW is zero.
    """

    change: float
    total_norm: float
    left_norm: float | None
    right_norm: float | None

    @property
    def total(self) -> float:
        return self._share(self.total_norm)

    @property
    def left(self) -> float | None:
        return None if self.left_norm is None else self._share(self.left_norm)

    @property
    def right(self) -> float | None:
        return None if self.right_norm is None else self._share(self.right_norm)

    def _share(self, norm: float) -> float:
        # Not `> 0`: of weights that hold NaN the change is NaN, and so is its share.
        return 0.0 if self.change == 0 else norm / self.change


def check_start_weights(start: Mapping[str, Tensor], layers: Mapping[str, LayerSubspace]) -> dict[str, Tensor]:
    """`start` by canonical name; ValueError if it lacks one of `layers` or has another shape."""
    start = {canonical_name(name): tensor for name, tensor in start.items()}
    if missing := [name for name in layers if name not in start]:
        raise ValueError(f"start lacks the weights of {list_names(missing)}")
    for name, layer in layers.items():
        if tuple(start[name].shape) != layer.shape:
            raise ValueError(f"start[{name!r}] has shape {tuple(start[name].shape)}, wanted {layer.shape}")
    return start


def measure_exact(layer: LayerSubspace, weight: Tensor, start: Tensor) -> LayerLeak:
    """The leak of `weight` (m, n) since `start` (m, n), in float64."""
    change = weight.detach().double() - start.detach().to(weight.device).double()
    right = None if layer.right_basis is None else layer.protected_right(change.mT).mT
    left = both = None
    if layer.left_basis is not None:
        left = layer.protected_left(change)
        both = None if right is None else layer.protected_left(right)
    return _leak(layer, change, left, right, both)


def sketch_weight(layer: LayerSubspace, weight: Tensor, name: str) -> Tensor:
    """[W Omega; W Z; Z] in float64, (2 m + n, 16), with Z = P_R Omega; without a right basis W Omega alone, (m, 16):
    enough to estimate every norm of `LayerLeak` later without W0.

    Omega (n, 16) holds random signs / 4 drawn from `name`, so that it need not be stored; then E ||A Omega||^2 =
    ||A||^2 for any A, with a relative deviation of at most sqrt(2 / 16) of the square. Z is stored because it must stay
    the same to the bit: a right basis that was rounded anew, 1e-7 away, would move W Z by more than a leak is large.
    """
    omega = _signs(name, layer.shape[1]).to(weight.device)
    if layer.right_basis is None:
        return _product(weight, omega)
    z = layer.protected_right(omega)
    return torch.cat([*_product(weight, torch.cat([omega, z], dim=1)).split(SKETCH_COLUMNS, dim=1), z])


def sketch_side(weight: Tensor, name: str, side: Literal["left", "right"]) -> Tensor:
    """Omegaᵀ W, transposed, in float64, (n, 16), for the right side, W Omega (m, 16) for the left: of a change of W
    since, from the difference, the share that a projector of that side keeps, whatever projector it is."""
    omega = _signs(name, weight.shape[0 if side == "right" else 1]).to(weight.device)
    return _product(weight, omega, transpose=side == "right")


def sketch_shape(layer: LayerSubspace) -> tuple[int, int]:
    """Of what `sketch_weight` gives."""
    m, n = layer.shape
    return (m if layer.right_basis is None else 2 * m + n), SKETCH_COLUMNS


def measure_sketched(layer: LayerSubspace, weight: Tensor, start_sketch: Tensor, name: str) -> LayerLeak:
    """The leak of `weight` (m, n), estimated from the sketch of the start weight."""
    m, n = layer.shape
    omega = _signs(name, n).to(weight.device)
    if layer.right_basis is None:
        change = _product(weight, omega) - start_sketch
        return _leak(layer, change, layer.protected_left(change), None, None)
    start, start_right, z = start_sketch.split([m, m, n])
    # Omega and Z side by side: the weight and the left basis are read once.
    changes = _product(weight, torch.cat([omega, z], dim=1)) - torch.cat([start, start_right], dim=1)
    change, right = changes.split(SKETCH_COLUMNS, dim=1)
    if layer.left_basis is None:
        return _leak(layer, change, None, right, None)
    left, both = layer.protected_left(changes).split(SKETCH_COLUMNS, dim=1)
    return _leak(layer, change, left, right, both)


def _leak(
    layer: LayerSubspace, change: Tensor, left: Tensor | None, right: Tensor | None, both: Tensor | None
) -> LayerLeak:
    """From dW, P_L dW, dW P_R and P_L dW P_R, or from all of them multiplied by Omega: the norms read the same."""
    if left is None or right is None or both is None:
        promised = [side for side in (left, right) if side is not None]
    else:
        promised = [both] if layer.block else [left, right - both]
    return LayerLeak(
        change=_norm(change),
        total_norm=float(np.hypot.reduce([_norm(part) for part in promised])),
        left_norm=None if left is None else _norm(left),
        right_norm=None if right is None else _norm(right),
    )


def _product(weight: Tensor, factor: Tensor, transpose: bool = False) -> Tensor:
    """weight @ factor, summed in float64 without a copy of the weight: float32 sums would hide a leak of 1e-6."""
    product: Tensor = torch.ops.sculpt._product(weight.detach(), factor, transpose=transpose)
    return product


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix))


def _signs(name: str, rows: int) -> Tensor:
    # The raw bits of Philox are the same in every numpy release and on every platform, unlike draws of normals: a saved
    # sketch stays readable.
    raw = np.random.Philox(key=zlib.crc32(name.encode())).random_raw(-(-rows * SKETCH_COLUMNS // 64))
    bits = np.unpackbits(raw.astype("<u8").view(np.uint8)).reshape(-1, SKETCH_COLUMNS)[:rows]
    return torch.from_numpy(bits).double().mul_(2.0 / SKETCH_COLUMNS**0.5).sub_(1.0 / SKETCH_COLUMNS**0.5)

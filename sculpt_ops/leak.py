"""How much of a weight's accumulated change lies where it should not: exact, or from a sketch of the start weights."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .layer import LayerSubspace

__all__ = ["SKETCH_COLUMNS", "LayerLeak", "measure_exact", "measure_sketched", "sketch_weight"]

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
        return norm / self.change if self.change > 0 else 0.0


def measure_exact(layer: LayerSubspace, weight: Tensor, start: Tensor) -> LayerLeak:
    """The leak of `weight` (m, n) since `start` (m, n), in float64."""
    change = weight.detach().double() - start.detach().to(weight.device).double()
    inside = None if layer.right is None else layer.protected_right(change.mT).mT
    return _measure(layer, change, inside)


def sketch_weight(layer: LayerSubspace, weight: Tensor, name: str) -> Tensor:
    """[W Omega, W P_R Omega] / 4 in float64, (m, 16) or with a right basis (m, 32): enough to estimate every norm of
    `LayerLeak` later without W. Omega (n, 16) holds random signs drawn from `name`, so that it need not be stored; then
    E ||A Omega / 4||^2 = ||A||^2 for any A, with a relative deviation of at most sqrt(2 / 16) of the square."""
    omega = _signs(name, layer.shape[1]).to(weight.device) / SKETCH_COLUMNS**0.5
    if layer.right is not None:
        omega = torch.cat([omega, layer.protected_right(omega)], dim=1)
    sketch: Tensor = torch.ops.sculpt._product(weight.detach(), omega)
    return sketch


def measure_sketched(layer: LayerSubspace, weight: Tensor, start_sketch: Tensor, name: str) -> LayerLeak:
    """The leak of `weight` (m, n), estimated from the sketch of the start weight."""
    change = sketch_weight(layer, weight, name) - start_sketch
    inside = None if layer.right is None else change[:, SKETCH_COLUMNS:]
    return _measure(layer, change[:, :SKETCH_COLUMNS], inside)


def _measure(layer: LayerSubspace, change: Tensor, inside_right: Tensor | None) -> LayerLeak:
    """From dW and dW P_R, or from the two multiplied by Omega on the right: the norms read the same."""
    left = None if layer.left is None else layer.protected_left(change)
    if left is None or inside_right is None:
        parts = [part for part in (left, inside_right) if part is not None]
    elif layer.block:
        parts = [layer.protected_left(inside_right)]
    else:
        parts = [left, inside_right - layer.protected_left(inside_right)]
    return LayerLeak(
        change=_norm(change),
        total_norm=float(np.hypot.reduce([_norm(part) for part in parts])),
        left_norm=None if left is None else _norm(left),
        right_norm=None if inside_right is None else _norm(inside_right),
    )


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix))


def _signs(name: str, rows: int) -> Tensor:
    # The raw bits of Philox are the same in every numpy release and on every platform, unlike draws of normals: a saved
    # sketch stays readable.
    raw = np.random.Philox(key=zlib.crc32(name.encode())).random_raw(-(-rows * SKETCH_COLUMNS // 64))
    bits = np.unpackbits(raw.astype("<u8").view(np.uint8)).reshape(-1, SKETCH_COLUMNS)[:rows]
    return torch.from_numpy(bits).double().mul_(2).sub_(1)

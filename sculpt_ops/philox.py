"""Philox4x32-10 and its normals in plain torch, on any device: the numbers of ``csrc/common/philox.h`` to the bit.

How words become numbers is said there. Every operation rounds by itself here because it is a torch op by itself;
nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["normals", "philox", "rademacher"]

Words = tuple[Tensor, Tensor, Tensor, Tensor]

_MASK = 0xFFFFFFFF
_SQRT_HALF = 0x3F3504F3
# Cephes' logf, sinf and cosf (S. Moshier), highest power first.
_LOG1P = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1),
    *(2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1, -0.5, 1.0),
)
_SINE = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1, 1.0)
_COSINE = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2, -0.5, 1.0)


def philox(counter: Words, seed: int) -> Words:
    """The four words of each counter, int64 tensors of 32-bit values, broadcastable. The key: the seed's two halves."""
    a, b, c, d = counter
    low, high = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        even, odd = 0xD2511F53 * a, 0xCD9E8D57 * c  # 64-bit products: their sign bit is the top bit of the high word
        a, b, c, d = (odd >> 32 & _MASK) ^ b ^ low, odd & _MASK, (even >> 32 & _MASK) ^ d ^ high, even & _MASK
        low, high = (low + 0x9E3779B9) & _MASK, (high + 0xBB67AE85) & _MASK
    return a, b, c, d


def rademacher(words: Words) -> Words:
    """-1 where the top bit is set, else 1; float32."""
    a, b, c, d = (1.0 - 2.0 * (word >> 31).float() for word in words)
    return a, b, c, d


def normals(words: Words) -> Words:
    """Standard normals by Box-Muller from the pairs (a, b) and (c, d); float32, at most 5.77."""
    a, b, c, d = words
    return (*_box_muller(a, b), *_box_muller(c, d))


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def _box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    bits = ((a >> 8) + 1).float().view(torch.int32) - _SQRT_HALF
    exponent = ((bits >> 23) - 24).float()
    f = ((bits & 0x7FFFFF) + _SQRT_HALF).view(torch.float32) - 1.0
    squared = -2.0 * (exponent * 0.69314718 + f * _polynomial(f, _LOG1P))
    radius = torch.sqrt(squared.double()).float()  # torch's float32 root is MKL's on the CPU, not correctly rounded
    turns = b >> 8
    quarter = (turns + (1 << 21)) >> 22
    x = (turns - (quarter << 22)).float() * 3.7450703e-7
    sine, cosine = x * _polynomial(x * x, _SINE), _polynomial(x * x, _COSINE)
    swap = (quarter & 1).bool()
    first = radius * (torch.where(swap, sine, cosine) * (1 - ((quarter + 1) & 2)))
    second = radius * (torch.where(swap, cosine, sine) * (1 - (quarter & 2)))
    return first, second

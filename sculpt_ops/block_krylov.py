"""Top singular vectors without a full decomposition: a randomized block Krylov space, grown until it suffices.

Source: Musco and Musco, "Randomized block Krylov methods for stronger and faster approximate singular value
decomposition", NeurIPS 2015, arXiv 1504.05477. The energy still missing is told as in Yu, Gu and Li, SIAM J. Matrix
Anal. Appl. 39 (2018), arXiv 1606.09402: ||A||² - ||A Q||², both summed in float64.

Why not power iterations: the spectra of weight matrices are flat. On the feed-forward matrices of SmolLM2-135M rsvd by
default (two iterations, 16 columns of oversampling) holds 0.92 to 0.98 of the optimal energy, and 0.998 takes eight
iterations of width 1.5 k, 27 products of width k. Blocks of k / 4 hold 0.9999 in a space of 4 to 8 k columns, two
products each, of which nothing is thrown away.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linalg import smallest_rank

__all__ = ["KrylovSpace", "find_rank", "find_share"]

# The search ends when the space has grown by 1/5, or to at least twice the rank, and the energy of the top k by less
# than this share. Gains shrink faster than geometrically: on all spectra tried (flat Gaussian, feed-forward, attention,
# steps, low rank) at least 0.9999 of the optimum was held by then.
_GAIN = 5e-4
_GROWTH = 1.2
# From a start, blocks are small, since little is missing, and eight of them come first: whatever has moved into the top
# space needs that depth to show (at depth 2 a loss of 1.5 % went unseen), and 1e-4 of gain may stand for 7e-4 missing.
# What has not settled when the space is twice as wide will not do so cheaply.
_WARM_BLOCK, _WARM_DEPTH, _WARM_GAIN, _WARM_WIDEST = 16, 8, 1e-4, 2
# Wider than this share of the smaller side the Gram matrix and all its eigenvectors are cheaper.
_WIDEST = 0.75
_PRODUCT = torch.ops.sculpt._product.default


class KrylovSpace:
    """An orthonormal basis Q of span{X, G X, G² X, ...} with H = Qᵀ G Q, where G is the Gram matrix of the smaller side
    of `matrix` (m, n) and X the image of `block` random columns, after the images of `start` (n, j) if given.

    Float32 (float64 for a float64 matrix); G is applied as two products and never formed.
    """

    def __init__(self, matrix: Tensor, block: int, seed: int, start: Tensor | None = None) -> None:
        self._matrix, self._block, self._seed = matrix, block, seed
        self._left = matrix.shape[0] < matrix.shape[1]
        size = min(matrix.shape)
        self.limit = int(_WIDEST * size)
        # Seen from the smaller side: the longer one's sketch, and `start` as it is or as its image.
        fresh: Tensor = torch.ops.sculpt.sketch(matrix, block, seed=seed, transpose=not self._left)
        if start is not None:
            start = start.to(fresh.dtype)
            fresh = torch.cat((_PRODUCT(matrix, start) if self._left else start, fresh), dim=1)
        self._fresh = fresh
        self._rows = fresh.new_empty(self.limit, size)
        self._core = fresh.new_zeros(self.limit, self.limit)
        self.width = 0

    def grow(self) -> bool:
        """Take one more block in; False, and nothing is done, where it would pass 3/4 of the smaller side."""
        before, after = self.width, self.width + self._fresh.shape[1]
        if after > self.limit:  # a start may be wider than the side is long
            return False
        block: Tensor = torch.ops.sculpt.orthonormalize(self._fresh)
        basis = self._rows[:before].mT
        # Of a converged block rounding is left, any part of which may lie in the basis.
        for _ in range(2 if before else 0):
            block = torch.ops.sculpt.orthonormalize(block - _PRODUCT(basis, _PRODUCT(basis, block, transpose=True)))
        self._rows[before:after] = block.mT
        self.width, basis = after, self._rows[:after].mT
        image = _PRODUCT(self._matrix, block, transpose=self._left)
        image = _PRODUCT(self._matrix, image, transpose=not self._left)
        coupling = _PRODUCT(basis, image, transpose=True)
        self._core[:after, before:after] = coupling
        rest: Tensor = image - _PRODUCT(basis, coupling)
        if rest.shape[1] > self._block:  # after a start: what it missed, mixed into one block
            rest = torch.ops.sculpt.sketch(rest, self._block, seed=self._seed)
        self._fresh = rest
        return True

    def squares(self) -> Tensor:
        """The Ritz values (width,), descending, float64: lower bounds of the squared singular values."""
        values: Tensor = torch.linalg.eigvalsh(self._core[: self.width, : self.width], UPLO="U")
        return values.flip(0).double().clamp_(min=0)

    def top(self, rank: int) -> tuple[Tensor, Tensor]:
        """The first `rank` Ritz vectors (min(m, n), rank), and their Ritz values (rank,) in float64, descending."""
        values, vectors = torch.linalg.eigh(self._core[: self.width, : self.width], UPLO="U")
        chosen = vectors[:, -rank:].flip(1)
        near: Tensor = _PRODUCT(self._rows[: self.width].mT, chosen)
        return near, values[-rank:].flip(0).double().clamp_(min=0)


def find_rank(matrix: Tensor, rank: int, seed: int, start: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
    """The top `rank` singular vectors of the smaller side and their squared singular values; None where the spectrum
    is so flat that the space would grow past 3/4 of the smaller side, or the start was too far off to be of use.

    start: (n, j) columns that nearly span the top right space.
    """
    if start is None:
        block, look, gain = rank // 4 + 8, 2 * rank, _GAIN
    else:
        block, gain = _WARM_BLOCK, _WARM_GAIN
        look = max(rank, start.shape[1] + _WARM_DEPTH * block)
    space, held = KrylovSpace(matrix, block, seed, start), -1.0
    widest = space.limit if start is None else int(_WARM_WIDEST * look)
    while space.width < widest and space.grow():
        if space.width < look:
            continue
        energy = float(space.squares()[:rank].sum())
        if held >= 0 and energy - held <= gain * energy:
            return space.top(rank)
        look, held = int(_GROWTH * space.width), energy
    return None


def find_share(
    matrix: Tensor, share: float, total: float, widest: int, seed: int, start: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """The smallest number of top singular vectors that hold `share` of `total` = ||matrix||² > 0, settled to 1 %, and
    their squared singular values; None once it is plain that more than `widest` are needed."""
    block = max(_WARM_BLOCK, min(matrix.shape) // 64)
    space = KrylovSpace(matrix, block, seed, start)
    # After fewer blocks nothing has converged.
    look, last = 4 * block + (0 if start is None else start.shape[1]), min(matrix.shape)
    while space.grow():
        if space.width < look:
            continue
        squares = space.squares()
        # No further direction holds more than the last one that has converged.
        sure = space.width // 4
        missing = share * total - float(squares[:sure].sum())
        rank = smallest_rank(squares, share, total) or min(matrix.shape)
        if missing > (widest - sure) * float(squares[sure - 1]) or (rank > widest and space.width >= 2 * widest):
            return None
        if last - rank <= rank // 100 and space.width >= 2 * rank:
            return space.top(rank)
        look, last = int(_GROWTH * space.width), rank
    return None

"""`top_subspace`: the spaces of the top singular vectors, by the method that is cheapest at the matrix's shape.

A protected subspace has to be accurate at its cut and nowhere else, so a full SVD is hardly ever the way. What each
method takes on two CPU cores and on an H200 is in docs/decompositions.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .bases import Method, TopSubspace
from .block_krylov import find_rank, find_share
from .dtensor import is_dtensor
from .linalg import LinAlgError, smallest_rank
from .ops.checks import check_matrix, dtype_name
from .ops.finite import check_finite

__all__ = ["Choice", "choose_method", "top_subspace", "top_subspaces"]

Choice = int | Callable[[Tensor], int]

# Norms of half-precision matrices overflow in their own dtype.
_ARITHMETIC = {torch.bfloat16: torch.float32, torch.float16: torch.float32}

# Up to here a float64 SVD takes as long as the calls around it.
_TINY = 32
# Below this size the eigenvectors of the Gram matrix cost less than the steps of a Krylov space; above it they do where
# more than this share of the directions is wanted: two CPU cores break even at 0.08 (the flattest spectra of
# SmolLM2-135M) to 0.2 (attention). The second share is for a start that nearly holds them.
# On an H200 a Krylov space takes 9 ms a block, launches mostly, so 130 to 240 ms for rank 64 or 128 of any size up to
# 4096 x 11008; all eigenvectors of 4096 take 89 ms, of 1024 11 ms. Larger ones were not measured: by what eigenvectors
# grow with and products cost both would take 0.5 s at 8192 and a share of 0.08.
_KRYLOV_SIZE, _KRYLOV_SIZE_CUDA = 1024, 8192
_KRYLOV_SHARE, _WARM_SHARE = 0.08, 0.25
# Eigenvalues of a Gram matrix are wrong by some 10 eps of the largest. A top space is taken from them where that is at
# most 1e-3 of the k-th, so that only directions whose squares differ by less than that are mixed up: in float32 down
# to sigma_k / sigma_1 = 1/29, in float64 to 1.5e-6. At k / n = 0.5 weight matrices have 1/2 to 1/60.
_RESOLVED = 1e4


def choose_method(m: int, n: int, rank: int, device_type: str, *, columns: int = 0) -> Method:
    """How `top_subspace` begins with an m x n matrix: "rsvd" (block Krylov) for a rank that is a small share of
    min(m, n), "svd" for tiny matrices, otherwise "gram". A spectrum that a method cannot resolve is handed on, to
    float64 and from "gram" in float64 to "svd".

    device_type: on "cuda" eigenvectors cost so little beside the launches of a Krylov space that "rsvd" begins at a
        size of 8192, elsewhere at 1024 (measured in float32). columns: of the `start`.
    """
    size = min(m, n)
    if size <= _TINY:
        return "svd"
    share = _WARM_SHARE if columns >= rank else _KRYLOV_SHARE
    least = _KRYLOV_SIZE_CUDA if device_type == "cuda" else _KRYLOV_SIZE
    return "rsvd" if size >= least and rank <= share * size else "gram"


def top_subspace(
    matrix: Tensor,
    rank: int | None = None,
    *,
    energy: float | None = None,
    start: Tensor | None = None,
    seed: int = 0,
) -> TopSubspace:
    """The spaces of the top singular vectors of `matrix`: protected and free bases of both sides, singular values, the
    energy held.

    Args:
        matrix: (m, n), float32, float64, bfloat16 or float16, any strides. Not differentiable.
        rank: from 1 to min(m, n). Or
        energy: in (0, 1]: the smallest rank whose squared singular values hold this share of their sum (0 for a matrix
            of zeros). A Krylov space finds it without the whole spectrum where it is small, at most 1 % too large,
            and tells early where it is not.
        start: (n, j), float32, or float64 with a float64 matrix: a basis of nearly the right space, such as `right` of
            the matrix as it was a task ago. Used where "rsvd" is.
        seed: of the random columns of "rsvd". Same seed, same device, same number of threads: the same bits.

    A DTensor (Replicate and Shard in any combination) takes "gram" in float64 at every rank, and no `start`; the bases
    are DTensors, those of the longer side split along it. All ranks of the mesh call together.

    The method is that of `choose_method`. "gram" finds the space of the exact decomposition as far as float32 (float64
    for a float64 matrix) and the gap at the cut permit. "rsvd" ends when the energy found stands still: at least 0.999
    of the optimum, with a start too, and 0.9999 without one, on every spectrum tried.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what was wanted.
        torch.linalg.LinAlgError: the matrix holds NaN or Inf.
    """
    _check_arguments(matrix, rank, energy, start)
    share = None if energy is None else float(energy)
    rank = None if rank is None else int(rank)
    if is_dtensor(matrix):
        from .distributed.top_subspace import top_subspace_sharded

        return top_subspace_sharded(matrix, rank, share)
    return top_subspaces([matrix], rank, energy=share, starts=[start], seed=seed)[0]


@torch.no_grad()
def top_subspaces(
    matrices: Sequence[Tensor],
    ranks: Choice | Sequence[Choice] | None = None,
    *,
    energy: float | None = None,
    starts: Sequence[Tensor | None] | None = None,
    seed: int = 0,
) -> list[TopSubspace]:
    """`top_subspace` of matrices of one shape, dtype and device, their eigendecompositions side by side.

    ranks: one for all or one for each: a number from 0 to min(m, n), or a function from all squared singular values
        ((min(m, n),), descending, float64) to that number, clamped, such as the `choose` of a rank policy.

    Needs about four times min(m, n)² numbers a matrix, in float32 (float64 for a float64 matrix or a function). Raises
    torch.linalg.LinAlgError for NaN or Inf; all else is taken as given.
    """
    each = list(ranks) if isinstance(ranks, Sequence) else [ranks] * len(matrices)
    starts = starts or [None] * len(matrices)
    tasks = [
        _Task(*_scaled(matrix.detach()), energy if rank is None else rank, start)
        for matrix, rank, start in zip(matrices, each, starts, strict=True)
    ]
    results = [_without_gram(task, seed) for task in tasks]
    for double in (False, True):
        left = [i for i, task in enumerate(tasks) if results[i] is None and (double or not task.wide)]
        for i, result in zip(left, _from_grams([tasks[i] for i in left], double), strict=True):
            results[i] = result
    return [result or _from_svd(task) for task, result in zip(tasks, results, strict=True)]


class _Task(NamedTuple):
    """A finite matrix (m, n) times a power of two, and what is wanted of it: a rank, a share of the energy, or the rank
    that a function makes of the squared singular values."""

    matrix: Tensor
    scale: float
    wanted: Choice | float | None
    start: Tensor | None

    @property
    def size(self) -> int:
        return min(self.matrix.shape)

    @property
    def wide(self) -> bool:
        """Whether float32 is not tried: a function sees the whole spectrum, so it gets all of its digits."""
        return self.matrix.dtype is torch.float64 or callable(self.wanted)

    def rank(self, squares: Tensor, total: float) -> int:
        if callable(self.wanted):
            wanted = self.wanted(squares)
            if isinstance(wanted, bool) or not isinstance(wanted, int | np.integer):
                raise TypeError(f"protect: the policy's choose has returned {wanted!r}, wanted an int")
            return min(max(int(wanted), 0), len(squares))
        if isinstance(self.wanted, int):
            return self.wanted
        assert self.wanted is not None
        return (smallest_rank(squares, self.wanted, total) or len(squares)) if total > 0 else 0

    def result(self, method: Method, near: Tensor, held: Tensor, total: float, **found: Tensor) -> TopSubspace:
        energy = min(float(held.sum()) / total, 1.0) if total > 0 else 1.0
        return TopSubspace(near.shape[1], energy, method, self.matrix, self.scale, near, **found)


def _scaled(matrix: Tensor) -> tuple[Tensor, float]:
    """The matrix and 1.0, or where its squares could leave the range of the arithmetic a multiple near 1."""
    # Of 1024 x 4096 the norm takes 0.5 ms and the extremes 2; it shows that almost every matrix is in range.
    if 2.0**-20 <= float(torch.linalg.vector_norm(matrix, dtype=_ARITHMETIC.get(matrix.dtype))) < 2.0**40:
        return matrix, 1.0
    low, high = (float(extreme) for extreme in matrix.aminmax())
    return _scale_by(matrix, max(-low, high))


def _scale_by(matrix: Tensor, peak: float) -> tuple[Tensor, float]:
    """The same, given the largest magnitude in it."""
    if not math.isfinite(peak):
        raise LinAlgError("top_subspace: matrix: given NaN or Inf, wanted finite numbers")
    exponent = max(math.frexp(peak)[1], -1000)
    if peak == 0 or abs(exponent) < (400 if matrix.dtype is torch.float64 else 40):
        return matrix, 1.0
    # In two steps: 2^149, which the smallest float32 takes, is none itself.
    half = -exponent // 2
    return matrix * 2.0**half * 2.0 ** (-exponent - half), 2.0**-exponent


def _without_gram(task: _Task, seed: int) -> TopSubspace | None:
    """What takes no Gram matrix: nothing wanted, a tiny matrix, the top of a large one; for anything else None."""
    matrix, wanted = task.matrix, task.wanted
    if wanted == 0:
        none = matrix.new_empty(task.size, 0, dtype=torch.promote_types(matrix.dtype, torch.float32))
        return TopSubspace(0, 0.0, "gram", matrix, task.scale, none)
    # A share of the energy may turn out to need few directions; a function needs the whole spectrum.
    rank = task.size if callable(wanted) else wanted if isinstance(wanted, int) else 1
    columns = 0 if task.start is None else task.start.shape[1]
    m, n = matrix.shape
    method = choose_method(m, n, rank, matrix.device.type, columns=columns)
    if method == "svd":
        return _from_svd(task)
    if method == "gram":
        return None
    result = _from_krylov(task, matrix, seed)
    if result is None and task.start is not None:
        return _without_gram(task._replace(start=None), seed)
    return result


def _from_krylov(task: _Task, matrix: Tensor, seed: int) -> TopSubspace | None:
    """None where too many directions are wanted for it, or the spectrum is too flat."""
    wanted, total = task.wanted, _squared_norm(matrix)
    found: tuple[Tensor, Tensor] | None = None
    if isinstance(wanted, int):
        found = find_rank(matrix, wanted, seed, task.start)
    elif isinstance(wanted, float) and total > 0:
        found = find_share(matrix, wanted, total, int(_KRYLOV_SHARE * task.size), seed, task.start)
    if found is None:
        return None
    near, squares = found
    if matrix.dtype is not torch.float64 and not _resolved(squares, len(squares), near.dtype):
        return _from_krylov(task, matrix.double(), seed)
    return task.result("rsvd", near, squares, total)


def _from_grams(tasks: Sequence[_Task], double: bool) -> list[TopSubspace | None]:
    """None where the k-th singular value is lost in the rounding of the Gram matrix."""
    if not tasks:
        return []
    size, dtype = tasks[0].size, torch.float64 if double else torch.float32
    grams = torch.empty(len(tasks), size, size, dtype=dtype, device=tasks[0].matrix.device)
    for gram, task in zip(grams, tasks, strict=True):
        m, n = task.matrix.shape
        gram.copy_(torch.ops.sculpt._gram(task.matrix, transpose=m < n, double=double))
    values, vectors = torch.ops.sculpt._eigh(grams)
    results: list[TopSubspace | None] = []
    for task, ascending, vector in zip(tasks, values, vectors, strict=True):
        squares = ascending.flip(0).double().clamp_(min=0)
        total = float(squares.sum())
        rank = task.rank(squares, total)
        # Below what float64 resolves a float32 matrix holds nothing but its own rounding.
        settled = double and task.matrix.dtype is not torch.float64
        if settled or _resolved(squares, rank, dtype):
            near, rest = vector[:, size - rank :].flip(1), vector[:, : size - rank]
            results.append(task.result("gram", near, squares[:rank], total, rest=rest))
        else:
            results.append(None)
    return results


def _from_svd(task: _Task) -> TopSubspace:
    left, values, right = torch.linalg.svd(task.matrix.double(), full_matrices=False)
    squares = values.square()
    total = float(squares.sum())
    rank = task.rank(squares, total)
    m, n = task.matrix.shape
    near, far = (left, right.mT) if m < n else (right.mT, left)
    return task.result(
        "svd", near[:, :rank], squares[:rank], total, rest=near[:, rank:], far=far[:, :rank], values=values[:rank]
    )


def _resolved(squares: Tensor, rank: int, dtype: torch.dtype) -> bool:
    """Whether the rank-th of these eigenvalues of a Gram matrix, descending, is more than rounding."""
    return rank == 0 or float(squares[rank - 1]) >= _RESOLVED * torch.finfo(dtype).eps * float(squares[0])


def _squared_norm(matrix: Tensor) -> float:
    """||matrix||² to 1e-6. torch.linalg.vector_norm of 4096 x 4096 at once sums in float32 and is 1e-3 off."""
    rows = matrix if matrix.stride(1) == 1 else matrix.mT
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    return sum(float(part.to(dtype).norm(dim=1).double().square().sum()) for part in rows.split(256))


def _check_arguments(matrix: Tensor, rank: int | None, energy: float | None, start: Tensor | None) -> None:
    op = "top_subspace"
    check_matrix(op, "matrix", matrix)
    shape = tuple(matrix.shape)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{op}: matrix: given shape {shape}, wanted (m, n) with m, n >= 1")
    if (rank is None) == (energy is None):
        raise ValueError(f"{op}: rank, energy: given {'neither' if rank is None else 'both'}, wanted one of them")
    if rank is not None:
        if isinstance(rank, bool) or not isinstance(rank, int | np.integer):
            raise TypeError(f"{op}: rank: given {rank!r}, wanted an int")
        if not 1 <= rank <= min(shape):
            raise ValueError(f"{op}: rank: given {rank}, wanted 1 to {min(shape)} for a matrix of shape {shape}")
    if energy is not None:
        if isinstance(energy, bool) or not isinstance(energy, int | float | np.number):
            raise TypeError(f"{op}: energy: given {energy!r}, wanted a number")
        if not 0 < energy <= 1:
            raise ValueError(f"{op}: energy: given {energy}, wanted more than 0 and at most 1")
    if start is None:
        return
    if is_dtensor(matrix):
        raise ValueError(f"{op}: start: given with a DTensor, wanted None: its Gram matrix is decomposed, from nothing")
    if start.dim() != 2 or start.shape[0] != shape[1] or start.shape[1] > shape[1]:
        raise ValueError(
            f"{op}: start: given shape {tuple(start.shape)}, wanted ({shape[1]}, j) for a matrix of shape {shape}"
        )
    wanted = torch.promote_types(matrix.dtype, torch.float32)
    if start.dtype is not wanted:
        raise TypeError(f"{op}: start: given dtype {dtype_name(start.dtype)}, wanted {dtype_name(wanted)}")
    if start.device != matrix.device:
        raise ValueError(f"{op}: start: given device {start.device}, wanted the matrix's, {matrix.device}")
    check_finite(op, "start", start)

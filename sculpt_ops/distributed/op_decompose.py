"""``sketch``, ``test_matrix``, ``rsvd`` and the products they are made of on DTensors.

Each rank multiplies its own part of the matrix, and only thin factors are summed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate

from .op_collectives import agreed, reduced
from .op_exchange import redistribute, whole
from .op_layout import LEFT, RIGHT, Axes, Layout, Span, common_mesh, local_of, wrap
from .op_orthonormalize import Rows, orthonormal, well_conditioned

__all__ = ["eigh", "gram", "product", "rsvd", "sketch", "test_matrix"]

_SKETCH = torch.ops.sculpt.sketch.default
_TEST_MATRIX = torch.ops.sculpt.test_matrix.default
_PRODUCT = torch.ops.sculpt._product.default
_GRAM = torch.ops.sculpt._gram.default
_EIGH = torch.ops.sculpt._eigh.default


def test_matrix(input: Tensor, q: int, *, transpose: bool = False, row: int = 0, **keywords: int) -> Tensor:
    """Its rows are split as those of `input` that it multiplies."""
    layout = _unbatched("test_matrix", input)
    span, axes = (layout.rows, LEFT) if transpose else (layout.columns, RIGHT)
    omega = _TEST_MATRIX(local_of(input), q, transpose=transpose, row=row + span.start, **keywords)
    return wrap(omega, layout.mesh, layout.placed(axes, input.ndim), (*input.shape[:-2], span.size, q))


def sketch(input: Tensor, q: int, *, transpose: bool = False, row: int = 0, **keywords: int) -> Tensor:
    """Split as the rows of `input` (with `transpose` its columns) are, else whole."""
    layout = _unbatched("sketch", input)
    summed, kept, axes = _contraction(layout, transpose)
    out = _SKETCH(local_of(input), q, transpose=transpose, row=row + summed.start, **keywords)
    out = reduced("sketch", layout.mesh, summed.dims, out)
    return wrap(out, layout.mesh, layout.placed(axes, input.ndim), (*input.shape[:-2], kept.size, q))


def product(input: Tensor, factor: Tensor, *, transpose: bool = False) -> Tensor:
    mesh = common_mesh("_product", {"input": input, "factor": factor})
    assert isinstance(input, DTensor)
    layout = Layout.of("_product", "input", input)
    summed, kept, axes = _contraction(layout, transpose)
    part = layout.part(factor, RIGHT if axes is LEFT else LEFT)
    out = reduced("_product", mesh, summed.dims, _PRODUCT(local_of(input), part, transpose=transpose))
    return wrap(out, mesh, layout.placed(axes, input.ndim), (*input.shape[:-2], kept.size, factor.shape[-1]))


def gram(input: Tensor, *, transpose: bool = False, double: bool = False) -> Tensor:
    """The same on every rank that holds the same batch entries."""
    common_mesh("_gram", {"input": input})
    assert isinstance(input, DTensor)
    input = whole("_gram", input, -2, -1) if transpose else whole("_gram", input, -1, -2)
    layout = Layout.of("_gram", "input", input)
    span = layout.columns if transpose else layout.rows
    out = reduced("_gram", layout.mesh, span.dims, _GRAM(local_of(input), transpose=transpose, double=double))
    size = out.shape[-1]
    return wrap(out, layout.mesh, layout.placed((None, None), input.ndim), (*input.shape[:-2], size, size))


def eigh(input: Tensor) -> tuple[Tensor, Tensor]:
    mesh = common_mesh("_eigh", {"input": input})
    assert isinstance(input, DTensor)
    everywhere: list[Placement] = [Replicate()] * mesh.ndim
    found = _EIGH(local_of(input.redistribute(placements=everywhere)))
    values, vectors = (wrap(tensor, mesh, everywhere, tensor.shape) for tensor in agreed("_eigh", mesh, *found))
    return values, vectors


def rsvd(
    input: Tensor, rank: int, start: Tensor | None = None, *, oversample: int = 16, n_iter: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """U split as the rows, V as the columns, S whole; the steps of csrc/linalg/rsvd.cpp."""
    mesh = common_mesh("rsvd", {"input": input, "start": start})
    assert isinstance(input, DTensor)
    m, n = input.shape[-2:]
    flip, q = m < n, min(rank + oversample, m, n)
    given = _unbatched("rsvd", input)
    if q == min(m, n):  # the matrix is its own sketch: only its long side may be split
        input = whole("rsvd", input, -2, -1) if flip else whole("rsvd", input, -1, -2)
    layout, local = _unbatched("rsvd", input), local_of(input)
    rows, columns = Rows("rsvd", mesh, layout.rows), Rows("rsvd", mesh, layout.columns)
    # From here on the matrix X is tall: input, or its transpose.
    tall, wide = (columns, rows) if flip else (rows, columns)

    def image_of(factor: Tensor) -> Tensor:
        return wide.sum(_PRODUCT(local, factor, transpose=flip))

    def preimage_of(factor: Tensor) -> Tensor:
        return tall.sum(_PRODUCT(local, factor, transpose=not flip))

    basis: Tensor | None = None
    if q < min(m, n):
        kept: list[Tensor] = []
        if start is not None:
            first = layout.part(start, RIGHT)[..., :q]
            kept = [preimage_of(first) if flip else first]  # the start lives on the long side
        held = kept[0].shape[-1] if kept else 0
        omega = _TEST_MATRIX(local, q - held, seed=seed, transpose=flip, row=wide.span.start, column=held)
        basis = image_of(torch.cat([*kept, omega], dim=-1))
        for _ in range(n_iter):
            basis = image_of(well_conditioned(preimage_of(well_conditioned(basis, tall)), wide))
        basis = orthonormal(basis, tall)
    image, along = (local.mT if flip else local, tall) if basis is None else (preimage_of(basis), wide)
    p = orthonormal(image, along)
    # The small triangular factor, not the image, is decomposed: its singular values keep their digits.
    small = along.sum(_PRODUCT(image, p, transpose=True)).mT
    a, s, bt = agreed("rsvd", mesh, *torch.linalg.svd(small, full_matrices=False))
    a, b = a[..., :rank], bt.mT[..., :rank]
    near = p @ a
    on_tall, on_wide = (near, b) if basis is None else (basis @ b, near)
    u, v = (on_wide, on_tall) if flip else (on_tall, on_wide)
    sign = _signs(u, rows)
    factors = []
    for factor, axes, length in ((u, LEFT, m), (v, RIGHT, n)):
        shape = (*input.shape[:-2], length, rank)
        placed = wrap((factor * sign).contiguous(), mesh, layout.placed(axes, input.ndim), shape)
        factors.append(redistribute("rsvd", placed, given.placed(axes, input.ndim)))
    values = s[..., :rank].contiguous()
    return factors[0], wrap(values, mesh, [Replicate()] * mesh.ndim, values.shape), factors[1]


def _signs(u: Tensor, rows: Rows) -> Tensor:
    """(..., 1, rank): those of the entries of largest magnitude of the columns."""
    padded = torch.nn.functional.pad(u, (0, 0, 0, 1))  # an empty shard has no largest entry
    extremes = torch.stack((padded.amax(dim=-2, keepdim=True), (-padded).amax(dim=-2, keepdim=True)))
    highest, lowest = rows.largest(extremes)
    return torch.where(highest >= lowest, 1.0, -1.0).to(u.dtype)


def _contraction(layout: Layout, transpose: bool) -> tuple[Span, Span, Axes]:
    """The dimension that a product sums over, the one that it keeps, and how the result runs along the latter."""
    rows, columns = layout.rows, layout.columns
    return (rows, columns, RIGHT) if transpose else (columns, rows, LEFT)


def _unbatched(op: str, input: Tensor) -> Layout:
    """The test matrix of a batch entry depends on its place in the batch."""
    assert isinstance(input, DTensor)
    layout = Layout.of(op, "input", input)
    if layout.batch_dims:
        raise ValueError(
            f"{op}: input: given placements {input.placements} of shape {tuple(input.shape)}, wanted batch dimensions "
            "whole on every rank"
        )
    return layout

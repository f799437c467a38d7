"""The protected subspace of one weight matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .bases import TopSubspace
from .basis import Basis
from .buckets import in_buckets
from .dtensor import is_dtensor
from .linalg import complement, orthonormal
from .ops import foreach_project_, project
from .ops.heuristics import gpu_of
from .ops.split_products import can_split, product_in_parts, project_to_float32, splitting_pays
from .remember import Remembered, Side, join

__all__ = ["LayerSubspace", "Sides", "check_sides", "from_coordinates_each", "project_each_"]

Sides = Literal["both", "left", "right", "block"]

# By the data sheets bfloat16 has some 15 times the rate of float32 and more on these; on an RTX 4090 (8.9) twice.
_FAST_BFLOAT16 = (80, 90, 100, 103)

# Of bases that exist for one grouped call only: 16-bit ones in float32, protected ones out of reflectors.
_MADE_BYTES = 64 * 2**20

_PRODUCT = torch.ops.sculpt._product.default


def check_sides(sides: str) -> Sides:
    """`sides` if it is one of "both", "left", "right", "block"; otherwise a ValueError."""
    if sides not in get_args(Sides):
        raise ValueError(f"sides must be one of {', '.join(get_args(Sides))}; got {sides!r}")
    return cast(Sides, sides)


@dataclass(frozen=True, eq=False, repr=False)
class LayerSubspace:
    """What is protected in one parameter of `shape` (m, n), and the free space that is left.

    rank: number of the weight's own singular directions that are protected, whatever is stored. With what is
        remembered of earlier tasks the protected spaces are larger, see `protected_dims`.
    energy: share of the squared singular values that they hold.
    left_basis, right_basis: what is stored of R^m and R^n; None on a side that is not protected.
    block: only the product of the two protected spaces is protected, P_left W P_right.
    owner: of a sharded parameter the rank, of those it is sharded over, that has the bases. On the others they are on
        the meta device. None where nothing is sharded.
    """

    shape: tuple[int, int]
    rank: int
    energy: float
    left_basis: Basis | None = None
    right_basis: Basis | None = None
    block: bool = False
    owner: int | None = None

    @classmethod
    def from_top_subspace(
        cls,
        top: TopSubspace,
        sides: Sides,
        basis_dtype: torch.dtype | None = None,
        remembered: Remembered | None = None,
        shared: dict[int, Basis] | None = None,
    ) -> LayerSubspace:
        """Protect the directions of `top`, joined with what is `remembered` of the sides that are protected.

        Where the free space is the narrower one its basis is stored, except for sides="block". shared: the bases of
        remembered spans alone, by the span's `id`; layers that remember the same one, and have `top.rank` 0, share it.
        """
        left = right = None
        if sides != "right":
            left = _side(top, "left", sides == "block", basis_dtype, remembered, shared)
        if sides != "left":
            right = _side(top, "right", sides == "block", basis_dtype, remembered, shared)
        m, n = top.matrix.shape
        return cls((m, n), top.rank, top.energy, left, right, sides == "block")

    @property
    def left(self) -> Tensor | None:
        """(m, r), columns orthonormal to 3e-7 (stored in bfloat16 to 5e-7, to 2e-6 where m < 256), float32 (float64 for
        a float64 parameter): of the protected space, with `keep_left` of the free one. Made anew at each access unless
        stored so."""
        return None if self.left_basis is None else self.left_basis.span()

    @property
    def right(self) -> Tensor | None:
        """(n, s), the same of the right side."""
        return None if self.right_basis is None else self.right_basis.span()

    @property
    def keep_left(self) -> bool:
        """Whether `left` spans the free space."""
        return self.left_basis is not None and self.left_basis.keep

    @property
    def keep_right(self) -> bool:
        """Whether `right` spans the free space."""
        return self.right_basis is not None and self.right_basis.keep

    @property
    def is_here(self) -> bool:
        """Whether the bases are on this rank."""
        return not any(b.columns.is_meta for b in (self.left_basis, self.right_basis) if b is not None)

    @property
    def protected_dims(self) -> tuple[int, int]:
        """Dimensions of the left and the right protected space, 0 on a side without a basis."""
        left, right = (0 if b is None else b.length - b.free for b in (self.left_basis, self.right_basis))
        return left, right

    @property
    def protects(self) -> bool:
        """Whether anything is protected: directions of the weight, or remembered ones."""
        return self.rank > 0 or any(self.protected_dims)

    @property
    def free_shape(self) -> tuple[int, int]:
        """Shape of the coordinates: the dimensions of the free spaces, of a side without a basis its length."""
        m, n = self.shape
        left, right = self.left_basis, self.right_basis
        return (m if left is None else left.free, n if right is None else right.free)

    def to_coordinates(self, matrix: Tensor) -> Tensor:
        """L_freeᵀ matrix R_free of `matrix` (m, n), in float32 (float64 for float64): (m - k, n - k) for both sides.

        On a GPU those of a bfloat16 matrix, with reflectors stored, are good to 2e-5 of it, and those of a float32 one
        with bases of large ranks.
        With `from_coordinates` an isometry of the free part of `matrix`. Not for a block.
        """
        assert not self.block
        out = matrix
        # The bases that make the matrix smaller come first.
        if self.keep_left and self.left_basis is not None:
            basis = self.left_basis.matrix()
            parts = _in_parts(out, basis.shape[1])
            out = product_in_parts(basis.mT, out.mT) if parts else _PRODUCT(out, basis, transpose=True).mT
        if self.keep_right and self.right_basis is not None:
            basis = self.right_basis.matrix()
            out = product_in_parts(out, basis.mT) if _in_parts(out, basis.shape[1]) else _PRODUCT(out, basis)
        left, right = _reflector(self.left_basis), _reflector(self.right_basis)
        if left is not None or right is not None:
            above, before = (0 if reflector is None else reflector.shape[1] for reflector in (left, right))
            # In float32: half precision would round what the reflector has mixed, 2^-9 of it.
            if _in_parts(out, above + before) or (_has_tensor_cores(out) and can_split(out, left, right)):
                out = project_to_float32(out, left, right, above, before)
            else:
                out = project(out.to(torch.promote_types(out.dtype, torch.float32)), left, right)[above:, before:]
        return out.to(torch.promote_types(out.dtype, torch.float32)).contiguous()

    def from_coordinates(self, coordinates: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """L_free coordinates R_freeᵀ (m, n) of `coordinates` of `free_shape`, in their dtype; in another, as `project_`
        then computes, only where no free basis is stored."""
        return from_coordinates_each([(coordinates, self, dtype)])[0]

    def protected_left(self, matrix: Tensor) -> Tensor:
        """P_left @ matrix (m, c), in the dtype of `matrix`. Needs a left basis."""
        assert self.left_basis is not None
        return self.left_basis.protected(matrix)

    def protected_right(self, matrix: Tensor) -> Tensor:
        """P_right @ matrix (n, c), in the dtype of `matrix`. Needs a right basis."""
        assert self.right_basis is not None
        return self.right_basis.protected(matrix)

    def with_reflectors(self) -> LayerSubspace:
        """The same subspace in the form that `to_coordinates` needs, where it is another."""
        return self.with_bases(Basis.reflector)

    def in_full(self) -> LayerSubspace:
        """The same subspace with 16-bit bases made float32, for several uses in a row."""
        return self.with_bases(Basis.in_full)

    def to(self, device: torch.device | str) -> LayerSubspace:
        """The same subspace with its bases on `device`."""
        return self.with_bases(lambda basis: basis.to(device))

    def with_bases(self, change: Callable[[Basis], Basis]) -> LayerSubspace:
        """The same subspace with the bases that `change` makes of its own."""
        left, right = (None if b is None else change(b) for b in (self.left_basis, self.right_basis))
        return replace(self, left_basis=left, right_basis=right)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored bases."""
        return sum(basis.nbytes for basis in (self.left_basis, self.right_basis) if basis is not None)

    def tensors(self) -> Iterator[Tensor]:
        """What is stored."""
        for basis in (self.left_basis, self.right_basis):
            if basis is not None:
                yield from basis.tensors()

    def __repr__(self) -> str:
        sides = [
            f"{side}={basis!r}"
            for side, basis in (("left", self.left_basis), ("right", self.right_basis))
            if basis is not None
        ]
        block = ", block" if self.block else ""
        return f"LayerSubspace({self.shape}, rank={self.rank}, energy={self.energy:.3f}, {', '.join(sides)}{block})"


def _side(
    top: TopSubspace,
    side: Side,
    block: bool,
    dtype: torch.dtype | None,
    remembered: Remembered | None,
    shared: dict[int, Basis] | None,
) -> Basis:
    spans = [] if remembered is None else remembered.spans(side)
    length = top.matrix.shape[0 if side == "left" else 1]
    if not any(span.shape[1] for span in spans):
        keep = not block and length - top.rank < top.rank
        return Basis.store(getattr(top, f"free_{side}" if keep else side), "free" if keep else "protected", dtype)
    key = id(spans[0]) if top.rank == 0 and len(spans) == 1 else None
    if key is not None and shared is not None and key in shared:
        return shared[key]
    own: Tensor = getattr(top, side)
    joined = join([own, *spans])
    keep = length - joined.shape[1] < joined.shape[1]
    columns = complement(joined).to(own.dtype) if keep else orthonormal(joined.to(own.dtype))
    basis = Basis.store(columns, "free" if keep else "protected", dtype)
    if key is not None and shared is not None:
        shared[key] = basis
    return basis


def _reflector(basis: Basis | None) -> Tensor | None:
    if basis is None or basis.keep:
        return None
    assert basis.form == "reflector"
    return basis.matrix()


def _has_tensor_cores(matrix: Tensor) -> bool:
    """Whether three products of bfloat16 are faster than one of float32; not while tracing, for which there are the ops
    alone."""
    if not matrix.is_cuda or torch.compiler.is_compiling() or is_dtensor(matrix) or isinstance(matrix, FakeTensor):
        return False
    gpu = gpu_of(matrix.device.index)
    return not gpu.hip and gpu.capability in _FAST_BFLOAT16


def _in_parts(matrix: Tensor, rank: int) -> bool:
    """Whether products of a float32 matrix with bases of so many columns together are made of bfloat16 parts. Asked by
    their number: bases stored in another form are not made for the question."""
    return _has_tensor_cores(matrix) and splitting_pays(matrix, rank)


def project_each_(pairs: Iterable[tuple[Tensor, LayerSubspace]], in_parts: bool = False) -> None:
    """Project every matrix in place onto the free space of its layer, in one grouped call a device and dtype; in
    several where bases have to be made for it. in_parts: float32 matrices may go in bfloat16 parts, see
    `splitting_pays`, to 2^-17 of each."""
    groups: dict[tuple[torch.device, torch.dtype, bool], list[tuple[Tensor, LayerSubspace]]] = {}
    for matrix, layer in pairs:
        removes = not (layer.block or layer.keep_left or layer.keep_right)
        if in_parts and removes and _in_parts(matrix, sum(layer.protected_dims)):
            left, right = _given(layer.left_basis, False), _given(layer.right_basis, False)
            matrix.copy_(project_to_float32(matrix, left, right))
            continue
        groups.setdefault((matrix.device, matrix.dtype, layer.block), []).append((matrix, layer))
    for (_, _, block), group in groups.items():
        for part in in_buckets(group, _made_bytes, _MADE_BYTES):
            layers = [layer for _, layer in part]
            foreach_project_(
                [matrix for matrix, _ in part],
                [_given(layer.left_basis, block) for layer in layers],
                [_given(layer.right_basis, block) for layer in layers],
                keep_lefts=[] if block else [layer.keep_left for layer in layers],
                keep_rights=[] if block else [layer.keep_right for layer in layers],
                block=block,
            )


def from_coordinates_each(entries: Sequence[tuple[Tensor, LayerSubspace, torch.dtype | None]]) -> list[Tensor]:
    """`LayerSubspace.from_coordinates` of each, with a layer and a dtype: the reflections in one grouped call, which on
    a GPU is a few launches where it would be as many calls."""
    matrices: list[Tensor] = []
    reflected: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
    for coordinates, layer, dtype in entries:
        assert not layer.block
        assert dtype is None or not (layer.keep_left or layer.keep_right)
        left, right = _reflector(layer.left_basis), _reflector(layer.right_basis)
        matrix = coordinates
        if left is not None or right is not None:
            above, before = (0 if reflector is None else reflector.shape[1] for reflector in (left, right))
            m, n = coordinates.shape
            matrix = coordinates.new_zeros(m + above, n + before, dtype=dtype)
            matrix[above:, before:] = coordinates
            if _in_parts(matrix, above + before):
                matrix = project_to_float32(matrix, left, right)
            else:
                reflected.append((matrix, left, right))
        matrices.append(matrix)
    if reflected:
        grads, lefts, rights = zip(*reflected, strict=True)
        foreach_project_(grads, lefts, rights)
    for i, (_, layer, _) in enumerate(entries):
        if layer.keep_right and layer.right_basis is not None:
            basis = layer.right_basis.matrix()
            parts = _in_parts(matrices[i], basis.shape[1])
            matrices[i] = product_in_parts(matrices[i], basis) if parts else matrices[i] @ basis.mT
        if layer.keep_left and layer.left_basis is not None:
            basis = layer.left_basis.matrix()
            parts = _in_parts(matrices[i], basis.shape[1])
            matrices[i] = product_in_parts(basis, matrices[i].mT) if parts else basis @ matrices[i]
    return matrices


def _given(basis: Basis | None, block: bool) -> Tensor | None:
    """What a call takes; None of a side of which nothing is protected, which would be two products for nothing."""
    return None if basis is None or not (block or basis.keep or basis.columns.shape[1]) else basis.span()


def _made_bytes(pair: tuple[Tensor, LayerSubspace]) -> int:
    """Of bases that are not stored as the call takes them."""
    _, layer = pair
    bases = (basis for basis in (layer.left_basis, layer.right_basis) if basis is not None and not basis.is_span)
    return sum(4 * basis.columns.numel() for basis in bases)

"""``foreach_project_`` on a GPU: what suits the grouped Triton kernels in at most four launches, the rest one by one.

A list of the same shapes, ranks and flags is checked and planned once, its addresses each time they move: at 224
matrices the checks alone take longer than the launches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..triton_kernels.tables import held
from .checks import check_foreach, check_foreach_apart, check_written
from .heuristics import Backend, choose, forced_backend, gpu_of, triton_missing
from .library_products import Room, project_cublas
from .variants import backend_of, project_into

__all__ = ["Call", "check_apart_quickly", "foreach_into", "plan_call"]

OP = "foreach_project_"


class Call(NamedTuple):
    """groups: of the grouped kernels. single: positions that they do not take, and what takes them. lengths: bytes that
    each grad, then each basis, spans."""

    groups: tuple[Any, ...]
    single: tuple[tuple[int, Backend], ...]
    lengths: np.ndarray[Any, Any]


def _length(tensor: Tensor) -> int:
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def plan_call(
    grads: Sequence[Tensor],
    lefts: Sequence[Tensor | None],
    rights: Sequence[Tensor | None],
    keep_lefts: Sequence[bool],
    keep_rights: Sequence[bool],
    block: bool,
    forced: Backend | None,
) -> Call:
    """Checks all of the lists but their addresses, and sorts them into groups and single matrices."""
    check_foreach(OP, grads, lefts, rights, keep_lefts, keep_rights, block)
    for i, grad in enumerate(grads):
        check_written(OP, f"grads[{i}]", grad)

    def one_by_one(positions: Iterable[int]) -> tuple[tuple[int, Backend], ...]:
        """Without those that have nothing to do. What is chosen is found once: it takes as long as two launches."""
        return tuple(
            (i, forced or backend_of(grads[i], lefts[i], rights[i]))
            for i in positions
            if grads[i].numel() and not (lefts[i] is None and rights[i] is None)
        )

    everything = range(len(grads))
    lengths = np.array(
        [_length(tensor) for tensors in (grads, lefts, rights) for tensor in tensors if tensor is not None]
    )
    if forced not in (None, "triton") or triton_missing():
        return Call((), one_by_one(everything), lengths)
    from ..triton_kernels.grouped_launch import Member, prepare, why_not_group

    alike: defaultdict[Any, list[tuple[int, Member]]] = defaultdict(list)
    for i, (grad, left, right) in enumerate(zip(grads, lefts, rights, strict=True)):
        keep_left = bool(keep_lefts) and keep_lefts[i]
        keep_right = bool(keep_rights) and keep_rights[i]
        member = Member(grad, left, right, keep_left, keep_right, block)
        if why_not_group(member) is None:
            alike[grad.device, grad.dtype, member.basis_dtype()].append((i, member))
    groups, grouped = [], set()
    for (device, dtype, basis_dtype), candidates in alike.items():
        taken = [
            (i, member)
            for i, member in candidates
            if forced == "triton"
            or choose(
                *member.grad.shape,
                *(None if basis is None else basis.shape[-1] for basis in (member.left, member.right)),
                dtype,
                basis_dtype,
                batch=len(candidates),
                gpu=gpu_of(device.index),
            )
            == "triton"
        ]
        # A single matrix has kernels whose strides are known when they are compiled.
        if len(taken) > 1:
            groups += prepare([member for _, member in taken], [i for i, _ in taken])
            grouped |= {i for i, _ in taken}
    return Call(tuple(groups), one_by_one(i for i in everything if i not in grouped), lengths)


def check_apart_quickly(
    grads: Sequence[Tensor],
    lefts: Sequence[Tensor | None],
    rights: Sequence[Tensor | None],
    lengths: np.ndarray[Any, Any],
) -> None:
    """`check_foreach_apart`, asked only where spans of memory meet at all; bases may be shared."""
    addresses = [t.data_ptr() for tensors in (grads, lefts, rights) for t in tensors if t is not None]
    begins = np.array(addresses, np.int64)
    spans = np.stack([begins, begins + lengths], 1)
    spans = np.concatenate([spans[: len(grads)], np.unique(spans[len(grads) :], axis=0)])
    spans = spans[spans[:, 1] > spans[:, 0]]
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    if (spans[:-1, 1] > spans[1:, 0]).any():
        check_foreach_apart(OP, grads, lefts, rights)


def foreach_into(
    grads: Sequence[Tensor],
    lefts: Sequence[Tensor | None],
    rights: Sequence[Tensor | None],
    keep_lefts: Sequence[bool],
    keep_rights: Sequence[bool],
    block: bool,
) -> None:
    """Every entry of grads in place; the lists are checked before anything is written."""
    forced = forced_backend()
    tensors = [t for tensors in (grads, lefts, rights) for t in tensors]
    given = [t for t in tensors if t is not None]
    layout = (
        len(grads),
        tuple([t is None for t in tensors]),
        tuple([t.shape for t in given]),
        tuple([t.stride() for t in given]),
        tuple([t.dtype for t in given]),
        tuple([t.get_device() for t in given]),
        (tuple(keep_lefts), tuple(keep_rights), block, forced),
    )
    device = grads[0].device

    def locate() -> Call:
        call: Call = held(
            layout, lambda: plan_call(grads, lefts, rights, keep_lefts, keep_rights, block, forced), device
        )
        check_apart_quickly(grads, lefts, rights, call.lengths)
        return call._replace(groups=tuple(group.locate(grads, lefts, rights) for group in call.groups))

    call: Call = held((layout, tuple([t.data_ptr() for t in given])), locate, device)
    for group in call.groups:
        group.launch()
    rooms: dict[Any, Room] = {}
    for i, backend in call.single:
        keep_left = bool(keep_lefts) and keep_lefts[i]
        keep_right = bool(keep_rights) and keep_rights[i]
        if backend == "cublas":
            project_cublas(grads[i], lefts[i], rights[i], grads[i], keep_left, keep_right, block, rooms)
        else:
            project_into(grads[i], lefts[i], rights[i], grads[i], keep_left, keep_right, block, OP)

"""``foreach_project_`` on a GPU: what suits the grouped Triton kernels in at most four launches, the rest one by one.

A call with the addresses, shapes, ranks and flags of an earlier one is neither checked nor planned again: at 224
matrices the checks take longer than the launches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..triton_kernels.tables import held
from .checks import check_foreach, check_foreach_apart
from .heuristics import Backend, choose, forced_backend, gpu_of, triton_missing
from .variants import project_into

__all__ = ["Call", "call_key", "foreach_into", "plan_call"]


class Call(NamedTuple):
    """groups: of the grouped kernels. single: positions that they do not take."""

    groups: tuple[Any, ...]
    single: tuple[int, ...]


def call_key(
    grads: Sequence[Tensor], lefts: Sequence[Tensor | None], rights: Sequence[Tensor | None], *flags: Any
) -> tuple[Any, ...]:
    """Equal for two calls that read and write the same memory in the same way."""
    bases = [basis for bases in (lefts, rights) for basis in bases]
    tensors = [*grads, *(basis for basis in bases if basis is not None)]
    return (
        tuple([basis is None for basis in bases]),
        tuple([tensor.data_ptr() for tensor in tensors]),
        tuple([tensor.shape for tensor in tensors]),
        tuple([tensor.stride() for tensor in tensors]),
        tuple([tensor.dtype for tensor in tensors]),
        flags,
    )


def plan_call(
    grads: Sequence[Tensor],
    lefts: Sequence[Tensor | None],
    rights: Sequence[Tensor | None],
    keep_lefts: Sequence[bool],
    keep_rights: Sequence[bool],
    block: bool,
    forced: Backend | None,
) -> Call:
    """Checks the lists, as every op does before it writes, and sorts them into groups and single matrices."""
    check_foreach("foreach_project_", grads, lefts, rights, keep_lefts, keep_rights, block)
    check_foreach_apart("foreach_project_", grads, lefts, rights)
    everything = tuple(range(len(grads)))
    if forced not in (None, "triton") or triton_missing():
        return Call((), everything)
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
            groups += prepare([member for _, member in taken])
            grouped |= {i for i, _ in taken}
    return Call(tuple(groups), tuple(i for i in everything if i not in grouped))


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
    flags = (tuple(keep_lefts), tuple(keep_rights), block, forced)

    def plan() -> Call:
        return plan_call(grads, lefts, rights, keep_lefts, keep_rights, block, forced)

    call = held(call_key(grads, lefts, rights, *flags), plan, grads[0].device)
    for group in call.groups:
        group.launch()
    for i in call.single:
        keep_left = bool(keep_lefts) and keep_lefts[i]
        keep_right = bool(keep_rights) and keep_rights[i]
        project_into(grads[i], lefts[i], rights[i], grads[i], keep_left, keep_right, block, "foreach_project_")

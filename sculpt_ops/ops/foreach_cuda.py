"""``foreach_project_`` on a GPU: what suits the grouped Triton kernels in at most four launches, library products of
single matrices in one call, the rest one by one.

A list of the same shapes, ranks and flags is checked and planned once, its addresses each time they move: at 224
matrices the checks alone take longer than the launches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..triton_kernels.tables import held
from .checks import check_foreach, check_foreach_apart, check_written
from .cuda_limits import why_not_sides
from .heuristics import Backend, choose, forced_backend, gpu_of, triton_missing
from .library import LIBRARY  # noqa: F401  (the ops exist once the library is loaded)
from .library_products import form_of, is_product, project_cublas, project_products
from .side_lists import side_lists
from .variants import backend_of, check_forced, check_metric_backend, cuda_missing, project_into

__all__ = ["Call", "foreach_into", "meet", "plan_call"]

OP = "foreach_project_"
_LAYOUT = torch.ops.sculpt._layout.default


class Call(NamedTuple):
    """groups: of the grouped kernels. sides: lists of CUDA C++. products: positions of library products, and their
    forms. single: positions of what none of these takes, what takes them and their flags. lengths: bytes that each
    grad, then each basis and metric, spans."""

    groups: tuple[Any, ...]
    sides: tuple[Any, ...]
    products: tuple[Sequence[int], Sequence[int]]
    single: tuple[tuple[int, Backend, tuple[bool, bool, bool]], ...]
    lengths: np.ndarray[Any, Any]


def _length(tensor: Tensor) -> int:
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _metrics_of(
    left_metrics: Sequence[Tensor | None], right_metrics: Sequence[Tensor | None], i: int
) -> tuple[Tensor | None, Tensor | None]:
    """Of the i-th matrix; an empty list has none of any."""
    return left_metrics[i] if left_metrics else None, right_metrics[i] if right_metrics else None


def plan_call(
    grads: Sequence[Tensor],
    lefts: Sequence[Tensor | None],
    rights: Sequence[Tensor | None],
    left_metrics: Sequence[Tensor | None],
    right_metrics: Sequence[Tensor | None],
    keep_lefts: Sequence[bool],
    keep_rights: Sequence[bool],
    block: bool,
    forced: Backend | None,
) -> Call:
    """Checks all of the lists but their addresses, and sorts them into groups and single matrices."""
    thin = lefts, rights, left_metrics, right_metrics
    check_foreach(OP, grads, *thin, keep_lefts=keep_lefts, keep_rights=keep_rights, block=block)
    for i, grad in enumerate(grads):
        check_written(OP, f"grads[{i}]", grad)
    if left_metrics or right_metrics:
        check_metric_backend(OP, forced)

    def metrics_of(i: int) -> tuple[Tensor | None, Tensor | None]:
        return _metrics_of(left_metrics, right_metrics, i)

    weighed = {i for i in range(len(grads)) if any(metric is not None for metric in metrics_of(i))}

    def listable(i: int) -> bool:
        """By CUDA C++, in a launch of many."""
        if block or cuda_missing() is not None:
            return False
        return why_not_sides(grads[i], lefts[i], rights[i], *metrics_of(i)) is None

    def flags(i: int) -> tuple[bool, bool, bool]:
        return bool(keep_lefts) and keep_lefts[i], bool(keep_rights) and keep_rights[i], block

    def chosen(i: int, matrices: int) -> Backend:
        """For what no group takes: Triton has no other list."""
        backend = backend_of(grads[i], lefts[i], rights[i], block, matrices)
        return backend_of(grads[i], lefts[i], rights[i], block) if backend == "triton" else backend

    def finish(groups: Sequence[Any], grouped: set[int]) -> Call:
        """With what is left beside groups and has anything to do. What is chosen is found once: it takes as long as two
        launches."""
        places = [
            i
            for i in range(len(grads))
            if i not in grouped and grads[i].numel() and not (lefts[i] is None and rights[i] is None)
        ]
        without = sum(i not in weighed for i in places)
        rest = [(i, forced or ("cublas" if i in weighed else chosen(i, without))) for i in places]
        products = [
            i
            for i, backend in rest
            if backend == "cublas" and i not in weighed and is_product(grads[i], lefts[i], rights[i])
        ]
        sides = [i for i, backend in rest if backend == "cuda" and listable(i)]
        listed = {*products, *sides}
        if forced is not None:  # before anything is written
            for i in places:
                if i not in listed:
                    check_forced(OP, forced, grads[i], lefts[i], rights[i], *flags(i), *metrics_of(i))
        return Call(
            tuple(groups),
            tuple(side_lists(grads, *thin, flags, sides)),
            (products, [form_of(*flags(i)) for i in products]),
            tuple((i, backend, flags(i)) for i, backend in rest if i not in listed),
            np.array([_length(tensor) for tensors in (grads, *thin) for tensor in tensors if tensor is not None]),
        )

    if forced not in (None, "triton") or triton_missing():
        return finish((), set())
    from ..triton_kernels.grouped_launch import Member, prepare, why_not_group

    alike: defaultdict[Any, list[tuple[int, Member]]] = defaultdict(list)
    for i, (grad, left, right) in enumerate(zip(grads, lefts, rights, strict=True)):
        if i in weighed:
            continue
        member = Member(grad, left, right, *flags(i))
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
                cuda=listable(i) or (block and cuda_missing() is None),
                block=block,
            )
            == "triton"
        ]
        # A single matrix has kernels whose strides are known when they are compiled.
        if len(taken) > 1:
            groups += prepare([member for _, member in taken], [i for i, _ in taken])
            grouped |= {i for i, _ in taken}
    return finish(groups, grouped)


def meet(written: int, addresses: Sequence[int], lengths: np.ndarray[Any, Any]) -> bool:
    """Whether spans of memory meet of which one is among the first, `written` ones."""
    begins = np.array(addresses, np.int64)
    ends = begins + lengths
    some = lengths > 0
    order = begins[:written].argsort(kind="stable")
    order = order[some[order]]
    first, last = begins[order], ends[order]
    if (last[:-1] > first[1:]).any():
        return True
    bases = written + some[written:].nonzero()[0]
    # The last of the written spans that begin before a basis ends is also the one that ends last.
    before = first.searchsorted(ends[bases])
    return bool((np.concatenate([[0], last])[before] > begins[bases]).any())


def foreach_into(
    grads: Sequence[Tensor],
    lefts: Sequence[Tensor | None],
    rights: Sequence[Tensor | None],
    keep_lefts: Sequence[bool],
    keep_rights: Sequence[bool],
    block: bool,
    left_metrics: Sequence[Tensor | None] = (),
    right_metrics: Sequence[Tensor | None] = (),
) -> None:
    """Every entry of grads in place; the lists are checked before anything is written."""
    forced = forced_backend()
    thin = lefts, rights, left_metrics, right_metrics
    tensors = [t for tensors in (grads, *thin) for t in tensors]
    given = [t for t in tensors if t is not None]
    sizes = len(grads), len(left_metrics)
    asked = (sizes, tuple([t is None for t in tensors]), tuple(keep_lefts), tuple(keep_rights), block, forced)
    device = grads[0].device

    def locate() -> Call:
        # An address is of one device alone, so that only here devices have to be asked for.
        addresses = [t.data_ptr() for t in given]
        # What CUDA C++ takes begins at multiples of 16 bytes.
        layout = tuple(
            [(t.shape, t.stride(), t.dtype, t.get_device(), at % 16) for t, at in zip(given, addresses, strict=True)]
        )
        call: Call = held(
            (asked, layout), lambda: plan_call(grads, *thin, keep_lefts, keep_rights, block, forced), device
        )
        if meet(len(grads), addresses, call.lengths):
            check_foreach_apart(OP, grads, *thin)
        return call._replace(
            groups=tuple(group.locate(grads, lefts, rights) for group in call.groups),
            sides=tuple(side.locate(grads, *thin) for side in call.sides),
        )

    call: Call = held((asked, _LAYOUT(given).numpy().tobytes()), locate, device)
    for group in (*call.groups, *call.sides):
        group.launch()
    places, forms = call.products
    if places:
        listed = [grads[i] for i in places]
        project_products(listed, [lefts[i] for i in places], [rights[i] for i in places], listed, forms)
    for i, backend, flags in call.single:
        metrics = _metrics_of(left_metrics, right_metrics, i)
        if backend == "cublas":
            project_cublas(grads[i], lefts[i], rights[i], grads[i], *flags, *metrics)
        else:
            project_into(grads[i], lefts[i], rights[i], grads[i], *flags, OP, *metrics)

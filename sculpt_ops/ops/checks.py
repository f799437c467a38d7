"""What the ops accept. Each check raises one error naming the argument, what was given and what was wanted.

``csrc/common/check.h`` guards the C++ kernels with the same rules, for programs without Python. These run first under
Python because a message raised inside a stable-ABI kernel is lost on torch < 2.13.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "check_apart",
    "check_foreach",
    "check_foreach_apart",
    "check_matrix",
    "check_orthonormalize",
    "check_project",
    "check_restore",
    "check_rsvd",
    "check_sketch",
    "check_written",
    "dtype_name",
    "has_tangent",
    "refuse_forward_mode",
    "refuse_gradients",
]

_HALF = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, torch.float64, *_HALF)


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether any has a tangent of forward-mode differentiation."""
    if not _is_dual_level_open():
        return False
    return any(tensor is not None and torch._VF._unpack_dual(tensor, level=0)[1] is not None for tensor in tensors)


def _is_dual_level_open() -> bool:
    if forward_ad._current_level >= 0:
        return True
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    # What is traced has entered its level in C++, of which Python's count knows nothing. Asked of the tensors, torch
    # would record the question; of levels there is one at most.
    try:
        level = torch._C._enter_dual_level()
    except RuntimeError:
        return True
    torch._C._exit_dual_level(level=level)
    return False


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """An op without a forward-mode derivative drops tangents without a word; say so instead."""
    if has_tangent(*tensors):
        raise NotImplementedError(
            f"{op}: given a tensor with a forward-mode tangent, wanted one without; its twin in sculpt_ops.reference "
            "has a derivative in that mode"
        )


def refuse_gradients(op: str, **tensors: Tensor | None) -> None:
    """For an op without a backward formula; tensors by argument."""
    refuse_forward_mode(op, *tensors.values())
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{op}: {name}: given a tensor that requires grad, wanted one that does not; call under torch.no_grad()"
            )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def dtype_name(dtype: torch.dtype) -> str:
    """As errors name it: float32."""
    return str(dtype).removeprefix("torch.")


def _check_tensor(op: str, name: str, given: object) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{op}: {name}: given {type(given).__name__}, wanted a tensor")


def check_matrix(op: str, name: str, matrix: Tensor) -> None:
    _check_tensor(op, name, matrix)
    if matrix.is_nested:
        raise TypeError(f"{op}: {name}: given a nested tensor, wanted a dense (strided) tensor")
    if matrix.dtype not in _DTYPES:
        raise TypeError(
            f"{op}: {name}: given dtype {dtype_name(matrix.dtype)}, wanted float32, float64, bfloat16 or float16"
        )
    if matrix.dim() < 2:
        raise ValueError(f"{op}: {name}: given shape {_shape(matrix)}, wanted a matrix (..., m, n)")
    if matrix.layout is not torch.strided:
        raise TypeError(f"{op}: {name}: given layout {matrix.layout}, wanted a dense (strided) tensor")


def _is_led_by(thin: Tensor, matrix: Tensor) -> bool:
    """Whether its leading dimensions broadcast to the matrix's."""
    if thin.dim() <= 2:
        return True
    lead, batch = thin.shape[:-2], matrix.shape[:-2]
    pairs = zip(reversed(lead), reversed(batch), strict=False)
    return len(lead) <= len(batch) and all(a in (b, 1) for a, b in pairs)


def _check_thin(op: str, name: str, thin: Tensor, matrix: Tensor, rows: int, cols: int | None) -> None:
    shape = thin.shape
    good = len(shape) >= 2 and shape[-2] == rows and (cols is None or shape[-1] == cols)
    if not (good and _is_led_by(thin, matrix)):
        wanted = f"(..., {rows}, {'r' if cols is None else cols})"
        raise ValueError(
            f"{op}: {name}: given shape {_shape(thin)}, wanted {wanted} for a matrix of shape {_shape(matrix)}"
        )
    if thin.dtype is not matrix.dtype and not (thin.dtype is torch.float32 and matrix.dtype in _HALF):
        wanted = f"{dtype_name(matrix.dtype)} or float32" if matrix.dtype in _HALF else dtype_name(matrix.dtype)
        raise TypeError(f"{op}: {name}: given dtype {dtype_name(thin.dtype)}, wanted {wanted}")
    if thin.device != matrix.device:
        raise ValueError(f"{op}: {name}: given device {thin.device}, wanted the matrix's, {matrix.device}")


def _check_basis(op: str, name: str, basis: Tensor, matrix: Tensor, rows: int) -> None:
    _check_tensor(op, name, basis)
    _check_thin(op, name, basis, matrix, rows, None)
    if basis.shape[-1] > rows:
        raise ValueError(f"{op}: {name}: given shape {_shape(basis)}, wanted at most {rows} orthonormal columns")


def _check_flags(
    op: str, left: Tensor | None, right: Tensor | None, keep_left: bool, keep_right: bool, block: bool
) -> None:
    if block:
        if left is None or right is None:
            given = "left only" if left is not None else "right only" if right is not None else "neither"
            raise ValueError(f"{op}: block: given {given}, wanted both left and right")
        if keep_left or keep_right:
            raise ValueError(f"{op}: block: given with keep_left or keep_right, wanted neither of them")
    if keep_left and left is None:
        raise ValueError(f"{op}: keep_left: given left=None, wanted a left basis")
    if keep_right and right is None:
        raise ValueError(f"{op}: keep_right: given right=None, wanted a right basis")


def _check_metric(op: str, side: str, metric: Tensor, basis: Tensor | None, matrix: Tensor) -> None:
    name = f"{side}_metric"
    if basis is None:
        raise ValueError(f"{op}: {name}: given {side}=None, wanted a {side} basis")
    rank = basis.shape[-1]
    if metric.shape[-2:] != (rank, rank) or not _is_led_by(metric, matrix):
        raise ValueError(
            f"{op}: {name}: given shape {_shape(metric)}, wanted (..., {rank}, {rank}) for a {side} basis of {rank} "
            f"columns and a matrix of shape {_shape(matrix)}"
        )
    double = matrix.dtype is torch.float64
    if metric.dtype is not torch.float32 and not (double and metric.dtype is torch.float64):
        wanted = "float32 or float64" if double else "float32"
        raise TypeError(f"{op}: {name}: given dtype {dtype_name(metric.dtype)}, wanted {wanted}")
    if metric.device != matrix.device:
        raise ValueError(f"{op}: {name}: given device {metric.device}, wanted the matrix's, {matrix.device}")


def check_project(
    op: str,
    grad: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    left_metric: Tensor | None = None,
    right_metric: Tensor | None = None,
    *,
    keep_left: bool = False,
    keep_right: bool = False,
    block: bool = False,
    name: str = "grad",
) -> None:
    """Shapes, dtypes, devices and flags of one projection; under tracing too."""
    check_matrix(op, name, grad)
    m, n = grad.shape[-2:]
    if left is not None:
        _check_basis(op, "left", left, grad, m)
    if right is not None:
        _check_basis(op, "right", right, grad, n)
    if keep_left or keep_right or block:
        _check_flags(op, left, right, keep_left, keep_right, block)
    if left_metric is not None:
        _check_metric(op, "left", left_metric, left, grad)
    if right_metric is not None:
        _check_metric(op, "right", right_metric, right, grad)


def check_foreach(
    op: str,
    grads: Sequence[Tensor],
    lefts: Sequence[Tensor | None],
    rights: Sequence[Tensor | None],
    left_metrics: Sequence[Tensor | None] | None = None,
    right_metrics: Sequence[Tensor | None] | None = None,
    *,
    keep_lefts: Sequence[bool] = (),
    keep_rights: Sequence[bool] = (),
    block: bool = False,
) -> None:
    """One entry of each list for each of ``grads``; lists of flags and metrics may be empty."""
    count = len(grads)
    lists = (("lefts", lefts, False), ("rights", rights, False))
    flags = (("keep_lefts", keep_lefts, True), ("keep_rights", keep_rights, True))
    metrics = (("left_metrics", left_metrics or (), True), ("right_metrics", right_metrics or (), True))
    for name, entries, may_be_empty in (*lists, *flags, *metrics):
        if len(entries) != count and not (may_be_empty and len(entries) == 0):
            raise ValueError(f"{op}: {name}: given {len(entries)} entries, wanted {count}, one for each of grads")
    for i, grad in enumerate(grads):
        check_project(
            f"{op} (entry {i})",
            grad,
            lefts[i],
            rights[i],
            left_metrics[i] if left_metrics else None,
            right_metrics[i] if right_metrics else None,
            keep_left=bool(keep_lefts) and keep_lefts[i],
            keep_right=bool(keep_rights) and keep_rights[i],
            block=block,
        )


def check_restore(
    op: str,
    weight: Tensor,
    left: Tensor | None,
    left_image: Tensor | None,
    right: Tensor | None,
    right_image: Tensor | None,
    core: Tensor | None,
    reference: Tensor | None,
    keep_left: bool,
    keep_right: bool,
    block: bool,
) -> None:
    """Shapes, dtypes, devices and flags of a restore, and that each side has what it is restored from."""
    check_project(op, weight, left, right, keep_left=keep_left, keep_right=keep_right, block=block, name="weight")
    m, n = weight.shape[-2:]
    if block:
        assert left is not None
        assert right is not None
        if core is None:
            raise ValueError(f"{op}: core: given None, wanted left^T W0 right with block=True")
        _check_thin(op, "core", core, weight, left.shape[-1], right.shape[-1])
    else:
        if (keep_left or keep_right) and reference is None:
            raise ValueError(f"{op}: reference: given None, wanted the start weight with keep_left or keep_right")
        if left is not None and not keep_left and left_image is None:
            raise ValueError(f"{op}: left_image: given None, wanted left^T W0")
        if right is not None and not keep_right and right_image is None:
            raise ValueError(f"{op}: right_image: given None, wanted W0 right")
    if left is not None and left_image is not None:
        _check_thin(op, "left_image", left_image, weight, left.shape[-1], n)
    if right is not None and right_image is not None:
        _check_thin(op, "right_image", right_image, weight, m, right.shape[-1])
    if reference is not None:
        _check_thin(op, "reference", reference, weight, m, n)
        if reference.dtype is not weight.dtype:
            raise TypeError(
                f"{op}: reference: given dtype {dtype_name(reference.dtype)}, wanted {dtype_name(weight.dtype)}"
            )


def check_sketch(op: str, input: Tensor, q: int, transpose: bool, row: int, column: int) -> None:
    """A matrix, and a test matrix whose rows and columns // 4 are 32-bit words of the counter; under tracing too."""
    check_matrix(op, "input", input)
    if q < 0:
        raise ValueError(f"{op}: q: given {q}, wanted 0 or more columns")
    rows = input.shape[-2 if transpose else -1]
    if row < 0 or row + rows > 2**32:
        raise ValueError(f"{op}: row: given {row}, wanted 0 to 2^32 - {rows}, the rows drawn")
    if column < 0 or column + q > 2**34:
        raise ValueError(f"{op}: column: given {column}, wanted 0 to 2^34 - {q}, the columns drawn")


def check_orthonormalize(input: Tensor) -> None:
    """A matrix with at least as many rows as columns; under tracing too."""
    check_matrix("orthonormalize", "input", input)
    m, q = input.shape[-2:]
    if q > m:
        raise ValueError(f"orthonormalize: input: given shape {_shape(input)}, wanted (..., m, q) with q at most m")


def check_rsvd(name: str, matrix: Tensor, rank: int, start: Tensor | None, oversample: int, n_iter: int) -> None:
    """A matrix, a rank that it has, and columns to start from that fit it; under tracing too."""
    check_matrix("rsvd", name, matrix)
    m, n = matrix.shape[-2:]
    # One by one: a minimum would fix under tracing which of them is smaller.
    if rank < 1 or rank > m or rank > n:
        raise ValueError(f"rsvd: rank: given {rank}, wanted 1 to {min(m, n)} for a matrix of shape {_shape(matrix)}")
    for argument, value in (("oversample", oversample), ("n_iter", n_iter)):
        if value < 0:
            raise ValueError(f"rsvd: {argument}: given {value}, wanted 0 or more")
    if start is None:
        return
    lead = (*matrix.shape[:-2], matrix.shape[-1])
    if start.dim() < 2 or start.shape[:-1] != lead:
        wanted = ", ".join(map(str, (*lead, "j")))
        raise ValueError(
            f"rsvd: start: given shape {_shape(start)}, wanted ({wanted}) for a matrix of shape {_shape(matrix)}"
        )
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    if start.dtype is not dtype:
        raise TypeError(f"rsvd: start: given dtype {dtype_name(start.dtype)}, wanted {dtype_name(dtype)}")
    if start.device != matrix.device:
        raise ValueError(f"rsvd: start: given device {start.device}, wanted the matrix's, {matrix.device}")


def _extent(tensor: Tensor) -> tuple[int, int]:
    begin = tensor.data_ptr()
    if tensor.numel() == 0:
        return begin, begin
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


# Pairs of index ranges that are looked at before two tensors are taken to share memory.
_MOST_TRIES = 1000


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether an element of one has a byte of the other: exact for slices, transposes and interleaved views; where it
    would take too long, whether their spans meet."""
    (a0, a1), (b0, b1) = _extent(a), _extent(b)
    # Without an address (a DTensor, a meta tensor) nothing is known.
    if not (a0 < b1 and b0 < a1) or not (a0 and b0):
        return False
    # By stride in bytes how far an index of a goes, and one of b: they meet where the sum of (index of a - index of b)
    # times stride is the distance.
    reach: dict[int, list[int]] = {1: [a.element_size() - 1, b.element_size() - 1]}
    for which, tensor in enumerate((a, b)):
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            if size > 1 and stride:
                reach.setdefault(stride * tensor.element_size(), [0, 0])[which] += size - 1
    strides = sorted(reach, reverse=True)
    tries = 0

    def meet(at: int, distance: int) -> bool:
        nonlocal tries
        tries += 1
        if at == len(strides) or tries > _MOST_TRIES:
            return distance == 0 or tries > _MOST_TRIES
        stride, rest = strides[at], strides[at + 1 :]
        forth, back = (sum(reach[s][which] * s for s in rest) for which in (0, 1))
        first = max(-((forth - distance) // stride), -reach[stride][1])
        last = min((distance + back) // stride, reach[stride][0])
        return any(meet(at + 1, distance - x * stride) for x in range(first, last + 1))

    return meet(0, b0 - a0)


def check_written(op: str, name: str, tensor: Tensor) -> None:
    """A tensor to be written must not hold one element twice, nor the negatives of what it is to hold. Reads addresses:
    eager only."""
    if tensor.is_neg():
        raise ValueError(
            f"{op}: {name}: given a view that negates what it shows (.imag of a conjugate), wanted the numbers "
            "themselves; pass .resolve_neg()"
        )
    reach = 0
    for stride, size in sorted((st, si) for st, si in zip(tensor.stride(), tensor.shape, strict=True) if si > 1):
        if stride <= reach and tensor.numel():
            raise ValueError(
                f"{op}: {name}: given a tensor that overlaps itself (an expanded tensor?), wanted every element stored "
                "once; pass a clone"
            )
        reach += (size - 1) * stride


def check_apart(op: str, written_name: str, written: Tensor, **others: Tensor | None) -> None:
    """None of ``others`` may share memory with the tensor to be written. Reads addresses: eager only."""
    for name, other in others.items():
        if other is not None and _share_memory(written, other):
            raise ValueError(f"{op}: {name}: given memory shared with {written_name}, wanted memory of its own")


def check_foreach_apart(
    op: str,
    grads: Sequence[Tensor],
    lefts: Sequence[Tensor | None],
    rights: Sequence[Tensor | None],
    left_metrics: Sequence[Tensor | None] | None = None,
    right_metrics: Sequence[Tensor | None] | None = None,
) -> None:
    """No two entries to be written, and no entry and basis or metric of any, share memory. Reads addresses: eager
    only."""
    for i, grad in enumerate(grads):
        check_written(op, f"grads[{i}]", grad)
    order = sorted((_extent(grad), i) for i, grad in enumerate(grads) if grad.numel())
    for at, ((_, end), i) in enumerate(order):
        for (begin, _), j in order[at + 1 :]:
            if begin >= end:
                break
            if _share_memory(grads[i], grads[j]):
                raise ValueError(
                    f"{op}: grads: given entries {min(i, j)} and {max(i, j)} that share memory, wanted memory of "
                    "their own"
                )
    begins = [begin for (begin, _), _ in order]
    reach = list(accumulate((end for (_, end), _ in order), max))
    bases = (("lefts", lefts), ("rights", rights), ("left_metrics", left_metrics), ("right_metrics", right_metrics))
    for name, entries in bases:
        for i, basis in enumerate(entries or ()):
            if basis is None or basis.numel() == 0:
                continue
            begin, end = _extent(basis)
            # Column slices may lie within the span of an entry that begins long before them.
            at = bisect_left(begins, end)
            while at > 0 and reach[at - 1] > begin:
                at -= 1
                check_apart(op, f"grads[{order[at][1]}]", grads[order[at][1]], **{f"{name}[{i}]": basis})

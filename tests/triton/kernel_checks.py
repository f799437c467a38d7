"""Numerical checks of the Triton kernels against float64: on a GPU, or under TRITON_INTERPRET=1 on the CPU.

Not collected by name: `test_triton_interpreter.py` runs this file in a process of its own, because triton reads
TRITON_INTERPRET when it is imported and the compile tests need it unset.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from sculpt_ops import ops, philox, reference
from sculpt_ops.ops import rounding
from sculpt_ops.ops.sketch import test_matrix_cuda as draw
from sculpt_ops.triton_kernels import launch, panels
from sculpt_ops.triton_kernels.project_block import project_block
from sculpt_ops.triton_kernels.project_both import project_both
from sculpt_ops.triton_kernels.project_left import project_left
from sculpt_ops.triton_kernels.project_right import project_right

DEVICE = "cpu" if launch.INTERPRET else "cuda"
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
Project = Callable[[Tensor, Tensor, Tensor, Tensor], None]

# What each launcher computes of (grad, left, right, out), and the flags of the plain twin that does the same.
OPS: dict[str, tuple[Project, dict[str, bool]]] = {
    "left": (lambda g, left, right, out: project_left(g, left, out, keep=False), {}),
    "keep_left": (lambda g, left, right, out: project_left(g, left, out, keep=True), {"keep_left": True}),
    "right": (lambda g, left, right, out: project_right(g, right, out, keep=False), {}),
    "keep_right": (lambda g, left, right, out: project_right(g, right, out, keep=True), {"keep_right": True}),
    "both": (project_both, {}),
    "block": (project_block, {"block": True}),
}
TWO_SIDED = ("both", "block")


def bfloat16_bits(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return torch.from_numpy(np.ascontiguousarray(values)).to(BF16).view(torch.int16).numpy().view(np.uint16)


def from_bfloat16_bits(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.fixture(autouse=True, scope="module")
def _bfloat16_interpreter() -> Iterator[None]:
    """The interpreter multiplies the bits of bfloat16 as integers, truncates where a GPU rounds to nearest even, and
    takes subnormals for zeros."""
    convert = interpreter._convert_float

    def rounded(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == interpreter.tl.float32 and target == interpreter.tl.bfloat16:
            return bfloat16_bits(values)
        if source == interpreter.tl.bfloat16 and target == interpreter.tl.float32:
            return from_bfloat16_bits(values).view(np.uint32)
        return convert(values, source, target, mode)

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        x, y = (from_bfloat16_bits(t.data) if t.dtype.scalar == interpreter.tl.bfloat16 else t.data for t in (a, b))
        return interpreter.TensorHandle(np.matmul(x, y, dtype=d.data.dtype) + d.data, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounded)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
        yield


def orthonormal(*shape: int, dtype: torch.dtype = F32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64, generator=generator))[0].to(DEVICE, dtype)


def gradient(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def plain(op: str, grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
    flags = OPS[op][1]
    return reference.project(
        grad,
        None if op.endswith("right") else left,
        None if op.endswith("left") else right,
        **flags,
    )


def assert_accurate(op: str, out: Tensor, grad: Tensor, left: Tensor, right: Tensor) -> None:
    """At most twice the plain expression's error, mean and max, plus twice the rounding of the result, plus a floor."""
    exact = plain(op, grad.double(), left.double(), right.double())
    error = (out.double() - exact).abs()
    plain_error = (plain(op, grad, left, right).double() - exact).abs()
    rounding = (exact.to(out.dtype).double() - exact).abs()
    floor = (2**-20 if out.dtype == F32 else 2**-15) * grad.double().abs().max()
    assert error.isfinite().all()
    assert error.mean() <= 2 * plain_error.mean() + 2 * rounding.mean() + floor
    assert error.max() <= 2 * plain_error.max() + 2 * rounding.max() + floor


def check(op: str, grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
    out = torch.full_like(grad, float("nan"))
    OPS[op][0](grad, left, right, out)
    assert_accurate(op, out, grad, left, right)
    return out


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("m", "n", "r", "s"), [(199, 1128, 7, 33), (1, 50, 1, 2), (50, 1, 2, 1), (130, 70, 16, 64)])
def test_float32_of_any_size(op: str, m: int, n: int, r: int, s: int) -> None:
    check(op, gradient(m, n), orthonormal(m, min(m, r)), orthonormal(n, min(n, s)))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("dtype", "basis_dtype"), [(BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)])
def test_half_precision(op: str, dtype: torch.dtype, basis_dtype: torch.dtype) -> None:
    left, right = orthonormal(150, 20, dtype=basis_dtype), orthonormal(90, 17, dtype=basis_dtype)
    check(op, gradient(150, 90, dtype=dtype), left, right)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("basis_dtype", [BF16, F32])
def test_bfloat16_coefficients_are_not_rounded(op: str, basis_dtype: torch.dtype) -> None:
    """Beyond the rounding of the result itself, the error is 2^-17 of the coefficients and not their 2^-9."""
    left, right = orthonormal(256, 8, dtype=basis_dtype), orthonormal(192, 8, dtype=basis_dtype)
    grad = (100 * left.float() @ gradient(8, 8) @ right.float().mT).to(BF16)
    OPS[op][0](grad, left, right, out := torch.empty_like(grad))
    exact = plain(op, grad.double(), left.double(), right.double())
    rounding = (exact.to(BF16).double() - exact).abs()
    assert ((out.double() - exact).abs() - rounding).max() <= 2**-14 * grad.abs().max()


@pytest.mark.parametrize("op", OPS)
def test_strides_are_honoured(op: str) -> None:
    parent = torch.full((70, 300), float("nan"), device=DEVICE)
    grad = parent[3:67:2, 5:200:3]
    grad.copy_(gradient(32, 65))
    left, right = orthonormal(32, 6).mT.contiguous().mT, orthonormal(130, 5)[::2]
    OPS[op][0](grad, left, right, out := torch.empty(65, 32, device=DEVICE).mT)
    assert_accurate(op, out, grad, left, right)
    written = torch.full((80, 400), 7.0, device=DEVICE)
    OPS[op][0](grad, left, right, written[1:33, 2:132:2])
    assert torch.equal(written[1:33, 2:132:2], out)
    written[1:33, 2:132:2] = 7.0
    assert (written == 7.0).all()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shared_basis", [False, True])
def test_batch(op: str, shared_basis: bool) -> None:
    grad = gradient(60, 3, 40).transpose(0, 1)
    left = orthonormal(60, 5) if shared_basis else orthonormal(3, 60, 5)
    right = orthonormal(40, 4) if shared_basis else orthonormal(3, 40, 4)
    out = check(op, grad, left, right)
    for item in range(3):
        single = torch.empty(60, 40, device=DEVICE)
        OPS[op][0](grad[item], left if shared_basis else left[item], right if shared_basis else right[item], single)
        assert torch.equal(out[item], single)


@pytest.mark.parametrize("op", OPS)
def test_in_place_equals_out_of_place(op: str) -> None:
    grad, left, right = gradient(140, 75), orthonormal(140, 9), orthonormal(75, 3)
    out = check(op, grad, left, right)
    OPS[op][0](grad, left, right, grad)
    assert torch.equal(grad, out)


@pytest.mark.parametrize("op", OPS)
def test_several_panels_a_program_and_chunks(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "device_of", lambda index: panels.Device(l2_bytes=2**14, multiprocessors=2))
    for m, n in ((40, 330), (330, 40)):
        check(op, gradient(m, n), orthonormal(m, 3), orthonormal(n, 2))


@pytest.mark.parametrize("op", TWO_SIDED)
def test_scratch_is_not_overrun(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """7 column panels in chunks of 3: the last chunk has room for two panels more than there are."""
    monkeypatch.setattr(launch, "device_of", lambda index: panels.Device(l2_bytes=2**16, multiprocessors=2))
    new_empty, guards = torch.Tensor.new_empty, []

    def guarded(self: Tensor, *size: int, **options: Any) -> Tensor:
        if 0 in size:
            return new_empty(self, *size, **options)
        count = math.prod(size)
        memory = new_empty(self, count + 4096, **options).fill_(7.0)
        guards.append(memory[count:])
        return memory[:count].view(size)

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    check(op, gradient(2, 40, 410), orthonormal(40, 3), orthonormal(410, 2))
    assert guards
    assert all((guard == 7.0).all() for guard in guards)


@pytest.mark.parametrize("op", OPS)
def test_rank_zero_removes_and_keeps_nothing(op: str) -> None:
    grad, none = gradient(20, 30), [torch.empty(size, 0, device=DEVICE) for size in (20, 30)]
    out = torch.full_like(grad, float("nan"))
    OPS[op][0](grad, *none, out)
    assert torch.equal(out, torch.zeros_like(grad) if op.startswith("keep") else grad)


def test_rank_zero_on_one_side_leaves_the_other() -> None:
    grad, left, right = gradient(20, 30), orthonormal(20, 3), orthonormal(30, 4)
    both, single = torch.empty_like(grad), torch.empty_like(grad)
    project_both(grad, left[:, :0], right, both)
    project_right(grad, right, single, keep=False)
    assert torch.equal(both, single)
    project_both(grad, left, right[:, :0], both)
    project_left(grad, left, single, keep=False)
    assert torch.equal(both, single)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 5, 6), (2, 0, 6)])
def test_empty_gradients(op: str, shape: tuple[int, ...]) -> None:
    grad = torch.empty(shape, device=DEVICE)
    left, right = torch.zeros(shape[-2], 2, device=DEVICE), torch.zeros(shape[-1], 2, device=DEVICE)
    OPS[op][0](grad, left, right, out := torch.empty_like(grad))
    assert out.shape == grad.shape


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rank", [1, 3])
def test_non_finite_values_go_where_torch_puts_them(op: str, value: float, rank: int) -> None:
    grad, left, right = gradient(50, 70), orthonormal(50, rank), orthonormal(70, rank)
    grad[17, 40] = value
    OPS[op][0](grad, left, right, out := torch.empty_like(grad))
    expected = plain(op, grad, left, right)
    assert torch.equal(out.isfinite(), expected.isfinite())
    if op not in TWO_SIDED:
        assert torch.equal(out.isnan(), expected.isnan())


def test_float16_coefficients_above_65504_do_not_overflow() -> None:
    grad = torch.full((64, 40), 30000.0, dtype=F16, device=DEVICE)
    left = torch.full((64, 1), 0.125, dtype=F16, device=DEVICE)
    right = orthonormal(40, 1, dtype=F16)
    project_left(grad, left, out := torch.empty_like(grad), keep=False)
    assert torch.equal(out, torch.zeros_like(out))
    for op in OPS:
        OPS[op][0](grad, left, right, out)
        assert out.isfinite().all()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": (20,)}, "grad: given shape"),
        ({"out": (30, 20)}, "out: given"),
        ({"left": (19, 3), "right": (29, 3)}, r"(left|right): given shape .* wanted"),
        ({"left": (2, 20, 3), "right": (2, 30, 3)}, r"(left|right): given shape .* wanted"),
        ({"left": (20, 300), "right": (30, 300)}, "given rank 300, wanted at most 128"),
    ],
)
def test_operands_that_do_not_fit_are_refused_before_writing(
    op: str, change: dict[str, tuple[int, ...]], message: str
) -> None:
    shapes = {"grad": (20, 30), "left": (20, 3), "right": (30, 3), "out": (20, 30)} | change
    grad, left, right, out = (torch.full(shape, 3.0, device=DEVICE) for shape in shapes.values())
    with pytest.raises(ValueError, match=message):
        OPS[op][0](grad, left, right, out)
    assert (out == 3.0).all()


@pytest.mark.parametrize("op", OPS)
def test_dtypes_are_refused_before_writing(op: str) -> None:
    for dtype, basis_dtype in ((torch.float64, torch.float64), (F32, BF16), (BF16, F16)):
        grad = torch.ones(20, 30, dtype=dtype, device=DEVICE)
        left, right = orthonormal(20, 2, dtype=basis_dtype), orthonormal(30, 2, dtype=basis_dtype)
        with pytest.raises(ValueError, match=r"given a torch\.\w+ (grad|basis), wanted"):
            OPS[op][0](grad, left, right, grad)
        assert (grad == 1).all()


@pytest.mark.parametrize("op", OPS)
def test_out_that_overlaps_is_refused(op: str) -> None:
    memory = torch.ones(21, 30, device=DEVICE)
    left, right = orthonormal(20, 2), orthonormal(30, 2)
    with pytest.raises(ValueError, match="overlaps grad"):
        OPS[op][0](memory[:20], left, right, memory[1:])
    with pytest.raises(ValueError, match="every element at its own address"):
        OPS[op][0](memory[:20], left, right, torch.ones(1, 30, device=DEVICE).expand(20, 30))
    assert (memory == 1).all()


@triton.jit
def words_kernel(out_ptr, seed, c0, c1, c2, c3):
    zeros = tl.zeros((16,), tl.uint32)
    a, b, c, d = tl.philox(
        tl.cast(seed, tl.int64),
        zeros + tl.cast(c0, tl.uint32) + tl.arange(0, 16).to(tl.uint32),
        zeros + tl.cast(c1, tl.uint32),
        zeros + tl.cast(c2, tl.uint32),
        zeros + tl.cast(c3, tl.uint32),
    )
    at = out_ptr + 4 * tl.arange(0, 16)
    tl.store(at, a.to(tl.int64))
    tl.store(at + 1, b.to(tl.int64))
    tl.store(at + 2, c.to(tl.int64))
    tl.store(at + 3, d.to(tl.int64))


@pytest.mark.parametrize("seed", [0, -1, 2**40 + 5, -(2**63)])
@pytest.mark.parametrize("counter", [(0, 0, 0, 0), (2**32 - 16, 2**32 - 1, 7, 2**31)])
def test_philox_words(seed: int, counter: tuple[int, int, int, int]) -> None:
    words_kernel[(1,)](out := torch.empty(16, 4, dtype=torch.int64, device=DEVICE), seed, *counter)
    a, b, c, d = (torch.tensor(word) for word in counter)
    assert torch.equal(out.cpu(), torch.stack(philox.philox((a + torch.arange(16), b, c, d), seed), -1))


@pytest.mark.parametrize("dtype", [F32, torch.float64, BF16, F16], ids=str)
@pytest.mark.parametrize("flags", [{}, {"rademacher": True}, {"transpose": True}], ids=str)
@pytest.mark.parametrize(
    ("shape", "q", "row", "column"),
    [
        ((70, 90), 18, 0, 0),
        ((2, 3, 5, 70), 21, 2**31, 3),
        ((1, 66), 5, 2**32 - 66, 2**34 - 5),
        # Two tiles of rows; the last column is above 2^31.
        ((1, 200), 24, 0, 2**31 - 8),
    ],
    ids=str,
)
def test_test_matrix_is_the_twin_to_the_bit(
    dtype: torch.dtype, flags: dict[str, bool], shape: tuple[int, ...], q: int, row: int, column: int
) -> None:
    for seed in (1, -(2**63)):
        keywords: dict[str, Any] = {"seed": seed, "row": row, "column": column, **flags}
        twin = reference.test_matrix(torch.empty(shape, dtype=dtype), q, **keywords)
        out = draw(torch.empty(shape, dtype=dtype, device=DEVICE), q, **keywords)
        assert out.dtype is twin.dtype
        assert torch.equal(out.cpu(), twin)


@pytest.mark.parametrize("shape", [(5, 0), (0, 4, 5), (3, 0)])
def test_empty_test_matrices(shape: tuple[int, ...]) -> None:
    assert draw(torch.empty(shape, device=DEVICE), 3, seed=0).shape == (*shape[:-2], shape[-1], 3)
    assert draw(torch.empty(4, 6, device=DEVICE), 0, seed=0).shape == (6, 0)


def any_floats(*shape: int, seed: int = 0) -> Tensor:
    """Random bits, so NaN, infinities, subnormals and values that bfloat16 cannot hold are among them."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)
    bits.flatten()[:6] = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, 0x7F7F8000, 0x7F800000, -(2**31)])
    return bits.view(F32)


def assert_same_bits(out: Tensor, twin: Tensor) -> None:
    assert torch.equal(out.cpu().view(torch.int16), twin.view(torch.int16))


def copies(x: Tensor) -> list[Tensor]:
    """On the device, in row-major and in column-major order."""
    return [x.to(DEVICE, copy=True), x.mT.contiguous().to(DEVICE, copy=True).mT]


@pytest.mark.parametrize("shape", [(1, 7), (32, 32), (37, 81)], ids=str)
def test_add_split_is_the_twin_to_the_bit(shape: tuple[int, ...]) -> None:
    value = any_floats(*shape)
    high, low = torch.empty(shape, dtype=BF16), torch.empty(shape, dtype=torch.int16)
    reference.split_(value, high, low)
    step = value.nan_to_num(0, 0, 0) * gradient(*shape).cpu()
    halves = list(zip(copies(high), copies(low), strict=True))
    reference.add_split_(high, low, step)
    # A GPU's sum with a NaN is one NaN whatever the bits of the other.
    number = ~reference.join_halves(high, low).isnan()
    for ours in halves:
        rounding.add_split_cuda_(*ours, step.to(DEVICE))
        assert torch.equal(reference.join_halves(*(half.cpu() for half in ours)).isnan(), ~number)
        assert_same_bits(ours[0].cpu()[number], high[number])
        assert torch.equal(ours[1].cpu()[number], low[number])


@pytest.mark.parametrize("shape", [(1, 7), (32, 32), (37, 81)], ids=str)
@pytest.mark.parametrize(("seed", "offset"), [(1, 0), (-5, 3), (-(2**63), 2**35 - 9)])
def test_round_stochastic_is_the_twin_to_the_bit(shape: tuple[int, ...], seed: int, offset: int) -> None:
    value = any_floats(*shape)
    twin = reference.round_stochastic_(torch.empty(shape, dtype=BF16), value, seed=seed, offset=offset)
    for ours in copies(value):
        out = torch.empty_like(ours, dtype=BF16)
        rounding.round_stochastic_cuda_(out, ours, seed=seed, offset=offset)
        assert_same_bits(out, twin)


@pytest.mark.skipif(launch.INTERPRET, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_sketch_in_a_cuda_graph(dtype: torch.dtype) -> None:
    matrix = gradient(200, 300, dtype=dtype)
    wanted = ops.sketch(matrix, 24, seed=3)
    torch.testing.assert_close(wanted.cpu(), reference.sketch(matrix.cpu(), 24, seed=3), rtol=0, atol=1e-3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.sketch(matrix, 24, seed=3)
    matrix.mul_(2)
    graph.replay()
    assert torch.equal(out, 2 * wanted)

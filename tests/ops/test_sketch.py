"""Philox, the test matrix that it fills, and the sketch: known answers, positions, devices' agreement, tracing."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from sculpt_ops import _host, ops, philox, reference

from .accuracy import DTYPES, gaussian

SKETCH, TEST_MATRIX = torch.ops.sculpt.sketch.default, torch.ops.sculpt.test_matrix.default
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
ALL = 0xFFFFFFFF
# philox4x32-10 of Random123's kat_vectors: counter, key (low word, high word), words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL, ALL, ALL, ALL), (ALL, ALL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words_of_twin(counter: tuple[int, ...], seed: int) -> tuple[int, ...]:
    a, b, c, d = (torch.tensor(word) for word in counter)
    return tuple(int(word) for word in philox.philox((a, b, c, d), seed))


def signed(low: int, high: int) -> int:
    return (high << 32 | low) - (high >> 31 << 64)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    assert tuple(_host.philox(counter, signed(*key))) == words
    assert words_of_twin(counter, signed(*key)) == words


@given(st.tuples(*[st.integers(0, ALL)] * 4), st.integers(-(2**63), 2**63 - 1))
def test_philox_and_its_twin_agree(counter: tuple[int, ...], seed: int) -> None:
    assert tuple(_host.philox(counter, seed)) == words_of_twin(counter, seed)


def test_normals_are_box_muller_to_float_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randint(0, 2**32, (200_000,), generator=generator) for _ in range(4))
    # The largest and the smallest radius, and the angles where cosine and sine change places.
    a[:3], c[:3] = torch.tensor([0, ALL, ALL - 256]), torch.tensor([255, 256, 2**31])
    b[:17] = torch.tensor([min(i << 28, ALL) for i in range(17)])
    for first, second, words in zip(*[iter(philox.normals((a, b, c, d)))] * 2, ((a, b), (c, d)), strict=True):
        radius = ((words[0] // 256 + 1).double() / 2**24).log().mul(-2).sqrt()
        angle = 2 * torch.pi * (words[1] // 256).double() / 2**24
        for value, exact in ((first, radius * angle.cos()), (second, radius * angle.sin())):
            assert ((value - exact).abs() <= 3e-7 * radius + 1e-30).all()
            assert value.abs().max() < 5.77


def test_distribution() -> None:
    """4 million numbers: moments within five standard deviations, and the share below each of 25 quantiles."""
    z = ops.test_matrix(torch.empty(1, 20_000), 200, seed=1).double()
    n = z.numel()
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.square().mean() - 1) < 5 * (2 / n) ** 0.5
    assert abs(z.pow(3).mean()) < 5 * (15 / n) ** 0.5
    assert abs(z.pow(4).mean() - 3) < 5 * (96 / n) ** 0.5
    for q in torch.linspace(0.02, 0.98, 25).double():
        share = (z < torch.special.ndtri(q)).double().mean()
        assert abs(share - q) < 5 * (q * (1 - q) / n) ** 0.5
    # Neighbours are uncorrelated in both directions, the two of one Box-Muller pair included.
    for x, y in ((z[:, :-1], z[:, 1:]), (z[:-1], z[1:]), (z[:, ::4], z[:, 1::4])):
        assert abs((x * y).mean()) < 5 / x.numel() ** 0.5
    signs = ops.test_matrix(torch.empty(1, 20_000), 200, seed=1, rademacher=True)
    assert (signs.abs() == 1).all()
    assert abs(signs.mean()) < 5 / n**0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (150, 301), (3, 2, 50, 66)], ids=str)
@pytest.mark.parametrize(
    ("q", "row", "column"), [(1, 0, 0), (145, 17, 3), (64, 2**31, 8), (9, 2**32 - 1000, 2**34 - 9)], ids=str
)
def test_test_matrix_is_its_twin_to_the_bit(
    dtype: torch.dtype, shape: tuple[int, ...], q: int, row: int, column: int
) -> None:
    like = torch.empty(shape, dtype=dtype)
    for seed in (0, -1, 2**40 + 5, -(2**63)):
        for flags in ({}, {"transpose": True}, {"rademacher": True}):
            keywords: dict[str, Any] = {"seed": seed, "row": row, "column": column, **flags}
            omega, twin = ops.test_matrix(like, q, **keywords), reference.test_matrix(like, q, **keywords)
            assert omega.shape == (*shape[:-2], shape[-2 if "transpose" in flags else -1], q)
            assert omega.dtype is (F64 if dtype is F64 else F32)
            assert omega.is_contiguous()
            assert torch.equal(omega, twin)


def test_an_entry_is_a_word_of_its_position_and_seed() -> None:
    signs = ops.test_matrix(torch.empty(2, 3, 10, 20), 13, seed=-7, rademacher=True, row=5, column=6)
    for b, i, j in ((0, 0, 0), (1, 4, 1), (3, 19, 12), (5, 7, 2)):
        word = _host.philox((5 + i, (6 + j) // 4, b, 0), -7)[(6 + j) % 4]
        assert signs.flatten(0, 1)[b, i, j] == (-1 if word >> 31 else 1)


@pytest.mark.parametrize("rademacher", [False, True])
def test_wider_shifted_and_longer_test_matrices_agree(rademacher: bool) -> None:
    like, keywords = torch.empty(4, 90), {"seed": 3, "rademacher": rademacher}
    whole = ops.test_matrix(like, 50, **keywords)
    for begin, end in ((0, 24), (8, 24), (5, 6), (7, 50), (50, 50)):
        assert torch.equal(ops.test_matrix(like, end - begin, column=begin, **keywords), whole[:, begin:end])
    for begin, end in ((0, 30), (31, 90)):
        assert torch.equal(ops.test_matrix(like[:, begin:end], 50, row=begin, **keywords), whole[begin:end])
    assert torch.equal(ops.test_matrix(like.mT, 50, transpose=True, **keywords), whole)
    assert torch.equal(ops.test_matrix(like.expand(3, 4, 90), 50, **keywords)[0], whole)
    seeds = [ops.test_matrix(like, 50, seed=seed, rademacher=rademacher) for seed in (3, 4, 3 + 2**32, -3)]
    assert all(not torch.equal(seeds[0], other) for other in seeds[1:])


def test_dtypes_share_the_numbers() -> None:
    omega = ops.test_matrix(torch.empty(9, 500), 40, seed=2)
    assert torch.equal(ops.test_matrix(torch.empty(9, 500, dtype=F64), 40, seed=2), omega.double())
    for dtype in (BF16, F16):
        assert torch.equal(ops.test_matrix(torch.empty(9, 500, dtype=dtype), 40, seed=2), omega.to(dtype).float())


def test_threads_do_not_change_the_numbers() -> None:
    like = torch.empty(3, 2, 700)
    omega = ops.test_matrix(like, 37, seed=2, column=2)
    try:
        torch.set_num_threads(1)
        assert torch.equal(ops.test_matrix(like, 37, seed=2, column=2), omega)
    finally:
        torch.set_num_threads(2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(60, 83), (200, 31), (2, 3, 20, 45)], ids=str)
@pytest.mark.parametrize("flags", [{}, {"transpose": True}, {"rademacher": True, "row": 3, "column": 5}], ids=str)
def test_sketch(dtype: torch.dtype, shape: tuple[int, ...], flags: dict[str, Any]) -> None:
    matrix = gaussian(*shape, dtype=dtype)
    for q in (1, 18, 100):  # 100: more than either side of some
        out = ops.sketch(matrix, q, seed=11, **flags)
        omega = reference.test_matrix(matrix, q, seed=11, **flags).double()
        exact = (matrix.mT if "transpose" in flags else matrix).double() @ omega
        plain = reference.sketch(matrix, q, seed=11, **flags)
        assert out.dtype is plain.dtype is (F64 if dtype is F64 else F32)
        floor = 4 * torch.finfo(out.dtype).eps * exact.abs().max()
        assert (out - exact).abs().max() <= 2 * (plain - exact).abs().max() + floor


def test_column_blocks_computed_apart_agree() -> None:
    matrix = gaussian(70, 130, dtype=F32)
    whole = ops.sketch(matrix, 24, seed=5)
    torch.testing.assert_close(ops.sketch(matrix, 16, seed=5, column=8), whole[:, 8:], rtol=0, atol=1e-5)
    torch.testing.assert_close(ops.sketch(matrix, 5, seed=5), whole[:, :5], rtol=0, atol=1e-5)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", [F64, BF16], ids=str)
def test_sketches_of_shards_add_up(transpose: bool, dtype: torch.dtype) -> None:
    matrix = gaussian(96, 130, dtype=dtype)
    dim = 0 if transpose else 1
    cuts = (0, 17, 64, matrix.shape[dim])
    parts = [
        ops.sketch(matrix.narrow(dim, a, b - a), 20, seed=5, transpose=transpose, row=a) for a, b in pairwise(cuts)
    ]
    whole = ops.sketch(matrix, 20, seed=5, transpose=transpose)
    torch.testing.assert_close(sum(parts), whole, rtol=0, atol=1e-12 if dtype is F64 else 1e-4)


def test_any_strides() -> None:
    matrix = gaussian(40, 60, dtype=F32)
    wanted = ops.sketch(matrix, 8, seed=1)
    spread = torch.full((80, 180), torch.nan)[::2, ::3].copy_(matrix)
    reversed_twice = matrix.mT.contiguous().mT
    for view in (spread, reversed_twice, matrix.expand(1, 40, 60)[0]):
        torch.testing.assert_close(ops.sketch(view, 8, seed=1), wanted, rtol=0, atol=2e-5)
        torch.testing.assert_close(ops.sketch(view.mT, 8, seed=1, transpose=True), wanted, rtol=0, atol=2e-5)
    row = matrix[:1].expand(30, 60)
    torch.testing.assert_close(ops.sketch(row, 8, seed=1), wanted[:1].expand(30, 8), rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0, 4, 5), (3, 0, 5), (3, 4, 0)], ids=str)
@pytest.mark.parametrize("q", [0, 3])
def test_empty(shape: tuple[int, ...], q: int) -> None:
    for transpose in (False, True):
        keywords: dict[str, Any] = {"seed": 0, "transpose": transpose}
        inner, outer = (shape[-2], shape[-1]) if transpose else (shape[-1], shape[-2])
        assert ops.test_matrix(torch.empty(shape), q, **keywords).shape == (*shape[:-2], inner, q)
        out = ops.sketch(torch.empty(shape), q, **keywords)
        assert torch.equal(out, torch.zeros(*shape[:-2], outer, q))


def test_zero_columns() -> None:
    assert ops.sketch(torch.ones(4, 5), 0, seed=0).shape == (4, 0)
    assert ops.test_matrix(torch.ones(2, 4, 5), 0, seed=0).shape == (2, 5, 0)


WRONG: list[tuple[str, Tensor, int, dict[str, int], str]] = [
    ("q", torch.ones(4, 5), -1, {}, "given -1"),
    ("row", torch.ones(4, 5), 3, {"row": -1}, "given -1"),
    ("row", torch.ones(4, 5), 3, {"row": 2**32 - 4}, "given 4294967292"),
    ("column", torch.ones(4, 5), 3, {"column": -2}, "given -2"),
    ("column", torch.ones(4, 5), 3, {"column": 2**34 - 2}, "given 17179869182"),
    ("input", torch.ones(4), 3, {}, r"\(4,?\)"),
    ("input", torch.ones(4, 5, dtype=torch.int64), 3, {}, "float32, float64, bfloat16 or float16"),
    ("input", torch.ones(4, 5, dtype=torch.complex64), 3, {}, "float32, float64, bfloat16 or float16"),
]


@pytest.mark.parametrize(("name", "input", "q", "keywords", "words"), WRONG)
@pytest.mark.parametrize("op", ["sketch", "test_matrix"])
def test_errors(op: str, name: str, input: Tensor, q: int, keywords: dict[str, int], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{op}: {name}: given .*wanted") as caught:
        getattr(ops, op)(input, q, seed=0, **keywords)
    assert re.search(words, str(caught.value))
    with pytest.raises(RuntimeError, match=f"{op}: {name}: .*wanted"), torch.inference_mode():
        getattr(torch.ops.sculpt, op)(input, q, seed=0, **keywords)  # the C++ checks
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises((ValueError, TypeError), match=f"{op}: {name}: "):
        getattr(torch.ops.sculpt, op)(mode.from_tensor(input), q, seed=0, **keywords)


@pytest.mark.parametrize("transpose", [False, True])
def test_gradients(transpose: bool) -> None:
    matrix = gaussian(2, 5, 7).requires_grad_()

    def sketch(x: Tensor) -> Tensor:
        return ops.sketch(x, 4, seed=9, transpose=transpose, column=3)

    assert torch.autograd.gradcheck(sketch, (matrix,), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: sketch(x).square(), (matrix,))
    assert not ops.test_matrix(matrix, 4, seed=9).requires_grad
    with torch.no_grad():
        torch.testing.assert_close(sketch(matrix), sketch(matrix.detach()), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_gradient_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    matrix = gaussian(20, 30, dtype=dtype).requires_grad_()
    weight = gaussian(20, 6, dtype=F32, seed=4)
    (gradient,) = torch.autograd.grad((ops.sketch(matrix, 6, seed=9) * weight).sum(), matrix)
    assert gradient.dtype is dtype
    omega = ops.test_matrix(matrix, 6, seed=9)
    torch.testing.assert_close(gradient, (weight @ omega.mT).to(dtype))


def test_vmap_gives_every_matrix_the_test_matrix_of_its_place() -> None:
    batch = gaussian(3, 8, 12)
    wanted = ops.sketch(batch, 5, seed=2)
    for dim in range(3):
        moved = batch.movedim(0, dim)
        assert torch.equal(torch.func.vmap(lambda x: ops.sketch(x, 5, seed=2), in_dims=dim)(moved), wanted)
        omega = torch.func.vmap(lambda x: ops.test_matrix(x, 5, seed=2), in_dims=dim)(moved)
        assert torch.equal(omega, ops.test_matrix(batch, 5, seed=2))
    nested = torch.func.vmap(torch.func.vmap(lambda x: ops.sketch(x, 5, seed=2)))(batch.expand(2, 3, 8, 12))
    assert torch.equal(nested, ops.sketch(batch.expand(2, 3, 8, 12), 5, seed=2))


def test_torch_func_transforms() -> None:
    batch = gaussian(3, 8, 12)
    omega = ops.test_matrix(batch, 5, seed=2)

    def loss(x: Tensor) -> Tensor:
        return ops.sketch(x, 5, seed=2).square().sum()

    wanted = 2 * (batch @ omega) @ omega.mT
    for gradient in (torch.func.grad(loss), torch.func.vmap(torch.func.grad(loss))):
        torch.testing.assert_close(gradient(batch), wanted)
    value, tangent = torch.func.jvp(lambda x: ops.sketch(x, 5, seed=2), (batch,), (2 * batch,))
    torch.testing.assert_close(tangent, 2 * value)


@pytest.mark.parametrize("op", [SKETCH, TEST_MATRIX], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(op: Any, dtype: torch.dtype, requires_grad: bool) -> None:
    matrix = gaussian(2, 12, 20, dtype=dtype).requires_grad_(requires_grad)
    opcheck(op, (matrix, 7), {"seed": 5})
    opcheck(op, (matrix.detach().mT, 7), {"seed": 5, "transpose": True, "rademacher": True, "row": 2, "column": 3})


def both(x: Tensor) -> tuple[Tensor, Tensor]:
    return ops.sketch(x, 6, seed=3, transpose=True), ops.test_matrix(x, 6, seed=3, column=1)


def test_compile_and_export() -> None:
    matrix = gaussian(12, 20, dtype=F32)
    compiled: Callable[[Tensor], tuple[Tensor, Tensor]] = torch.compile(both, fullgraph=True, backend="aot_eager")

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return both(x)

    exported = torch.export.export(Module(), (matrix,))
    assert {node.target for node in exported.graph.nodes} >= {SKETCH, TEST_MATRIX}
    for out in (compiled(matrix), exported.module()(matrix)):
        assert all(torch.equal(a, b) for a, b in zip(out, both(matrix), strict=True))
    leaf = matrix.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(compiled(leaf)[0].square().sum(), leaf)
    (wanted,) = torch.autograd.grad(both(leaf)[0].square().sum(), leaf)
    torch.testing.assert_close(gradient, wanted)


def test_another_seed_or_width_is_not_compiled_anew() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, q, seed: ops.sketch(x, q, seed=seed), fullgraph=True, backend=counter)
    matrix, leaf = gaussian(12, 20, dtype=F32), gaussian(12, 20, dtype=F32, seed=2).requires_grad_()
    for q, seed in ((6, 3), (7, 4), (8, -5), (9, 2**40), (10, -(2**50))):
        assert torch.equal(compiled(matrix, q, seed), ops.sketch(matrix, q, seed=seed))
    assert counter.frame_count <= 2
    for q, seed in ((6, 3), (7, 4)):
        (gradient,) = torch.autograd.grad(compiled(leaf, q, seed).square().sum(), leaf)
        (wanted,) = torch.autograd.grad(ops.sketch(leaf, q, seed=seed).square().sum(), leaf)
        torch.testing.assert_close(gradient, wanted)
    assert counter.frame_count <= 3

"""Float32 numbers in two halves and stochastic rounding: exact to the bit, unbiased, a function of place and seed."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from sculpt_ops import _host, reference
from sculpt_ops.ops import rounding

from .accuracy import gaussian

OPS = torch.ops.sculpt
BF16, F32, I16, I32 = torch.bfloat16, torch.float32, torch.int16, torch.int32
LARGEST = torch.finfo(BF16).max
# All the bfloat16 numbers, in the upper half of an int32.
HIGH_BITS = torch.arange(-(2**15), 2**15, dtype=I32) << 16


def of_bits(bits: Tensor) -> Tensor:
    return bits.to(I32).view(F32)


def any_floats(*shape: int, seed: int = 0) -> Tensor:
    """Random bits, NaN, infinities and subnormals among them."""
    generator = torch.Generator().manual_seed(seed)
    return of_bits(torch.randint(-(2**31), 2**31, shape, generator=generator))


def empty_halves(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.empty(shape, dtype=BF16), torch.empty(shape, dtype=I16)


def halves_of(value: Tensor) -> tuple[Tensor, Tensor]:
    high, low = empty_halves(*value.shape)
    rounding.split_(value, high, low)
    return high, low


def round_stochastic(value: Tensor, seed: int, offset: int = 0) -> Tensor:
    return rounding.round_stochastic_(torch.empty_like(value, dtype=BF16), value, seed=seed, offset=offset)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether all bits agree, of NaN and signed zeros too."""
    integer = {2: I16, 4: I32}[a.element_size()]
    return a.dtype is b.dtype and torch.equal(a.view(integer), b.view(integer))


def layouts(x: Tensor) -> list[Tensor]:
    """Copies of a matrix: row-major, column-major, every second row and third column of a larger one."""
    m, n = x.shape
    sliced = x.new_zeros(2 * m, 3 * n)[::2, ::3]
    return [x.clone(), x.mT.contiguous().mT, sliced.copy_(x)]


@pytest.mark.parametrize("low_bits", [0, 1, 2, 0x7FFF, 0x8000, 0x8001, 0xABCD, 0xFFFF], ids=hex)
def test_halves_join_to_the_number_to_the_bit(low_bits: int) -> None:
    value = of_bits(HIGH_BITS | low_bits)
    high, low = halves_of(value)
    joined, number = rounding.join_halves(high, low), ~value.isnan()
    assert same_bits(joined[number], value[number])
    assert high.isnan().equal(~number)
    assert joined.isnan().equal(~number)
    twin_high, twin_low = empty_halves(*value.shape)
    reference.split_(value, twin_high, twin_low)
    assert same_bits(high, twin_high)
    assert same_bits(low, twin_low)
    assert same_bits(reference.join_halves(high, low), joined)


def test_the_upper_half_is_the_nearest_bfloat16_and_a_tie_goes_away_from_zero() -> None:
    value = any_floats(100_000)
    value = value[value.abs() < LARGEST]
    high, low = halves_of(value)
    tie = low == -(2**15)
    assert same_bits(high[~tie], value[~tie].to(BF16))
    ties = of_bits(HIGH_BITS | 0x8000)
    ties = ties[ties.abs() < LARGEST]
    high, low = halves_of(ties)
    assert (low == -(2**15)).all()
    assert (high.float().abs() > ties.abs()).all()


def test_what_rounds_to_infinity_joins_exactly() -> None:
    value = torch.tensor([torch.finfo(F32).max, -torch.finfo(F32).max, math.inf, -math.inf])
    high, low = halves_of(value)
    assert high.isinf().all()
    assert same_bits(rounding.join_halves(high, low), value)


@given(*[st.floats(width=32)] * 2)
@example(3.4028234663852886e38, 3.4028234663852886e38)
@example(math.inf, -math.inf)
@example(-0.0, 0.0)
@example(struct.unpack("f", struct.pack("I", 0x7FFFFFFF))[0], 0.0)
def test_a_step_is_float32_addition(value: float, step: float) -> None:
    start, update = torch.tensor(value), torch.tensor(step)
    high, low = halves_of(start)
    rounding.add_split_(high, low, update)
    joined = rounding.join_halves(high, low)
    if joined.isnan() or high.isnan():
        assert high.isnan()
        assert (start + update).isnan()
    else:
        assert same_bits(joined, start + update)


def test_a_thousand_small_steps_follow_float32_to_the_bit() -> None:
    master = gaussian(33, 65, dtype=F32)
    high, low = halves_of(master)
    generator = torch.Generator().manual_seed(1)
    for _ in range(1000):
        step = 1e-5 * torch.randn(master.shape, generator=generator)
        master += step
        rounding.add_split_(high, low, step)
    assert same_bits(rounding.join_halves(high, low), master)
    assert (high.float() - master).abs().max() <= 2**-8 * master.abs().max()


@pytest.mark.parametrize("shape", [(), (1,), (17,), (3, 1, 5), (130, 1001)], ids=str)
def test_the_kernels_are_their_twins_to_the_bit(shape: tuple[int, ...]) -> None:
    value, step = any_floats(*shape), gaussian(math.prod(shape), dtype=F32).view(shape)
    ours, twins = halves_of(value), empty_halves(*shape)
    reference.split_(value, *twins)
    rounding.add_split_(*ours, step)
    reference.add_split_(*twins, step)
    assert all(same_bits(a, b) for a, b in zip(ours, twins, strict=True))
    for seed, offset in ((0, 0), (-1, 1), (2**40 + 5, 7), (-(2**63), 2**35 - 9), (2**63 - 1, 2**62)):
        twin = reference.round_stochastic_(torch.empty(shape, dtype=BF16), value, seed=seed, offset=offset)
        assert same_bits(round_stochastic(value, seed, offset), twin)


def test_strides_do_not_change_the_result() -> None:
    value, step = any_floats(61, 83), gaussian(61, 83, dtype=F32)
    high, low = halves_of(value)
    joined, rounded = rounding.join_halves(high, low), round_stochastic(value, 3, 5)
    stepped = high.clone(), low.clone()
    rounding.add_split_(*stepped, step)
    for x, h, low_half, s in zip(*map(layouts, (value, high, low, step)), strict=True):
        for other in layouts(low):  # also each half in an order of its own
            assert same_bits(rounding.join_halves(h, other), joined)
        written = torch.zeros_like(h), torch.zeros_like(low_half)
        rounding.split_(x, *written)
        assert same_bits(written[0], high)
        assert same_bits(written[1], low)
        rounding.add_split_(h, low_half, s)
        assert same_bits(h, stepped[0])
        assert same_bits(low_half, stepped[1])
        for out in layouts(torch.zeros_like(rounded)):
            assert same_bits(rounding.round_stochastic_(out, x, seed=3, offset=5), rounded)
    assert rounding.join_halves(high.mT, low.mT).is_contiguous()
    row = value[:1].expand(61, 83)
    assert same_bits(round_stochastic(row, 3, 5), round_stochastic(row.contiguous(), 3, 5))


def test_memory_between_the_elements_is_not_written() -> None:
    high, low = torch.ones(40, 90, dtype=BF16), torch.ones(40, 90, dtype=I16)
    rounding.add_split_(high[::2, 1::3], low[::2, 1::3], gaussian(20, 30, dtype=F32))
    out = torch.ones(40, 90, dtype=BF16)
    rounding.round_stochastic_(out[::2, 1::3], gaussian(20, 30, dtype=F32), seed=1)
    for tensor in (high, low, out):
        changed = tensor != 1
        assert changed[::2, 1::3].any()
        changed[::2, 1::3] = False
        assert not changed.any()


def test_threads_do_not_change_the_result() -> None:
    value, step = any_floats(300_001), gaussian(300_001, dtype=F32)

    def run() -> list[Tensor]:
        high, low = halves_of(value)
        rounding.add_split_(high, low, step)
        return [high, low, rounding.join_halves(high, low), round_stochastic(value, 9, 3)]

    parallel = run()
    try:
        torch.set_num_threads(1)
        serial = run()
    finally:
        torch.set_num_threads(2)
    assert all(same_bits(a, b) for a, b in zip(parallel, serial, strict=True))


def test_stochastic_rounding_is_unbiased() -> None:
    """Of 400 000 draws, 50 seeds, the share that goes up is the dropped fraction; so the mean is the value."""
    bits = torch.tensor([0x3F800000, 0x3F800001, 0x3F804000, 0x3F808000, 0x3F80FFFF, 0x00001000, 0x00808001])
    bits = torch.cat((bits, bits + 0x3E000000))
    value = torch.cat((of_bits(bits), -of_bits(bits)))
    fraction = (value.view(I32) & 0xFFFF).double() / 2**16
    down, up = of_bits(value.view(I32) & -0x10000), of_bits((value.view(I32) & -0x10000) + 0x10000)
    count = torch.zeros(len(value), dtype=torch.float64)
    repeated = value.expand(8000, len(value)).contiguous()
    for seed in range(50):
        rounded = round_stochastic(repeated, seed).float()
        went_up = rounded == up
        assert (went_up | (rounded == down)).all()
        count += went_up.sum(0)
    n = 50 * len(repeated)
    assert ((count / n - fraction).abs() <= 5 * (fraction * (1 - fraction) / n).sqrt()).all()
    # Neighbours, within a draw and across draws, go up independently of each other.
    ups = (round_stochastic(torch.full((800_000,), 1 + 2**-8), 1) > 1).double() * 2 - 1
    for lag in (1, 2, 7, 8, 512):
        assert abs((ups[lag:] * ups[:-lag]).mean()) < 5 / len(ups) ** 0.5


def test_what_bfloat16_holds_never_changes() -> None:
    value = of_bits(HIGH_BITS)
    for seed in range(3):
        rounded = round_stochastic(value, seed)
        assert same_bits(rounded.float()[~value.isnan()], value[~value.isnan()])
        assert rounded.isnan().equal(value.isnan())


def test_no_finite_number_becomes_infinite_and_no_nan_is_lost() -> None:
    beyond = of_bits(torch.arange(0x7F7F0000, 0x7F800000))
    assert (round_stochastic(beyond, 1) == LARGEST).all()
    assert (round_stochastic(-beyond, 1) == -LARGEST).all()
    nan = of_bits(torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF]))
    assert nan.isnan().all()
    assert round_stochastic(nan, 1).isnan().all()
    infinite = torch.tensor([math.inf, -math.inf])
    assert torch.equal(round_stochastic(infinite, 1).float(), infinite)


def test_an_element_takes_its_bits_from_its_place_and_the_seed() -> None:
    seed, offset = -7, 2**35 - 3
    rounded = round_stochastic(of_bits(torch.full((2, 9), 0x3F805555)), seed, offset).flatten()
    for i in range(18):
        group, half = divmod(offset + i, 8)
        word = _host.philox((group % 2**32, group >> 32, 0, 1), seed)[half // 2]
        noise = word >> 16 if half % 2 else word & 0xFFFF
        assert rounded[i] == (1 + 2**-7 if 0x5555 + noise >= 2**16 else 1)


def test_shards_agree_with_the_whole() -> None:
    value = any_floats(40, 101)
    whole = round_stochastic(value, 5)
    for begin, end in ((0, 7), (7, 8), (8, 40)):
        assert same_bits(round_stochastic(value[begin:end], 5, begin * 101), whole[begin:end])
    others = [round_stochastic(value, seed) for seed in (6, 5 + 2**32, -5)]
    assert not any(same_bits(other, whole) for other in others)


@pytest.mark.parametrize("shape", [(0,), (3, 0, 5)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    high, low = empty_halves(*shape)
    rounding.split_(torch.empty(shape), high, low)
    rounding.add_split_(high, low, torch.empty(shape))
    assert rounding.join_halves(high, low).shape == shape
    assert round_stochastic(torch.empty(shape), 1).shape == shape


def test_the_cuda_kernels_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "triton_missing", lambda: "no triton")
    value, step = any_floats(12, 21), gaussian(12, 21, dtype=F32)
    (high, low), halves = halves_of(value), empty_halves(12, 21)
    rounding.split_cuda_(value, *halves)
    rounding.add_split_(high, low, step)
    rounding.add_split_cuda_(*halves, step)
    assert same_bits(rounding.join_cuda(*halves), rounding.join_halves(high, low))
    out = torch.empty(12, 21, dtype=BF16)
    rounding.round_stochastic_cuda_(out, value, seed=4, offset=1)
    assert same_bits(out, round_stochastic(value, 4, 1))
    with pytest.raises(ValueError, match="_add_split_: step: given memory shared with high"):
        rounding.add_split_cuda_(value.view(BF16)[:, :21], low, value)
    with pytest.raises(ValueError, match="_split_: low: given a tensor that overlaps itself"):
        rounding.split_cuda_(value, high, low[:1].expand(12, 21))
    with pytest.raises(ValueError, match="_round_stochastic_: value: given memory shared with out"):
        rounding.round_stochastic_cuda_(value.view(BF16)[:, :21], value, seed=1)


SHAPE = (4, 6)
HIGH, LOW, VALUE = torch.ones(SHAPE, dtype=BF16), torch.ones(SHAPE, dtype=I16), torch.ones(SHAPE)
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Tensor]]] = {
    "_join": (rounding.join_halves, {"high": HIGH, "low": LOW}),
    "_split_": (rounding.split_, {"value": VALUE, "high": HIGH, "low": LOW}),
    "_add_split_": (rounding.add_split_, {"high": HIGH, "low": LOW, "step": VALUE}),
    "_round_stochastic_": (
        lambda out, value, offset=0: rounding.round_stochastic_(out, value, seed=1, offset=offset),
        {"out": HIGH, "value": VALUE},
    ),
}
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("_join", {"high": HIGH.half()}, "high: .*bfloat16"),
    ("_join", {"low": LOW.int()}, "low: .*int16"),
    ("_join", {"low": LOW[1:]}, r"low: .*\(3, 6\)"),
    ("_split_", {"value": VALUE.double()}, "value: .*float32"),
    ("_split_", {"value": VALUE[0]}, r"value: .*\(6,?\)"),
    ("_split_", {"high": VALUE}, "high: .*bfloat16"),
    ("_add_split_", {"step": HIGH}, "step: .*float32"),
    ("_add_split_", {"step": VALUE.mT}, r"step: .*\(6, 4\)"),
    ("_add_split_", {"low": LOW[:, :1]}, r"low: .*\(4, 1\)"),
    ("_round_stochastic_", {"out": HIGH.half()}, "out: .*bfloat16"),
    ("_round_stochastic_", {"value": HIGH}, "value: .*float32"),
    ("_round_stochastic_", {"value": VALUE[:, 1:]}, r"value: .*\(4, 5\)"),
    ("_round_stochastic_", {"offset": -1}, "offset: .*given -1"),
    ("_round_stochastic_", {"offset": 2**62 + 1}, r"offset: .*2\^62"),
]
SHARED: list[tuple[str, dict[str, Tensor], str]] = [
    ("_split_", {"high": HIGH[:1].expand(SHAPE)}, "high: .*overlaps itself"),
    ("_split_", {"high": VALUE.view(BF16)[:, :6]}, "value: .*memory"),
    ("_split_", {"low": HIGH.view(I16)}, "low: .*memory"),
    ("_add_split_", {"low": LOW[:, :1].expand(SHAPE)}, "low: .*overlaps itself"),
    ("_add_split_", {"low": VALUE.view(I16)[:, 6:]}, "step: .*memory"),
    ("_round_stochastic_", {"out": HIGH[:1].expand(SHAPE)}, "out: .*overlaps itself"),
    ("_round_stochastic_", {"out": VALUE.view(BF16)[:, :6]}, "value: .*memory"),
]


def unwritten() -> bool:
    return all(bool((tensor == 1).all()) for tensor in (HIGH, LOW, VALUE))


@pytest.mark.parametrize(("op", "changes", "words"), WRONG + SHARED)
def test_errors(op: str, changes: dict[str, Any], words: str) -> None:
    call, arguments = CALLS[op]
    arguments = {**arguments, **changes}
    with pytest.raises((ValueError, TypeError, RuntimeError), match=f"{op}: {words}"):
        call(**arguments)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=f"{op}: {words}"):  # the C++ checks
        call(**arguments)
    assert unwritten()


@pytest.mark.parametrize(("op", "changes", "words"), WRONG)
def test_errors_while_tracing(op: str, changes: dict[str, Any], words: str) -> None:
    call, arguments = CALLS[op]
    with torch._subclasses.FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in (arguments | changes).items()}
        with pytest.raises((ValueError, TypeError), match=f"{op}: {words}"):
            call(**fake)


@pytest.mark.parametrize("op", CALLS)
def test_another_device_is_refused(op: str) -> None:
    call, arguments = CALLS[op]
    last = list(arguments)[-1]
    with pytest.raises(ValueError, match=rf"{op}: {last if op != '_split_' else 'low'}: given device meta, wanted"):
        call(**{**arguments, last: arguments[last].to("meta")})
    assert unwritten()


@pytest.mark.parametrize("op", CALLS)
def test_what_requires_grad_is_refused_before_anything_is_written(op: str) -> None:
    call, arguments = CALLS[op]
    for name in [name for name, tensor in arguments.items() if tensor.is_floating_point()]:
        leaf = arguments[name].clone().requires_grad_()
        with pytest.raises(RuntimeError, match=f"{op}: {name}: given a tensor that requires grad"):
            call(**{**arguments, name: leaf})
        dual = {k: v.clone() for k, v in arguments.items()}
        with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"{op}: .*tangent"):
            call(**{**dual, name: torch.autograd.forward_ad.make_dual(dual[name], dual[name].clone())})
    assert unwritten()
    leaf = HIGH.clone().requires_grad_()
    with torch.no_grad():
        rounding.add_split_(leaf, LOW.clone(), VALUE)
    assert (leaf.detach() == 2).all()


def test_version_counters_move() -> None:
    high, low = halves_of(VALUE)
    versions = high._version, low._version
    rounding.add_split_(high, low, VALUE)
    rounding.split_(VALUE, high, low)
    assert (high._version, low._version) == (versions[0] + 2, versions[1] + 2)
    rounding.round_stochastic_(high, VALUE, seed=1)
    assert high._version == versions[0] + 3


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(transposed: bool) -> None:
    value, step = gaussian(7, 9, dtype=F32), gaussian(7, 9, dtype=F32, seed=1)
    high, low = halves_of(value)
    value, step, high, low = (t.mT if transposed else t for t in (value, step, high, low))
    opcheck(OPS._join.default, (high, low))
    opcheck(OPS._split_.default, (value, high.clone(), low.clone()))
    opcheck(OPS._add_split_.default, (high.clone(), low.clone(), step))
    opcheck(OPS._round_stochastic_.default, (high.clone(), value), {"seed": 3, "offset": 2})


def step_and_round(high: Tensor, low: Tensor, step: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    high, low = high.clone(), low.clone()
    rounding.add_split_(high, low, step * 2)
    master = rounding.join_halves(high, low)
    rounding.split_(master * 2, high, low)
    return high, low, rounding.round_stochastic_(torch.empty_like(high), master, seed=seed)


def test_compile_and_export() -> None:
    step = gaussian(12, 20, dtype=F32)
    high, low = halves_of(gaussian(12, 20, dtype=F32, seed=1))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step_and_round, fullgraph=True, backend=counter)
    for seed in (3, 4, -5, 2**40, -(2**50)):
        wanted = step_and_round(high, low, step, seed)
        assert all(same_bits(a, b) for a, b in zip(compiled(high, low, step, seed), wanted, strict=True))
    assert counter.frame_count <= 2  # another seed is not compiled anew

    class Module(torch.nn.Module):
        def forward(self, high: Tensor, low: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return step_and_round(high, low, step, 3)

    exported: Any = torch.export.export(Module(), (high, low, step))
    wanted = step_and_round(high, low, step, 3)
    assert all(same_bits(a, b) for a, b in zip(exported.module()(high, low, step), wanted, strict=True))

# mypy: allow-untyped-defs, allow-incomplete-defs
"""Products of tiles that keep fp32 coefficients accurate on 16-bit tensor cores.

A 16-bit G is exact in its own dtype, so only the fp32 factor is split, x = high + low with both halves in that dtype:
one more tensor-core product instead of the three TF32 ones (six times the time of one bf16 product) that float32 inputs
would take. The error is 2^-17 of the factor for bfloat16, 2^-22 for float16.
"""

import triton
import triton.language as tl

__all__ = ["coefficient_dtype", "high_low", "product"]


@triton.jit
def high_low(x, dtype: tl.constexpr):
    """fp32 `x` as high + low in `dtype`. Where high is Inf or NaN, low is 0: Inf - Inf would turn an Inf into a NaN."""
    high = x.to(dtype)
    rounded = high.to(tl.float32)
    low = tl.where(tl.abs(rounded) < float("inf"), x - rounded, 0.0)
    return high, low.to(dtype)


@triton.jit
def product(a, b, acc, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b in fp32, on tensor cores of `dtype`; an operand of another dtype is split (16-bit) or cast (fp32).

    Both operands fp32 and `dtype` 16-bit: low times low, 2^-34 of the result, is left out.
    """
    if dtype == tl.float32:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    elif a.dtype == dtype:
        if b.dtype == dtype:
            acc = tl.dot(a, b, acc)
        else:
            b_high, b_low = high_low(b, dtype)
            acc = tl.dot(a, b_low, acc)
            acc = tl.dot(a, b_high, acc)
    else:
        a_high, a_low = high_low(a, dtype)
        if b.dtype == dtype:
            acc = tl.dot(a_low, b, acc)
            acc = tl.dot(a_high, b, acc)
        else:
            b_high, b_low = high_low(b, dtype)
            acc = tl.dot(a_low, b_high, acc)
            acc = tl.dot(a_high, b_low, acc)
            acc = tl.dot(a_high, b_high, acc)
    return acc


@triton.constexpr_function
def coefficient_dtype(dtype):
    """The dtype in which coefficients are multiplied: float16 would overflow, since L^T G may exceed 65504."""
    return tl.bfloat16 if dtype == tl.bfloat16 else tl.float32

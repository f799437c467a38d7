// Random numbers addressed by a counter: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as
// 1, 2, 3", SC'11). Host and device; sculpt_ops/philox.py and triton_kernels/philox.py compute the same numbers.
//
// Four words a, b, c, d give four numbers: Rademacher 1 - 2 (top bit) of each, or normals by Box-Muller of the pairs
// (a, b) and (c, d), from the upper 24 bits of a word, so that the conversion to float is exact:
//   radius = sqrt(-2 ln(((a >> 8) + 1) 2^-24)), at most 5.77;  turns = (b >> 8) 2^-24
//   first = radius cos(2 pi turns),  second = radius sin(2 pi turns)
// Logarithm, cosine and sine are the polynomials below, every product and sum rounded by itself (no fused multiply-add),
// the square root correctly rounded: the normals are then the same to the bit on every device. A last bit that differed
// would be 2^-9 after rounding to bfloat16.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/bits.h"

// No option of nvcc changes the intrinsics. On the host, a file that asks for normals forbids the compiler to fuse (see
// cpu/test_matrix.cpp).
#if defined(__CUDA_ARCH__)
#define SCULPT_MUL(a, b) __fmul_rn(a, b)
#define SCULPT_ADD(a, b) __fadd_rn(a, b)
#define SCULPT_SQRT(a) __fsqrt_rn(a)
#else
#define SCULPT_MUL(a, b) ((a) * (b))
#define SCULPT_ADD(a, b) ((a) + (b))
#define SCULPT_SQRT(a) sqrtf(a)
#endif

namespace sculpt {

struct Words {
  uint32_t a, b, c, d;
};

struct Key {
  uint32_t low, high;
  SCULPT_HOST_DEVICE static Key of(int64_t seed) { return {uint32_t(seed), uint32_t(uint64_t(seed) >> 32)}; }
};

SCULPT_HOST_DEVICE inline Words philox(Words x, Key key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t even = uint64_t(0xD2511F53u) * x.a, odd = uint64_t(0xCD9E8D57u) * x.c;
    x = {uint32_t(odd >> 32) ^ x.b ^ key.low, uint32_t(odd), uint32_t(even >> 32) ^ x.d ^ key.high, uint32_t(even)};
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
  return x;
}

SCULPT_HOST_DEVICE inline float rademacher(uint32_t word) { return word >> 31 ? -1.0f : 1.0f; }

// Horner's rule, highest power first.
template <class... Rest>
SCULPT_HOST_DEVICE inline float polynomial(float x, float first, Rest... rest) {
  float value = first;
  ((value = SCULPT_ADD(SCULPT_MUL(value, x), rest)), ...);
  return value;
}

// -2 ln(((word >> 8) + 1) 2^-24): the integer is 2^(exponent + 24) (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
SCULPT_HOST_DEVICE inline float squared_radius(uint32_t word) {
  const float integer = float(int32_t(word >> 8) + 1);
  const uint32_t bits = bits_of(integer) - 0x3f3504f3u;  // sqrt(1/2)
  const float f = SCULPT_ADD(float_of((bits & 0x7fffffu) + 0x3f3504f3u), -1.0f);
  const float exponent = float(int32_t(bits >> 23) - 24);
  const float log1p = SCULPT_MUL(f, polynomial(f, 7.0376836292e-2f, -1.1514610310e-1f, 1.1676998740e-1f,
                                               -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f, 2.0000714765e-1f,
                                               -2.4999993993e-1f, 3.3333331174e-1f, -0.5f, 1.0f));
  return SCULPT_MUL(-2.0f, SCULPT_ADD(SCULPT_MUL(exponent, 0.69314718f), log1p));
}

// The angle is a multiple of a quarter turn plus x in [-pi/4, pi/4).
SCULPT_HOST_DEVICE inline void normals(uint32_t a, uint32_t b, float& first, float& second) {
  const int32_t turns = int32_t(b >> 8), quarter = (turns + (1 << 21)) >> 22;
  const float x = SCULPT_MUL(float(turns - (quarter << 22)), 3.7450703e-7f);  // 2 pi 2^-24
  const float xx = SCULPT_MUL(x, x);
  const float sine =
      SCULPT_MUL(x, polynomial(xx, -1.9515295891e-4f, 8.3321608736e-3f, -1.6666654611e-1f, 1.0f));
  const float cosine =
      polynomial(xx, 2.443315711809948e-5f, -1.388731625493765e-3f, 4.166664568298827e-2f, -0.5f, 1.0f);
  const bool swap = quarter & 1;
  const float along = swap ? sine : cosine, across = swap ? cosine : sine;
  const float radius = SCULPT_SQRT(squared_radius(a));
  first = SCULPT_MUL(radius, SCULPT_MUL(along, float(1 - ((quarter + 1) & 2))));
  second = SCULPT_MUL(radius, SCULPT_MUL(across, float(1 - (quarter & 2))));
}

}  // namespace sculpt

#undef SCULPT_MUL
#undef SCULPT_ADD
#undef SCULPT_SQRT

// A float32 number as a bfloat16 and 16 more bits, and rounding to bfloat16, stochastic too. Host and device;
// sculpt_ops/reference.py and triton_kernels/rounding.py compute the same bits.
#pragma once
#include "common/bits.h"
#include "common/philox.h"

namespace sculpt {

SCULPT_HOST_DEVICE inline uint32_t magnitude(uint32_t bits) { return bits & 0x7fffffffu; }
SCULPT_HOST_DEVICE inline bool is_nan(uint32_t bits) { return magnitude(bits) > 0x7f800000u; }

// To bfloat16, a tie to the even one.
SCULPT_HOST_DEVICE inline uint16_t nearest(float value) {
  const uint32_t bits = bits_of(value);
  return uint16_t(is_nan(bits) ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

struct Halves {
  uint16_t high;  // bfloat16, the nearest to the number; a tie goes away from zero
  int16_t low;    // what the number's bits have more, or less where `high` was rounded up
};

SCULPT_HOST_DEVICE inline float join(uint16_t high, int16_t low) {
  return float_of((uint32_t(high) << 16) + uint32_t(int32_t(low)));
}

// A NaN would lose its payload (0x7f800001 gives infinity) or carry into the sign (0x7fffffff gives -0).
SCULPT_HOST_DEVICE inline Halves split(float value) {
  const uint32_t bits = bits_of(value), quiet = bits >> 16 | 0x40u;
  const bool nan = is_nan(bits);
  return {uint16_t(nan ? quiet : (bits + 0x8000u) >> 16), int16_t(nan ? 0u : bits)};
}

// Eight elements share one draw, element i the counter i / 8. The last word tells it from a test matrix's, which is 0.
SCULPT_HOST_DEVICE inline Words rounding_words(int64_t group, Key key) {
  return philox({uint32_t(group), uint32_t(uint64_t(group) >> 32), 0, 1}, key);
}

// `noise` is uniform on 0 to 2^16 - 1: the chance to go up is the dropped fraction. From the largest bfloat16 on a
// number is truncated, so that none becomes infinite.
SCULPT_HOST_DEVICE inline uint16_t round_stochastic(float value, uint16_t noise) {
  const uint32_t bits = bits_of(value), truncated = bits >> 16 | (is_nan(bits) ? 0x40u : 0u);
  return uint16_t(magnitude(bits) < 0x7f7f0000u ? (bits + noise) >> 16 : truncated);
}

}  // namespace sculpt

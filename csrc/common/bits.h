// The bits of a float, on host and device.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define SCULPT_HOST_DEVICE __host__ __device__
#else
#define SCULPT_HOST_DEVICE
#endif

namespace sculpt {

SCULPT_HOST_DEVICE inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

SCULPT_HOST_DEVICE inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

}  // namespace sculpt

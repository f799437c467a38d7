// float16 as the kernels use it: pairs from and to float32, rounded to the nearest.
#pragma once
#include "cuda_runtime_api.h"

struct alignas(4) __half2 {
  _Float16 x, y;
};

inline __half2 __floats2half2_rn(float x, float y) { return {static_cast<_Float16>(x), static_cast<_Float16>(y)}; }
inline float2 __half22float2(__half2 pair) { return {static_cast<float>(pair.x), static_cast<float>(pair.y)}; }

// A column of a small matrix in the registers of a warp. Sums are the same to the bit in every lane and every time.
#pragma once
#include <cuda_runtime.h>

namespace sculpt {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ float sum_of(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;  // the same bits in every lane: sums of the same two numbers at each step
}

// The larger value and its index, the lower index of equal ones.
__device__ void best_of(float& value, int& index) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, value, step);
    const int at = __shfl_xor_sync(kAllLanes, index, step);
    if (other > value || (other == value && at < index)) value = other, index = at;
  }
}

// A column across a warp: lane l has rows l, l + 32, ...; zeros beyond q.
template <int CHUNKS>
struct Column {
  float x[CHUNKS];

  __device__ void load(const float* from, int lane, int q) {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) x[i] = 32 * i + lane < q ? from[32 * i + lane] : 0.0f;
  }
  __device__ void store(float* to, int lane, int q) const {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i)
      if (32 * i + lane < q) to[32 * i + lane] = x[i];
  }
  // This lane's part.
  __device__ float dot(const Column& other) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) sum = fmaf(x[i], other.x[i], sum);
    return sum;
  }
  __device__ void subtract(float factor, const Column& other) {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) x[i] = fmaf(-factor, other.x[i], x[i]);
  }
  __device__ void divide(float by) {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) x[i] /= by;
  }
  // Zeros above row k; `at_k` there.
  __device__ void from_row(int k, float at_k, int lane) {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      const int row = 32 * i + lane;
      x[i] = row < k ? 0.0f : row == k ? at_k : x[i];
    }
  }
  __device__ float square_from(int k, int lane) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) sum = fmaf(x[i], 32 * i + lane >= k ? x[i] : 0.0f, sum);
    return sum_of(sum);
  }
};

}  // namespace sculpt

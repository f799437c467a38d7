// AdamW's elementwise work before its steps are projected, for all tensors of a list in one launch.
//
// Moves: gradient, moments and what decays read, moments and step written: 28 bytes an element in float32, 14 all in
// bfloat16. Computes about 15 operations an element, a square root and two divisions among them, far
// below what the memory allows. The tensors' places travel as a kernel argument: nothing is copied to the device before
// the launch, and a CUDA graph that holds the launches follows `lr` and `counts` on the device, which are read where they
// are. What is on the host travels with the table.
//
// Its tests passed on an H200 (torch 2.11, CUDA 13.0). No element depends on another: the same to the bit every time. Not
// to the bit the CPU's: products and sums are fused here.
#include "cuda/adam.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "common/adam.h"
#include "common/adam_chunks.h"
#include "common/rounding.h"
#include "cuda/runs.h"

namespace sculpt {
namespace {

constexpr int kThreads = 256;

struct Table {
  AdamEntry entries[kAdamEntries];
  AdamChunks chunks;
  AdamSettings settings;
};
// What a launch may pass; above 4096 since CUDA 12.1.
static_assert(sizeof(Table) <= 32764);

__global__ void __launch_bounds__(kAdamEntries) count_steps(const __grid_constant__ Table table) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < table.chunks.entries && table.entries[i].count) *table.entries[i].count += 1.0f;
}

constexpr int kEight = 8;  // elements that a thread takes at a time: 16 bytes of bfloat16
static_assert(kAdamChunk % kEight == 0);

struct Eight {
  float x[kEight];
};

__device__ Eight widened(const void* from, int64_t at, bool half) {
  Eight out;
  if (half) {
    const uint4 bits = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(from) + at);
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int k = 0; k < kEight; ++k) out.x[k] = float_of(k % 2 ? words[k / 2] & 0xffff0000u : words[k / 2] << 16);
    return out;
  }
#pragma unroll
  for (int k = 0; k < kEight; k += 4) {
    const float4 four = *reinterpret_cast<const float4*>(static_cast<const float*>(from) + at + k);
    out.x[k] = four.x, out.x[k + 1] = four.y, out.x[k + 2] = four.z, out.x[k + 3] = four.w;
  }
  return out;
}

__device__ Eight joined(const void* high, const int16_t* low, int64_t at) {
  const uint4 highs = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(high) + at);
  const uint4 lows = *reinterpret_cast<const uint4*>(low + at);
  const uint32_t h[4] = {highs.x, highs.y, highs.z, highs.w}, l[4] = {lows.x, lows.y, lows.z, lows.w};
  Eight out;
#pragma unroll
  for (int k = 0; k < kEight; ++k) out.x[k] = join(uint16_t(h[k / 2] >> 16 * (k % 2)), int16_t(l[k / 2] >> 16 * (k % 2)));
  return out;
}

__device__ float widened_one(const void* from, int64_t at, bool half) {
  return half ? float_of(uint32_t(static_cast<const uint16_t*>(from)[at]) << 16) : static_cast<const float*>(from)[at];
}

__device__ void store(void* to, int64_t at, bool half, const Eight& value) {
  const auto& x = value.x;
  if (half) {
    const auto pair = [&](int k) { return uint32_t(nearest(x[k])) | uint32_t(nearest(x[k + 1])) << 16; };
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(to) + at) = make_uint4(pair(0), pair(2), pair(4), pair(6));
    return;
  }
#pragma unroll
  for (int k = 0; k < kEight; k += 4)
    *reinterpret_cast<float4*>(static_cast<float*>(to) + at + k) = make_float4(x[k], x[k + 1], x[k + 2], x[k + 3]);
}

__device__ void store_one(void* to, int64_t at, bool half, float value) {
  if (half)
    static_cast<uint16_t*>(to)[at] = nearest(value);
  else
    static_cast<float*>(to)[at] = value;
}

__device__ void step_one(const AdamEntry& entry, int64_t at, const AdamStep& step) {
  const bool half = entry.half_moments;
  float first = widened_one(entry.first, at, half), second = widened_one(entry.second, at, half);
  float out = adam_direction(widened_one(entry.grad, at, entry.half_grad), first, second, step);
  if (entry.weight) {
    float value = entry.low ? join(static_cast<const uint16_t*>(entry.weight)[at], entry.low[at])
                            : widened_one(entry.weight, at, entry.half_weight);
    if (entry.start) value -= widened_one(entry.start, at, entry.half_weight);
    out -= step.decay * value;
  }
  store_one(entry.first, at, half, first);
  store_one(entry.second, at, half, second);
  store_one(entry.out, at, entry.half_out, out);
}

__device__ void step_eight(const AdamEntry& entry, int64_t at, const AdamStep& step) {
  const bool half = entry.half_moments;
  const Eight grad = widened(entry.grad, at, entry.half_grad);
  Eight first = widened(entry.first, at, half), second = widened(entry.second, at, half), out, value{};
  if (entry.weight) {
    value = entry.low ? joined(entry.weight, entry.low, at) : widened(entry.weight, at, entry.half_weight);
    if (entry.start) {
      const Eight start = widened(entry.start, at, entry.half_weight);
#pragma unroll
      for (int k = 0; k < kEight; ++k) value.x[k] -= start.x[k];
    }
  }
#pragma unroll
  for (int k = 0; k < kEight; ++k) out.x[k] = adam_direction(grad.x[k], first.x[k], second.x[k], step);
  if (entry.weight) {
#pragma unroll
    for (int k = 0; k < kEight; ++k) out.x[k] -= step.decay * value.x[k];
  }
  store(entry.first, at, half, first);
  store(entry.second, at, half, second);
  store(entry.out, at, entry.half_out, out);
}

// Whether eight elements of every tensor are read at once, 16 bytes at a time.
__device__ bool in_eights(const AdamEntry& entry) {
  const auto at = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  return (at(entry.grad) | at(entry.first) | at(entry.second) | at(entry.out) | at(entry.weight) | at(entry.low) |
          at(entry.start)) % 16 == 0;
}

__global__ void __launch_bounds__(kThreads) step_all(const __grid_constant__ Table table) {
  const int which = table.chunks.entry_of(blockIdx.x);
  const AdamEntry& entry = table.entries[which];
  __shared__ AdamStep shared;
  if (threadIdx.x == 0) {
    const AdamSettings& s = table.settings;
    const double lr = s.lr == nullptr ? s.lr_value
                      : s.lr_double   ? *static_cast<const double*>(s.lr)
                                      : double(*static_cast<const float*>(s.lr));
    const float count = entry.count ? *entry.count : entry.count_value;
    shared = AdamStep::of(lr, s.beta1, s.beta2, s.eps, s.weight_decay, s.maximize, count);
  }
  __syncthreads();
  const AdamStep step = shared;
  const int64_t begin = table.chunks.begin(which, blockIdx.x);
  const int64_t end = begin + kAdamChunk < entry.numel ? begin + kAdamChunk : entry.numel;
  const int64_t eights = in_eights(entry) ? end - (end - begin) % kEight : begin;
  for (int64_t at = begin + kEight * threadIdx.x; at < eights; at += kEight * kThreads) step_eight(entry, at, step);
  for (int64_t at = eights + threadIdx.x; at < end; at += kThreads) step_one(entry, at, step);
}

}  // namespace

cudaError_t adam(const AdamEntry* entries, int64_t n, const AdamSettings& settings, cudaStream_t stream) {
  for (int64_t done = 0; done < n;) {
    Table table;
    table.settings = settings;
    table.chunks = AdamChunks{};
    bool counts = false;
    while (done < n && table.chunks.add(entries[done].numel)) {
      table.entries[table.chunks.entries - 1] = entries[done];
      counts = counts || entries[done].count;
      ++done;
    }
    if (table.chunks.entries == 0) return cudaErrorInvalidValue;
    if (counts) count_steps<<<1, kAdamEntries, 0, stream>>>(table);
    if (table.chunks.total() > 0)
      step_all<<<static_cast<unsigned>(table.chunks.total()), kThreads, 0, stream>>>(table);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

bool adam_runs() { return has_code(step_all); }

}  // namespace sculpt

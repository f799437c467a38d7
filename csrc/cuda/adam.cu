// AdamW's elementwise work before its steps are projected, for all tensors of a list in one launch.
//
// Moves: gradient, moments and what decays read, moments and step written: 28 bytes an element in float32, 20 with
// bfloat16 gradient and weight. Computes about 15 operations an element, a square root and two divisions among them, far
// below what the memory allows. The tensors' places travel as a kernel argument: nothing is copied to the device before
// the launch, and a CUDA graph that holds the launches follows `lr` and `counts` on the device, which are read where they
// are. What is on the host travels with the table.
//
// Tests passed on an H200 (torch 2.11, CUDA 13.0). No element depends on another: the same to the bit every time. Not to
// the bit the CPU's: products and sums are fused here.
#include "cuda/adam.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "common/adam.h"
#include "common/adam_chunks.h"
#include "common/rounding.h"

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

__device__ float4 widened(const void* from, int64_t at, bool half) {
  if (!half) return *reinterpret_cast<const float4*>(static_cast<const float*>(from) + at);
  const uint2 bits = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(from) + at);
  return make_float4(float_of(bits.x << 16), float_of(bits.x & 0xffff0000u), float_of(bits.y << 16),
                     float_of(bits.y & 0xffff0000u));
}

__device__ float widened_one(const void* from, int64_t at, bool half) {
  return half ? float_of(uint32_t(static_cast<const uint16_t*>(from)[at]) << 16) : static_cast<const float*>(from)[at];
}

__device__ void step_one(const AdamEntry& entry, int64_t at, const AdamStep& step) {
  float first = entry.first[at], second = entry.second[at];
  float out = adam_direction(widened_one(entry.grad, at, entry.half_grad), first, second, step);
  if (entry.weight) {
    float value = entry.low ? join(static_cast<const uint16_t*>(entry.weight)[at], entry.low[at])
                            : widened_one(entry.weight, at, entry.half_weight);
    if (entry.start) value -= widened_one(entry.start, at, entry.half_weight);
    out -= step.decay * value;
  }
  entry.first[at] = first;
  entry.second[at] = second;
  entry.out[at] = out;
}

__device__ void step_four(const AdamEntry& entry, int64_t at, const AdamStep& step) {
  const float4 grad = widened(entry.grad, at, entry.half_grad);
  auto* firsts = reinterpret_cast<float4*>(entry.first + at);
  auto* seconds = reinterpret_cast<float4*>(entry.second + at);
  float4 first = *firsts, second = *seconds, out;
  out.x = adam_direction(grad.x, first.x, second.x, step);
  out.y = adam_direction(grad.y, first.y, second.y, step);
  out.z = adam_direction(grad.z, first.z, second.z, step);
  out.w = adam_direction(grad.w, first.w, second.w, step);
  if (entry.weight) {
    float4 value;
    if (entry.low) {
      const uint2 high = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(entry.weight) + at);
      const uint2 low = *reinterpret_cast<const uint2*>(entry.low + at);
      value.x = join(uint16_t(high.x), int16_t(low.x)), value.y = join(uint16_t(high.x >> 16), int16_t(low.x >> 16));
      value.z = join(uint16_t(high.y), int16_t(low.y)), value.w = join(uint16_t(high.y >> 16), int16_t(low.y >> 16));
    } else {
      value = widened(entry.weight, at, entry.half_weight);
    }
    if (entry.start) {
      const float4 start = widened(entry.start, at, entry.half_weight);
      value.x -= start.x, value.y -= start.y, value.z -= start.z, value.w -= start.w;
    }
    out.x -= step.decay * value.x, out.y -= step.decay * value.y;
    out.z -= step.decay * value.z, out.w -= step.decay * value.w;
  }
  *firsts = first;
  *seconds = second;
  *reinterpret_cast<float4*>(entry.out + at) = out;
}

// Whether four elements of every tensor are read at once: 16 bytes of float32, 8 of bfloat16.
__device__ bool in_fours(const AdamEntry& entry) {
  const auto at = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  const uintptr_t wide = at(entry.first) | at(entry.second) | at(entry.out) | (entry.half_grad ? 0 : at(entry.grad)) |
                         (entry.half_weight ? 0 : at(entry.weight) | at(entry.start));
  const uintptr_t narrow = at(entry.grad) | at(entry.weight) | at(entry.start) | at(entry.low);
  return wide % 16 == 0 && narrow % 8 == 0;
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
  const int64_t fours = in_fours(entry) ? end - (end - begin) % 4 : begin;
  for (int64_t at = begin + 4 * threadIdx.x; at < fours; at += 4 * kThreads) step_four(entry, at, step);
  for (int64_t at = fours + threadIdx.x; at < end; at += kThreads) step_one(entry, at, step);
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

bool adam_runs() {
  cudaFuncAttributes attributes;
  const bool runs = cudaFuncGetAttributes(&attributes, step_all) == cudaSuccess;
  if (!runs) cudaGetLastError();  // else the next launch would be blamed
  return runs;
}

}  // namespace sculpt

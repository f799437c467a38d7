// Steps added to the weights of a list in one launch: float32, bfloat16, bfloat16 with 16 more bits, and bfloat16 rounded
// stochastically.
//
// Moves: step and weight read, weight written: 12 bytes an element in float32, 8 in bfloat16, 12 with further bits. A
// thread takes eight elements at a time, which share one draw of Philox. Sums and integers alone: the same to the bit as
// on the CPU. Memory that starts at no multiple of 16 bytes, and the end of a tensor, go element by element.
//
// Tests passed on an H200. The optimizer does not use it yet.
#include "cuda/add_steps.h"

#include <cuda_runtime.h>

#include "common/adam_chunks.h"
#include "common/rounding.h"

namespace sculpt {
namespace {

constexpr int kThreads = 256;
constexpr int kEight = 8;  // elements of one draw
static_assert(kAdamChunk % kEight == 0);

struct Table {
  AddEntry entries[kAdamEntries];
  AdamChunks chunks;
  bool stochastic;
};
static_assert(sizeof(Table) <= 32764);

template <class T>
__device__ void read(const T* from, int count, bool wide, T (&to)[kEight]) {
  constexpr int kStride = 16 / sizeof(T);
  if (wide && count == kEight) {
#pragma unroll
    for (int k = 0; k < kEight; k += kStride)
      *reinterpret_cast<uint4*>(to + k) = *reinterpret_cast<const uint4*>(from + k);
    return;
  }
#pragma unroll
  for (int k = 0; k < kEight; ++k) to[k] = k < count ? from[k] : T(0);
}

template <class T>
__device__ void write(T* to, int count, bool wide, const T (&from)[kEight]) {
  constexpr int kStride = 16 / sizeof(T);
  if (wide && count == kEight) {
#pragma unroll
    for (int k = 0; k < kEight; k += kStride)
      *reinterpret_cast<uint4*>(to + k) = *reinterpret_cast<const uint4*>(from + k);
    return;
  }
#pragma unroll
  for (int k = 0; k < kEight; ++k)
    if (k < count) to[k] = from[k];
}

// Elements `at`, a multiple of eight, to at most at + 7.
__device__ void add_eight(const AddEntry& entry, int64_t at, int count, bool wide, bool stochastic) {
  alignas(16) float step[kEight];
  read(entry.step + at, count, wide, step);
  if (!entry.half) {
    alignas(16) float weight[kEight];
    float* const place = static_cast<float*>(entry.weight) + at;
    read<float>(place, count, wide, weight);
#pragma unroll
    for (int k = 0; k < kEight; ++k) weight[k] += step[k];
    write(place, count, wide, weight);
    return;
  }
  alignas(16) uint16_t weight[kEight];
  uint16_t* const place = static_cast<uint16_t*>(entry.weight) + at;
  read<uint16_t>(place, count, wide, weight);
  if (entry.low) {
    alignas(16) int16_t low[kEight];
    read<int16_t>(entry.low + at, count, wide, low);
#pragma unroll
    for (int k = 0; k < kEight; ++k) {
      const Halves halves = split(join(weight[k], low[k]) + step[k]);
      weight[k] = halves.high;
      low[k] = halves.low;
    }
    write(entry.low + at, count, wide, low);
  } else if (stochastic) {
    const Words words = rounding_words(at / kEight, entry.key);
    const uint32_t noise[kEight / 2] = {words.a, words.b, words.c, words.d};
#pragma unroll
    for (int k = 0; k < kEight; ++k)
      weight[k] = round_stochastic(step[k] + join(weight[k], 0), uint16_t(noise[k / 2] >> 16 * (k % 2)));
  } else {
#pragma unroll
    for (int k = 0; k < kEight; ++k) weight[k] = nearest(join(weight[k], 0) + step[k]);
  }
  write(place, count, wide, weight);
}

__global__ void __launch_bounds__(kThreads) add_all(const __grid_constant__ Table table) {
  const int which = table.chunks.entry_of(blockIdx.x);
  const AddEntry& entry = table.entries[which];
  const auto place = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  const bool wide = (place(entry.weight) | place(entry.low) | place(entry.step)) % 16 == 0;
  const int64_t begin = table.chunks.begin(which, blockIdx.x);
  const int64_t end = begin + kAdamChunk < entry.numel ? begin + kAdamChunk : entry.numel;
  for (int64_t at = begin + kEight * threadIdx.x; at < end; at += kEight * kThreads)
    add_eight(entry, at, static_cast<int>(end - at < kEight ? end - at : kEight), wide, table.stochastic);
}

}  // namespace

cudaError_t add_steps(const AddEntry* entries, int64_t n, bool stochastic, cudaStream_t stream) {
  for (int64_t done = 0; done < n;) {
    Table table;
    table.stochastic = stochastic;
    table.chunks = AdamChunks{};
    while (done < n && table.chunks.add(entries[done].numel)) {
      table.entries[table.chunks.entries - 1] = entries[done];
      ++done;
    }
    if (table.chunks.entries == 0) return cudaErrorInvalidValue;
    if (table.chunks.total() > 0)
      add_all<<<static_cast<unsigned>(table.chunks.total()), kThreads, 0, stream>>>(table);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace sculpt

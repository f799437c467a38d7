// CUDA kernels on the CPU: every thread of a block is a fiber that runs until it waits at a barrier or a shuffle. Warps
// take turns in an order that `emulated_order` chooses: a kernel that misses a barrier gives other bits in another order.
// Shared memory begins as NaN; writing behind its end and threads that meet at different barriers end the program.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime_api.h"

#define __device__
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
using std::isfinite;

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Index {
  unsigned x = 0;
};
inline Index threadIdx, blockIdx, blockDim;
inline float* emulated_shared;
inline int emulated_order;  // 0: warps ascending, 1: descending, otherwise the seed of a shuffle

namespace emulated {

constexpr int kLanes = 32, kStack = 1 << 16, kGuard = 64;
constexpr float kGuarded = 12345.0f;

struct Fiber {
  ucontext_t begin;
  jmp_buf here;
  bool started = false, done = false;
  std::vector<char> stack;
};
struct Warp {
  int arrived = 0;
  unsigned round = 0, values[2][kLanes];
};
struct Barrier {
  size_t arrived = 0;
  unsigned round = 0;
  int kind[2], sum[2];
};
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier barrier;
inline jmp_buf scheduler;
inline std::function<void()> body;

inline void fail(const char* why) { std::fprintf(stderr, "emulated kernel: %s\n", why), std::abort(); }

inline void yield() {
  const unsigned me = threadIdx.x;
  if (!_setjmp(fibers[me].here)) _longjmp(scheduler, 1);
}

inline int wait(int value, int kind) {
  const unsigned round = barrier.round, at = round & 1;
  if (barrier.arrived == 0) barrier.kind[at] = kind, barrier.sum[at] = 0;
  if (barrier.kind[at] != kind) fail("threads met at different barriers");
  barrier.sum[at] += value;
  if (++barrier.arrived == fibers.size())
    barrier.arrived = 0, ++barrier.round;
  else
    while (barrier.round == round) yield();
  return barrier.sum[at];
}

inline void begin() {
  body();
  fibers[threadIdx.x].done = true;
  _longjmp(scheduler, 1);
}

inline void resume(unsigned thread) {
  Fiber& fiber = fibers[thread];
  if (fiber.done) return;
  threadIdx.x = thread;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  fiber.stack.resize(kStack);
  getcontext(&fiber.begin);
  fiber.begin.uc_stack.ss_sp = fiber.stack.data();
  fiber.begin.uc_stack.ss_size = kStack;
  fiber.begin.uc_link = nullptr;
  makecontext(&fiber.begin, begin, 0);
  setcontext(&fiber.begin);
}

// Until all its lanes wait for the block.
inline void run_warp(int warp) {
  for (bool moved = true; moved;) {
    const auto state = [&] { return std::pair{warps[warp].round, barrier.arrived + (size_t(barrier.round) << 32)}; };
    const auto before = state();
    for (int lane = 0; lane < kLanes; ++lane) resume(kLanes * warp + lane);
    moved = state() != before;
  }
}

inline void launch(unsigned blocks, int threads, size_t bytes, std::function<void()> kernel) {
  body = std::move(kernel);
  blockDim.x = threads;
  std::mt19937 random(emulated_order);
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    std::vector<float> shared(bytes / sizeof(float), NAN);
    shared.resize(shared.size() + kGuard, kGuarded);
    emulated_shared = shared.data();
    fibers = std::vector<Fiber>(threads);
    warps = std::vector<Warp>(threads / kLanes);
    barrier = {};
    std::vector<int> order(warps.size());
    std::iota(order.begin(), order.end(), 0);
    if (emulated_order == 1) std::reverse(order.begin(), order.end());
    const auto done = [](const Fiber& fiber) { return fiber.done; };
    while (!std::all_of(fibers.begin(), fibers.end(), done)) {
      if (emulated_order > 1) std::shuffle(order.begin(), order.end(), random);
      for (const int warp : order) run_warp(warp);
    }
    for (int i = 1; i <= kGuard; ++i)
      if (shared[shared.size() - i] != kGuarded) fail("wrote behind its shared memory");
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(0, 0); }
inline int __syncthreads_or(int value) { return emulated::wait(value != 0, 1) != 0; }
inline int __syncthreads_count(int value) { return emulated::wait(value != 0, 2); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  static_assert(sizeof(T) == 4);
  emulated::Warp& warp = emulated::warps[threadIdx.x / emulated::kLanes];
  const unsigned lane = threadIdx.x % emulated::kLanes, round = warp.round;
  unsigned* values = warp.values[round & 1];
  std::memcpy(&values[lane], &value, 4);
  if (++warp.arrived == emulated::kLanes)
    warp.arrived = 0, ++warp.round;
  else
    while (warp.round == round) emulated::yield();
  std::memcpy(&value, &values[lane ^ mask], 4);
  return value;
}

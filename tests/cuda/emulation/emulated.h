// A GPU in slow motion, so that the kernels' own code runs without one: every thread of a cluster is a fiber, taken in a
// random order, warps at random speeds, and gives way at barriers and at the instructions of a whole warp. Shared memory
// begins as NaN, and cp.async copies nothing before it is waited for: a missing wait or barrier shows in the results.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <vector>

inline dim3 gridDim;

namespace emulated {

constexpr int kThreads = 256, kNap = 32;
constexpr size_t kStack = 64 * 1024, kShared = 232448;

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "emulation: %s\n", why);
  std::abort();
}

struct Barrier {
  int wanted = 0, come = 0, round = 0;
};

struct Copy {
  void* to;
  const void* from;
};

struct Warp {
  bool asleep = false;
  Barrier barrier;
  uint32_t address[32], a[32][4], b[32][2];
};

struct Block {
  dim3 index;
  int rank = 0;
  size_t bytes = 0;
  std::vector<unsigned char> memory;
  std::vector<float4> fixed = std::vector<float4>(kThreads);
  Barrier barrier;
  Warp warps[kThreads / 32];
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier barrier;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 thread;
  Block* block = nullptr;
  bool done = false;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
  int lane() const { return static_cast<int>(thread.x) % 32; }
  Warp& warp() const { return block->warps[thread.x / 32]; }
};

inline Fiber* current = nullptr;
inline Cluster* cluster = nullptr;
inline ucontext_t scheduler;
inline const std::function<void()>* body = nullptr;
inline int multiprocessors = 2;
inline int capability = 9;

inline void give_way() { swapcontext(&current->context, &scheduler); }

inline void wait(Barrier& barrier) {
  const int round = barrier.round;
  if (++barrier.come == barrier.wanted) {
    barrier.come = 0, ++barrier.round;
    return;
  }
  while (barrier.round == round) give_way();
}

inline void enter() {
  (*body)();
  if (!current->open.empty()) fail("a copy was never made part of a group");
  current->done = true;
  give_way();
}

inline unsigned char* in_block(int rank, uint32_t address, size_t size) {
  Block& block = *cluster->blocks.at(rank);
  if (address % size || address + size > block.bytes) fail("an address outside of shared memory, or not aligned");
  return block.memory.data() + address;
}

inline void run(const dim3& grid, int cluster_size, size_t bytes, const std::function<void()>& kernel) {
  if (grid.x % cluster_size) fail("a grid of no whole number of clusters");
  std::mt19937 random(0);
  std::vector<Fiber> fibers(static_cast<size_t>(cluster_size) * kThreads);
  for (Fiber& fiber : fibers) fiber.stack.reset(new char[kStack]);
  body = &kernel, gridDim = grid;
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; x += cluster_size) {
      Cluster now;
      now.barrier.wanted = cluster_size * kThreads;
      cluster = &now;
      for (int rank = 0; rank < cluster_size; ++rank) {
        auto block = std::make_unique<Block>();
        block->index = dim3(x + rank, y), block->rank = rank, block->bytes = bytes;
        block->memory.assign(kShared, 0xff);
        block->barrier.wanted = kThreads;
        for (Warp& warp : block->warps) warp.barrier.wanted = 32;
        now.blocks.push_back(std::move(block));
      }
      std::vector<Fiber*> order;
      for (size_t i = 0; i < fibers.size(); ++i) {
        Fiber& fiber = fibers[i];
        fiber.thread = dim3(i % kThreads), fiber.block = now.blocks[i / kThreads].get(), fiber.done = false;
        fiber.groups.clear();
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
        order.push_back(&fiber);
      }
      for (int turn = 0; !order.empty(); ++turn) {
        std::shuffle(order.begin(), order.end(), random);
        // Half of the warps sleep for a while: without it they would all be at the same place.
        if (turn % kNap == 0)
          for (auto& block : now.blocks)
            for (Warp& warp : block->warps) warp.asleep = random() % 2;
        for (Fiber* fiber : order) {
          if (fiber->warp().asleep) continue;
          current = fiber;
          swapcontext(&scheduler, &fiber->context);
        }
        order.erase(std::remove_if(order.begin(), order.end(), [](Fiber* f) { return f->done; }), order.end());
      }
    }
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  if (config->blockDim.x != kThreads || config->dynamicSmemBytes > kShared) return cudaErrorInvalidConfiguration;
  const int size = config->numAttrs ? static_cast<int>(config->attrs[0].val.clusterDim.x) : 1;
  const std::function<void()> kernel_body = [&] { kernel(static_cast<Parameters>(arguments)...); };
  run(config->gridDim, size, config->dynamicSmemBytes, kernel_body);
  return cudaSuccess;
}

inline cudaError_t device(int* index) { return *index = 0, cudaSuccess; }
inline cudaError_t attribute(int* value, cudaDeviceAttr name, int) {
  *value = name == cudaDevAttrMultiProcessorCount           ? multiprocessors
           : name == cudaDevAttrMaxSharedMemoryPerBlockOptin ? static_cast<int>(kShared)
                                                             : capability;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t set(Kernel*, cudaFuncAttribute, int) { return cudaSuccess; }
template <typename Kernel>
cudaError_t clusters(int* count, Kernel*, const cudaLaunchConfig_t* config) {
  return *count = std::max(1, multiprocessors / static_cast<int>(config->attrs[0].val.clusterDim.x)), cudaSuccess;
}

}  // namespace emulated

#undef __launch_bounds__
#define __launch_bounds__(...)
#define threadIdx (::emulated::current->thread)
#define blockIdx (::emulated::current->block->index)

#define __syncthreads() ::emulated::wait(::emulated::current->block->barrier)
#define __syncwarp() ::emulated::wait(::emulated::current->warp().barrier)
#define cudaLaunchKernelEx ::emulated::launch
#define cudaGetDevice ::emulated::device
#define cudaDeviceGetAttribute ::emulated::attribute
#define cudaFuncSetAttribute ::emulated::set
#define cudaOccupancyMaxActiveClusters ::emulated::clusters

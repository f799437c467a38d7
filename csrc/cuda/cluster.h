// Clusters of blocks and each other's shared memory. Below capability 9.0 there are none: a block stands alone.
#pragma once
#include <cooperative_groups.h>

#include <cstdint>

#include "cuda/mma.h"

namespace sculpt {

__device__ inline int cluster_size() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return static_cast<int>(cooperative_groups::this_cluster().num_blocks());
#else
  return 1;
#endif
}

__device__ inline int cluster_rank() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return static_cast<int>(cooperative_groups::this_cluster().block_rank());
#else
  return 0;
#endif
}

// Every thread of the cluster comes here before one goes on, and sees what the others wrote to shared memory; nothing is
// said of global memory. `cluster_group::sync` says it of that too, by a MEMBAR of the whole GPU, which waits until the
// panel before has been written; this compiles to one of the block.
__device__ inline void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "fence.release.sync_restrict::shared::cta.cluster;\n"
      "barrier.cluster.arrive.relaxed.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n"
      "fence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory");
#else
  __syncthreads();
#endif
}

// Elements 4 at to 4 at + 3 of the same array in the shared memory of another block.
__device__ inline float4 of_block(const float* array, int rank, int at) {
  uint32_t address = shared_address(array) + 16 * at;
  float4 x;
  // Addresses of 32 bits: generic ones, as `map_shared_rank` gives them, cost eight reads under way 16 registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
#else
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
#endif
  return x;
}

}  // namespace sculpt

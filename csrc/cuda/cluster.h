// Clusters of blocks and each other's shared memory: stores that announce themselves to a barrier there, barriers in shared
// memory, and the barrier of all.
#pragma once
#include <cooperative_groups.h>

#include <cstdint>

#include "cuda/mma.h"

namespace sculpt {

// The address in block `rank` of what lies at `address` in this one's shared memory.
__device__ inline uint32_t address_in(uint32_t address, uint32_t rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

// Sixteen bytes to `address`, counted by `barrier`; both of one block, `address_in` it.
__device__ inline void send(uint32_t address, uint32_t x, uint32_t y, uint32_t z, uint32_t w, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
               "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier)
               : "memory");
}

// A phase of the barrier ends when `count` threads arrived and all bytes that were expected have come.
__device__ inline void make_barrier(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// To arrive, and have `bytes` more expected.
__device__ inline void expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Until phase `parity` (0, 1, 0, ...) has ended, which threads of this block or its bulk copies end.
__device__ inline void wait_for(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nwait:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// The same for what other blocks sent: it is there then. An acquire of the cluster's scope says that of global memory too, by
// emptying L1 (CCTL.IVALL); this fence is of shared memory. Without that 4096 x 11008 at rank 64 took 74 us for 80 on an H200.
__device__ inline void wait_for_others(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nwait:\nmbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait;\n}\nfence.acquire.sync_restrict::shared::cluster.cluster;" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// A ring of barriers, used one after the other: which one, and in which phase it is.
struct Turn {
  int at = 0;
  uint32_t phase = 0;
  __device__ void next(int size) {
    if (++at == size) at = 0, phase ^= 1;
  }
};

// What this thread wrote to shared memory before, and what it waited for of others' stores, is seen by products
// and bulk copies after the next barrier.
__device__ inline void show_to_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Below capability 9.0 there are no clusters: a block stands alone.
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

// Hopper's bulk copies, boxes of a matrix between global and shared memory, and what goes with them. PTX ISA, sections
// "cp.async.bulk", "bar" and "stmatrix".
//
// Bulk copies read and write shared memory through the async proxy: what ordinary stores wrote is shown to them by
// `show_to_async` (cluster.h) of the writing threads and a barrier.
#pragma once
#include <cuda.h>

#include <cstdint>

#include "cuda/cluster.h"

namespace sculpt {

// A map in global memory is seen as the host has written it; before the first box of each.
__device__ inline void see_map(const CUtensorMap* map) {
  asm volatile("fence.proxy.tensormap::generic.acquire.sys [%0], 128;" ::"l"(map) : "memory");
}

// The box of the matrix that begins at (column, row) to `to`; zeros where the matrix ends. Counted by `barrier`, in full.
__device__ inline void load_box(uint32_t to, const CUtensorMap* map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// The other way; nothing is written where the matrix ends.
__device__ inline void store_box(const CUtensorMap* map, int column, int row, uint32_t from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(column),
               "r"(row), "r"(from)
               : "memory");
}

// This thread's boxes since the last call are a group.
__device__ inline void close_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until shared memory has been read by all groups but the newest `NEWER`.
template <int NEWER>
__device__ inline void wait_for_reads() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(NEWER) : "memory");
}

// `threads` threads of the block, whole warps, meet at barrier `id` (1 to 15).
__device__ inline void meet(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Four 8 x 8 blocks of 16-bit numbers to shared memory, as they are held or each transposed; addresses as in `load_four`.
__device__ inline void store_four(uint32_t row, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3])
               : "memory");
}

__device__ inline void store_four_transposed(uint32_t row, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3])
               : "memory");
}

}  // namespace sculpt

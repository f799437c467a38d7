// csrc/cuda/cluster.h for the emulation.
#pragma once
#include "cuda/mma.h"

namespace sculpt {

inline int cluster_size() { return static_cast<int>(emulated::cluster->blocks.size()); }
inline int cluster_rank() { return emulated::current->block->rank; }
inline void cluster_barrier() { emulated::wait(emulated::cluster->barrier); }

inline float4 of_block(const float* array, int rank, int at) {
  float4 x;
  std::memcpy(&x, emulated::in_block(rank, shared_address(array) + 16 * at, 16), 16);
  return x;
}

}  // namespace sculpt

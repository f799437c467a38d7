// How the elements of a list of tensors are dealt out to the blocks of one launch. Host and device.
#pragma once
#include <cstdint>

#include "common/bits.h"

namespace sculpt {

constexpr int kAdamEntries = 256;         // tensors a launch; the 224 matrices of LLaMA-2 7B are one
constexpr int64_t kAdamChunk = 1 << 14;   // elements a block: 64 a thread, for which the two powers of its step are paid
constexpr int64_t kAdamBlocks = (int64_t(1) << 31) - 1;  // of one launch

struct AdamChunks {
  int entries = 0;
  uint32_t first[kAdamEntries + 1] = {};  // of each entry the first block, and their number

  SCULPT_HOST_DEVICE int64_t total() const { return first[entries]; }

  // Whether there was room for one more tensor. An element count above 2^45 has none.
  bool add(int64_t numel) {
    const int64_t blocks = (numel + kAdamChunk - 1) / kAdamChunk;
    if (entries == kAdamEntries || total() + blocks > kAdamBlocks) return false;
    first[entries + 1] = uint32_t(total() + blocks);
    ++entries;
    return true;
  }

  // The entry of a block; empty tensors have none.
  SCULPT_HOST_DEVICE int entry_of(int64_t block) const {
    int low = 0, high = entries;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (int64_t(first[middle]) <= block)
        low = middle;
      else
        high = middle;
    }
    return low;
  }

  SCULPT_HOST_DEVICE int64_t begin(int entry, int64_t block) const { return (block - first[entry]) * kAdamChunk; }
};

}  // namespace sculpt

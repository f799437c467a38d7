// Scratch memory of the CPU ops, one per thread and use.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

namespace sculpt::cpu {

// Packed operands stay allocated between calls up to this size: fresh pages cost 0.5 to 2 us each, which is more than
// the arithmetic at small rank.
constexpr int64_t kRetainedBytes = 64 << 20;

class Arena {
 public:
  void* reserve(int64_t bytes) {
    if (bytes > size_) {
      release();
      size_ = bytes;
      data_ = std::aligned_alloc(64, size_t((bytes + 63) / 64 * 64));
      if (!data_) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_;
  }
  void trim() {
    if (size_ > kRetainedBytes) release();
  }
  ~Arena() { release(); }

 private:
  void release() {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }
  void* data_ = nullptr;
  int64_t size_ = 0;
};

// One set for every op: no two run on a thread at once.
inline thread_local Arena shared_arena, scratch_arena, coefficient_arena;

}  // namespace sculpt::cpu

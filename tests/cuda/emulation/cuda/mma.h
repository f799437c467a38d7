// csrc/cuda/mma.h for the emulation: the same functions, as the PTX ISA describes the instructions.
#pragma once
#include "emulated.h"

namespace sculpt {

using std::min;

inline uint32_t shared_address(const void* pointer) {
  // A block's arrays that are not there are never read, and may be said to begin beyond its memory.
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - emulated::current->block->memory.data());
}

inline void load_four(uint32_t (&x)[4], uint32_t row, bool transposed = false) {
  emulated::Warp& warp = emulated::current->warp();
  const int lane = emulated::current->lane();
  warp.address[lane] = row;
  emulated::wait(warp.barrier);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) {
      const int r = transposed ? 2 * (lane % 4) + j : lane / 4, c = transposed ? lane / 4 : 2 * (lane % 4) + j;
      const unsigned char* from = emulated::in_block(emulated::current->block->rank, warp.address[8 * matrix + r], 16);
      std::memcpy(&pair[j], from + 2 * c, 2);
    }
    x[matrix] = static_cast<uint32_t>(pair[1]) << 16 | pair[0];
  }
  // Eight rows in eight different groups of banks.
  for (int i = 0; i < 64; ++i)
    if (i / 8 != i % 8 && warp.address[8 * (lane / 8) + i / 8] != warp.address[8 * (lane / 8) + i % 8] &&
        warp.address[8 * (lane / 8) + i / 8] % 128 == warp.address[8 * (lane / 8) + i % 8] % 128)
      emulated::fail("a bank conflict");
  emulated::wait(warp.barrier);
}

inline void load_four_transposed(uint32_t (&x)[4], uint32_t row) { load_four(x, row, true); }

inline float half_of(uint32_t pair, int which) {
  const uint32_t bits = (which ? pair >> 16 : pair & 0xffff) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::Warp& warp = emulated::current->warp();
  const int lane = emulated::current->lane();
  std::memcpy(warp.a[lane], a, sizeof(a));
  warp.b[lane][0] = b0, warp.b[lane][1] = b1;
  emulated::wait(warp.barrier);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    float sum = 0.0f;
    for (int k = 0; k < 16; ++k) {
      const float x = half_of(warp.a[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)], k % 2);
      sum += x * half_of(warp.b[column * 4 + k % 8 / 2][k / 8], k % 2);
    }
    c[i] += sum;
  }
  emulated::wait(warp.barrier);
}

inline void copy_async(void* to, const void* from) {
  if ((reinterpret_cast<uintptr_t>(from) | shared_address(to)) % 16) emulated::fail("cp.async: not aligned");
  emulated::in_block(emulated::current->block->rank, shared_address(to), 16);
  emulated::current->open.push_back({to, from});
}

inline void close_group() {
  emulated::current->groups.push_back(std::move(emulated::current->open));
  emulated::current->open.clear();
}

template <int LATER>
void wait_for_groups() {
  auto& groups = emulated::current->groups;
  for (; groups.size() > LATER; groups.pop_front())
    for (const emulated::Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
}

}  // namespace sculpt

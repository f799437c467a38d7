// The rows of U that a block of the projection of one side has: in shared memory as operands of products, and some of them
// in registers.
#pragma once
#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

#include "common/side_panels.h"
#include "cuda/cluster.h"
#include "cuda/mma.h"

namespace sculpt {

__device__ inline uint32_t packed(float x, float y) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// What rounding to bfloat16 took from x.
__device__ inline float rest_of(float x) { return x - __bfloat162float(__float2bfloat16_rn(x)); }

// RANKS: padded. SPLIT: U is float32, and kept as two bfloat16 parts. `rows` of the block; `first`: those of U before them, of
// `length`; `r`: numbers of a row.
template <int RANKS, bool SPLIT>
struct SideBasis {
  // Columns lie in arrays of up to 64 beside each other.
  static constexpr int kWidth = RANKS < 64 ? RANKS : 64, kParts = SPLIT ? 2 : 1;
  using Number = std::conditional_t<SPLIT, float, uint16_t>;
  using Piece = Number[8];

  const Number* basis;
  int64_t first, length;
  int r, rows;
  // Of shared memory, and where that is for this thread; of the parts in it.
  uint32_t base;
  unsigned char* memory;
  uint32_t high, low;

  __device__ uint32_t end() const { return high + kParts * rows * RANKS * 2; }

  // Its rows from memory. Those of bfloat16 are all on their way together: one after the other, 4096 x 4096 took 33.5 us at
  // rank 64 on an H200 for 30.7.
  __device__ void load(int thread, int threads) const {
    constexpr int kPieces = SPLIT ? 2 : 1, kColumns = RANKS / 8;
    const int count = rows * kColumns;
    for (int begin = thread; begin < count; begin += kPieces * threads) {
      if constexpr (!SPLIT) {
        const int row = begin / kColumns, column = begin % kColumns * 8;
        if (whole(row, column)) {
          copy_async(high + place(row, column), from(row, column));
          continue;
        }
      }
      Piece pieces[kPieces];
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        const int i = begin + j * threads;
        read(i / kColumns, i % kColumns * 8, pieces[j]);
      }
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        const int i = begin + j * threads;
        if (i < count) write(i / kColumns, i % kColumns * 8, pieces[j]);
      }
    }
    if constexpr (!SPLIT) {
      close_group();
      wait_for_groups<0>();
    }
    show_to_async();
  }

  // A tile as the first operand of products, in registers: of 16 columns each a lane's four pairs of numbers.
  __device__ void hold(int tile, int part, int thread, uint32_t (&held)[RANKS / 16][4]) const {
    const int row = kTile * tile + 16 * (thread / 32) + thread % 32 / 4;
#pragma unroll
    for (int k = 0; k < RANKS / 16; ++k)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = 16 * k + 2 * (thread % 4) + j / 2 * 8;
        held[k][j] = in<const uint32_t>((part ? low : high) + place(row + j % 2 * 8, column));
      }
  }

 private:
  template <class T>
  __device__ T& in(uint32_t address) const {
    return *reinterpret_cast<T*>(memory + (address - base));
  }
  __device__ const Number* from(int row, int column) const { return basis + (first + row) * r + column; }
  __device__ int place(int row, int column) const {
    return 2 * (column / kWidth * rows * kWidth + swizzled<kWidth>(row, column % kWidth));
  }
  // Of eight numbers of a row, how many there are; whether all are, and aligned.
  __device__ int numbers(int row, int column) const {
    return row < rows && first + row < length ? min(8, max(0, r - column)) : 0;
  }
  __device__ bool whole(int row, int column) const { return r % 8 == 0 && numbers(row, column) == 8; }

  __device__ void read(int row, int column, Piece& piece) const {
    const Number* const given = from(row, column);
    if (whole(row, column)) {
#pragma unroll
      for (int j = 0; j < static_cast<int>(sizeof(Piece) / 16); ++j)
        reinterpret_cast<uint4*>(piece)[j] = reinterpret_cast<const uint4*>(given)[j];
    } else {
      const int some = numbers(row, column);
#pragma unroll
      for (int k = 0; k < 8; ++k) piece[k] = k < some ? given[k] : Number{};
    }
  }

  __device__ void write(int row, int column, const Piece& x) const {
    const int to = place(row, column);
    if constexpr (SPLIT) {
      uint32_t pairs[4], rests[4];
#pragma unroll
      for (int k = 0; k < 4; ++k)
        pairs[k] = packed(x[2 * k], x[2 * k + 1]), rests[k] = packed(rest_of(x[2 * k]), rest_of(x[2 * k + 1]));
      in<uint4>(high + to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
      in<uint4>(low + to) = make_uint4(rests[0], rests[1], rests[2], rests[3]);
    } else {
      uint32_t pairs[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) pairs[k] = x[2 * k] | static_cast<uint32_t>(x[2 * k + 1]) << 16;
      in<uint4>(high + to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
};

}  // namespace sculpt

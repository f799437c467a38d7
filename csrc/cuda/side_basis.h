// The rows of U that a block of the projection of one side has: in shared memory as operands of products, and some of them
// in registers.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/side_panels.h"
#include "cuda/cluster.h"
#include "cuda/mma.h"

namespace sculpt {

// Two numbers in 16 bits each, float16 if HALF, and back.
template <bool HALF = false>
__device__ inline uint32_t packed(float x, float y) {
  const std::conditional_t<HALF, __half2, __nv_bfloat162> both = [&] {
    if constexpr (HALF) return __floats2half2_rn(x, y);
    else return __floats2bfloat162_rn(x, y);
  }();
  return *reinterpret_cast<const uint32_t*>(&both);
}

template <bool HALF>
__device__ inline float2 unpacked(uint32_t pair) {
  if constexpr (HALF) return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  else return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// What rounding to bfloat16 took from x.
__device__ inline float rest_of(float x) { return x - __bfloat162float(__float2bfloat16_rn(x)); }

// RANKS: padded. `rows` of the block; `first`: those of U before them, of `length`; `r`: numbers of a row.
template <int RANKS, BasisForm FORM>
struct SideBasis {
  static constexpr bool kSplit = FORM == BasisForm::kFloat32;
  // Columns lie in arrays of up to 64 beside each other.
  static constexpr int kWidth = RANKS < 64 ? RANKS : 64, kParts = parts_of(FORM);
  using Number = std::conditional_t<kSplit, float, uint16_t>;
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
    constexpr int kPieces = kSplit ? 2 : 1, kColumns = RANKS / 8;
    const int count = rows * kColumns;
    for (int begin = thread; begin < count; begin += kPieces * threads) {
      if constexpr (!kSplit) {
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
    if constexpr (!kSplit) {
      close_group();
      wait_for_groups<0>();
    }
    show_to_async();
  }

  // The low part of U M Uᵀ, U (Mᵀ - 1), on the right U (M - 1), from U as the block has it: then (Uᵀ + lowᵀ) G = M Uᵀ G. What is
  // rounded is 2^-9 of what M differs from 1 by: of a U that was orthonormal before it was rounded 2^-17 of the whole.
  template <bool RIGHT>
  __device__ void weigh(const float* metric, int thread, int threads) const {
    constexpr int kColumns = RANKS / 8, kRowTiles = kTile / 16;
    const int lane = thread % 32, along = RIGHT ? r : 1, across = RIGHT ? 1 : r;
    // Eight columns of a tile at a time.
#pragma unroll 1
    for (int i = thread / 32; i < rows / kTile * kColumns; i += threads / 32) {
      const int first_row = kTile * (i / kColumns), column = 8 * (i % kColumns) + lane / 4;
      float sums[kRowTiles][4] = {};
      // One after the other: with all of M - 1 for these columns in registers some are spilled.
#pragma unroll 1
      for (int k = 0; k < RANKS; k += 16) {
        uint32_t weights[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int row = k + 8 * j + 2 * (lane % 4);
          const float* const from = metric + row * along + column * across;
          const float x = row < r && column < r ? from[0] : 0.0f, y = row + 1 < r && column < r ? from[along] : 0.0f;
          weights[j] = packed(row == column ? x - 1.0f : x, row + 1 == column ? y - 1.0f : y);
        }
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
          uint32_t u[4];
          load_four(u, high + place(first_row + 16 * tile + lane % 16, k + lane / 16 * 8));
          multiply_add(sums[tile], u, weights);
        }
      }
#pragma unroll
      for (int j = 0; j < 2 * kRowTiles; ++j) {
        const int row = first_row + 8 * j + lane / 4, pair = i % kColumns * 8 + 2 * (lane % 4);
        in<uint32_t>(low + place(row, pair)) = packed(sums[j / 2][j % 2 * 2], sums[j / 2][j % 2 * 2 + 1]);
      }
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
    if constexpr (kSplit) {
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

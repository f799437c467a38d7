// Panels of rows in shared memory, and the two products in which they meet a basis that lies there too: what the passes of
// the two-sided projection share.
//
// Rows are stored without gaps, their 16-byte chunks exchanged: eight rows that are read together at the same chunk then
// lie in different banks, and for rank 64 two blocks fit an SM to the byte, which rows with a gap would not.
#pragma once
#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/cluster.h"
#include "cuda/mma.h"

namespace sculpt {

constexpr int kPanelThreads = 256;

// Where chunk `chunk` of row `row` begins, in elements, in rows of 16 RANK_TILES elements. A chunk is 8 elements.
// Eight rows on, the exchange is the same: loops over tiles add constants to one address.
template <int RANK_TILES>
__device__ inline int basis_place(int row, int chunk) {
  constexpr int kShift = RANK_TILES >= 4 ? 0 : RANK_TILES == 2 ? 1 : 2, kMask = RANK_TILES >= 4 ? 7 : 2 * RANK_TILES - 1;
  return (row * 2 * RANK_TILES + (chunk ^ ((row >> kShift) & kMask))) * 8;
}

// The same in rows of a panel, `chunks` of them, a multiple of 8.
__device__ inline int panel_place(int row, int chunk, int chunks) { return (row * chunks + (chunk ^ (row & 7))) * 8; }

// Element of float32 sums in rows of 16 RANK_TILES, exchanged by groups of 8: half a warp writes four rows at once.
template <int RANK_TILES>
__device__ inline int sum_place(int row, int column) {
  const int turn = RANK_TILES == 1 ? (row >> 1) & 1 : row & 3;
  return row * 16 * RANK_TILES + ((column / 8 ^ turn) * 8) + column % 8;
}

// And back: the column at offset `x` of a row. An exchange undoes itself.
template <int RANK_TILES>
__device__ inline int sum_column(int row, int x) {
  return sum_place<RANK_TILES>(row, x) - row * 16 * RANK_TILES;
}

// A value as two bfloat16 parts, to 2^-17 of it.
struct Parts {
  __nv_bfloat16 high, low;
  __device__ explicit Parts(float value)
      : high(__float2bfloat16_rn(value)), low(__float2bfloat16_rn(value - __bfloat162float(high))) {}
};

__device__ inline uint32_t pack(__nv_bfloat16 first, __nv_bfloat16 second) {
  return static_cast<uint32_t>(__bfloat16_as_ushort(second)) << 16 | __bfloat16_as_ushort(first);
}

// Four values as 8 bytes of high parts and 8 of low ones.
__device__ inline void store_parts(__nv_bfloat16* high, __nv_bfloat16* low, float4 value) {
  const Parts x(value.x), y(value.y), z(value.z), w(value.w);
  *reinterpret_cast<uint2*>(high) = make_uint2(pack(x.high, y.high), pack(z.high, w.high));
  *reinterpret_cast<uint2*>(low) = make_uint2(pack(x.low, y.low), pack(z.low, w.low));
}

__device__ inline float4 plus(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

// Four elements of the sum of all blocks' parts, in the order of the blocks; eight reads are on their way at once.
__device__ inline float4 sum_of_parts(const float* part, int at, int blocks) {
  float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
  for (int first = 0; first < blocks; first += 8) {
    float4 values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
      values[i] = first + i < blocks ? of_block(part, first + i, at) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < 8; ++i) total = plus(total, values[i]);
  }
  return total;
}

// What of a matrix a panel covers: rows and columns that are there, from `at` on. aligned: rows start at multiples of 16
// bytes.
struct Window {
  __nv_bfloat16* at;
  int64_t pitch;
  int rows, columns;
  bool aligned;
  __device__ Window(__nv_bfloat16* grad, int64_t m, int64_t n, int64_t first_row, int64_t first_column)
      : at(grad + first_row * n + first_column),
        pitch(n),
        rows(within(m - first_row)),
        columns(within(n - first_column)),
        aligned(n % 8 == 0) {}
  // No panel has as many rows or columns.
  __device__ static int within(int64_t left) {
    return static_cast<int>(left < 0 ? 0 : left < (1 << 20) ? left : (1 << 20));
  }
};

// Starts to copy `rows` x 8 `chunks` elements, zero outside of the matrix.
__device__ inline void load_panel(__nv_bfloat16* panel, const Window& from, int rows, int chunks) {
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * chunks; i += kPanelThreads) {
    const int row = i / chunks, chunk = i % chunks, left = row < from.rows ? from.columns - 8 * chunk : 0;
    __nv_bfloat16* to = panel + panel_place(row, chunk, chunks);
    const __nv_bfloat16* source = from.at + row * from.pitch + 8 * chunk;
    if (from.aligned && left > 0) {
      copy_async(to, source);
      continue;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) to[j] = j < left ? source[j] : __float2bfloat16_rn(0.0f);
  }
}

// Starts to copy `rows` rows of 16 RANK_TILES elements from `first` on, zero from row `limit` on.
template <int RANK_TILES>
__device__ inline void load_basis(__nv_bfloat16* to, const __nv_bfloat16* from, int64_t first, int64_t limit, int rows) {
  constexpr int kChunks = 2 * RANK_TILES;
  for (int i = threadIdx.x; i < rows * kChunks; i += kPanelThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    __nv_bfloat16* place = to + basis_place<RANK_TILES>(row, chunk);
    if (first + row < limit)
      copy_async(place, from + (first + row) * (8 * kChunks) + 8 * chunk);
    else
      *reinterpret_cast<uint4*>(place) = make_uint4(0, 0, 0, 0);
  }
}

// The product of a panel (16 ROW_TILES rows) and the block's slice of the basis, in the registers of 8 warps: the tiles
// are dealt out so that the warps read the least shared memory.
template <int ROW_TILES, int RANK_TILES, bool SPLIT>
struct PanelProduct {
  static constexpr int kWeight = RANK_TILES * (SPLIT ? 2 : 1);
  static constexpr int kTiles = ROW_TILES == 4 ? (kWeight >= 8 ? 2 : 1) : (kWeight >= 16 ? 2 : 1);
  static constexpr int kRowWarps = ROW_TILES / kTiles;
  // Of 8 ranks each. With few ranks some warps have none.
  static constexpr int kColumnWarps = 2 * RANK_TILES < 8 / kRowWarps ? 2 * RANK_TILES : 8 / kRowWarps;
  static constexpr int kColumns = 2 * RANK_TILES / kColumnWarps;
  static_assert(kColumns == 1 || kColumns % 2 == 0, "two fragments are read at once");

  float sums[kTiles][kColumns][4];

  __device__ static bool active(int warp) { return warp < kRowWarps * kColumnWarps; }

  __device__ void compute(const __nv_bfloat16* panel, int chunks, const __nv_bfloat16* high, const __nv_bfloat16* low,
                          int warp, int lane) {
    const int first_row = warp % kRowWarps * kTiles * 16, first_chunk = warp / kRowWarps * kColumns;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int t = 0; t < kColumns; ++t)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][t][j] = 0.0f;
    if (!active(warp)) return;
    const int row = first_row + (lane & 15), turn = row & 7;
    const uint32_t panel_row = shared_address(panel) + 16 * row * chunks;
    // With one tile of 8 ranks the second half of what is read is not used.
    const int chunk = first_chunk + (kColumns == 1 ? 0 : lane >> 4);
    const uint32_t high_address = shared_address(high), low_address = shared_address(low);
#pragma unroll 2
    for (int k = 0; k < chunks; k += 2) {
      uint32_t a[kTiles][4];
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
        load_four(a[i], panel_row + 16 * ((k + (lane >> 4)) ^ turn) + 256 * i * chunks);
#pragma unroll
      for (int t = 0; t < kColumns; t += 2) {
        const int place = 2 * basis_place<RANK_TILES>(8 * k + (lane & 15), chunk + t);
        uint32_t b[4];
        load_four_transposed(b, high_address + place);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          multiply_add(sums[i][t], a[i], b[0], b[1]);
          if constexpr (kColumns > 1) multiply_add(sums[i][t + 1], a[i], b[2], b[3]);
        }
        if constexpr (SPLIT) {
          load_four_transposed(b, low_address + place);
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
            multiply_add(sums[i][t], a[i], b[0], b[1]);
            if constexpr (kColumns > 1) multiply_add(sums[i][t + 1], a[i], b[2], b[3]);
          }
        }
      }
    }
  }

  __device__ void store(float* part, int warp, int lane) const {
    if (!active(warp)) return;
    const int first_row = warp % kRowWarps * kTiles * 16, first_chunk = warp / kRowWarps * kColumns;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int t = 0; t < kColumns; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = first_row + 16 * i + lane / 4 + 8 * half, column = 8 * (first_chunk + t) + 2 * (lane % 4);
          *reinterpret_cast<float2*>(part + sum_place<RANK_TILES>(row, column)) =
              make_float2(sums[i][t][2 * half], sums[i][t][2 * half + 1]);
        }
  }
};

// A warp's 32 rows x 8 TILES columns of a panel, as it is corrected.
template <int TILES>
struct Correction {
  static_assert(TILES == 2 || TILES == 4 || TILES == 8, "whole sectors of a row: 32, 64 or 128 bytes");
  float sums[2][TILES][4];

  __device__ Correction() {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][t][j] = 0.0f;
  }

  // += A Bᵀ, A's rows from `row` on and B's from `column` on, both of 16 RANK_TILES elements and of two parts each; the
  // product of the low parts, 2^-18 of the whole, is left out, and so are those of a part that is not there.
  template <int RANK_TILES, bool A_LOW, bool B_LOW>
  __device__ void add(const __nv_bfloat16* a_high, const __nv_bfloat16* a_low, const __nv_bfloat16* b_high,
                      const __nv_bfloat16* b_low, int row, int column, int lane) {
    constexpr int kPitch = 32 * RANK_TILES;
    // B's blocks in the order (columns 0 to 7, ranks 0 to 7), (0, 8), (8, 0), (8, 8): two B fragments.
    const int a_row = row + (lane & 15), b_row = column + (lane & 7) + (lane >> 4) * 8;
    const uint32_t a_at[2] = {shared_address(a_high), shared_address(a_low)};
    const uint32_t b_at[2] = {shared_address(b_high), shared_address(b_low)};
    // Unrolled, the addresses of all steps would be kept in registers, and spill.
#pragma unroll 1
    for (int k = 0; k < RANK_TILES; ++k) {
      const int a_place = 2 * basis_place<RANK_TILES>(a_row, 2 * k + (lane >> 4));
      const int b_place = 2 * basis_place<RANK_TILES>(b_row, 2 * k + ((lane >> 3) & 1));
      uint32_t a[2][4], rest[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_four(a[i], a_at[0] + a_place + 16 * i * kPitch);
        if constexpr (A_LOW) load_four(rest[i], a_at[1] + a_place + 16 * i * kPitch);
      }
#pragma unroll
      for (int t = 0; t < TILES; t += 2) {
        uint32_t b[4];
        load_four(b, b_at[0] + b_place + 8 * t * kPitch);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          multiply_add(sums[i][t], a[i], b[0], b[1]);
          multiply_add(sums[i][t + 1], a[i], b[2], b[3]);
          if constexpr (A_LOW) {
            multiply_add(sums[i][t], rest[i], b[0], b[1]);
            multiply_add(sums[i][t + 1], rest[i], b[2], b[3]);
          }
        }
        if constexpr (B_LOW) {
          load_four(b, b_at[1] + b_place + 8 * t * kPitch);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            multiply_add(sums[i][t], a[i], b[0], b[1]);
            multiply_add(sums[i][t + 1], a[i], b[2], b[3]);
          }
        }
      }
    }
  }

  // Into the panel where it lies, and from there to memory, 16 bytes a lane: no other warp touches these elements.
  __device__ void write(__nv_bfloat16* panel, const Window& to, int chunks, int row, int column, int lane) const {
    __nv_bfloat16* first = panel + (row + lane / 4) * chunks * 8 + 2 * (lane % 4);
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      __nv_bfloat162* places[4];
      __nv_bfloat162 old[4];
      // Four reads, then four writes: the compiler cannot know that they do not meet.
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        places[j] = reinterpret_cast<__nv_bfloat162*>(first + 64 * j * chunks + ((column / 8 + t) ^ (lane / 4)) * 8);
        old[j] = *places[j];
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 was = __bfloat1622float2(old[j]);
        const float x = sums[j / 2][t][j % 2 * 2], y = sums[j / 2][t][j % 2 * 2 + 1];
        *places[j] = __floats2bfloat162_rn(was.x - x, was.y - y);
      }
    }
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < TILES; ++i) {
      const int at_row = row + i * (32 / TILES) + lane / TILES, chunk = column / 8 + lane % TILES;
      const int left = to.columns - 8 * chunk;
      if (at_row >= to.rows || left <= 0) continue;
      const __nv_bfloat16* from = panel + panel_place(at_row, chunk, chunks);
      __nv_bfloat16* out = to.at + at_row * to.pitch + 8 * chunk;
      if (to.aligned) {
        *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(from);
        continue;
      }
      for (int j = 0; j < 8 && j < left; ++j) out[j] = from[j];
    }
  }
};

}  // namespace sculpt

// Both thin products of a matrix and the core in one reading of it: the second pass of csrc/cuda/project_both.cu.
#pragma once
#include <cuda_bf16.h>

#include <cstdint>

#include "common/both_panels.h"
#include "cuda/cluster.h"
#include "cuda/row_panels.h"

namespace sculpt {
namespace {

using Half = __nv_bfloat16;

constexpr int kWarps = kPanelThreads / 32;

// The arrays in scratch memory, in the order of `BothPanels`.
struct Pointers {
  Half *left_high, *left_low, *right_high, *right_low, *row_high, *row_low, *column_high, *column_low;
  float *row_parts, *column_parts, *core_parts, *core;
};

// Blocks of `thin` on an SM, for which it keeps to 128 registers. Below capability 9.0 there is memory for one.
constexpr int thin_blocks(int rank_tiles) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return 1;
#else
  return rank_tiles <= 4 ? 2 : 1;
#endif
}

// A block: 256 columns, and panels of rows one after the other. Y stays in registers, a warp's 32 columns of it.
template <int RANK_TILES, bool SPLIT>
__global__ void __launch_bounds__(kPanelThreads, thin_blocks(RANK_TILES))
    thin(Half* grad, Pointers p, int64_t m, int64_t n, int panels_each, bool both) {
  constexpr int kRanks = 16 * RANK_TILES, kColumns = kThinColumns, kChunks = kColumns / 8, kSides = SPLIT ? 2 : 1;
  constexpr int kRowTiles = RANK_TILES * kSides <= 4 ? 4 : 2, kRows = 16 * kRowTiles;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kColumns;

  extern __shared__ __align__(128) unsigned char memory[];
  auto* high = reinterpret_cast<Half*>(memory);
  auto* low = high + kColumns * kRanks;
  auto* panels = high + kSides * kColumns * kRanks;
  auto* lefts = panels + 2 * kRows * kColumns;

  const int all = static_cast<int>((m + kRows - 1) / kRows), begin = static_cast<int>(blockIdx.y) * panels_each;
  const int end = all - begin < panels_each ? all : begin + panels_each;
  const auto load = [&](int panel, int buffer) {
    const int64_t row = static_cast<int64_t>(panel) * kRows;
    load_panel(panels + buffer * kRows * kColumns, Window(grad, m, n, row, first_column), kRows, kChunks);
    Half* to = lefts + buffer * kSides * kRows * kRanks;
    load_basis<RANK_TILES>(to, p.left_high, row, m, kRows);
    if constexpr (SPLIT) load_basis<RANK_TILES>(to + kRows * kRanks, p.left_low, row, m, kRows);
  };
  load_basis<RANK_TILES>(high, p.right_high, first_column, n, kColumns);
  if constexpr (SPLIT) load_basis<RANK_TILES>(low, p.right_low, first_column, n, kColumns);
  load(begin, 0);
  close_group();

  float y[RANK_TILES][4][4] = {};
  for (int panel = begin, turn = 0; panel < end; ++panel, turn ^= 1) {
    if (panel + 1 < end) load(panel + 1, turn ^ 1);
    close_group();
    wait_for_groups<1>();
    __syncthreads();
    Half* here = panels + turn * kRows * kColumns;
    // Lᵀ times the warp's columns.
    {
      const uint32_t left = shared_address(lefts + turn * kSides * kRows * kRanks), columns = shared_address(here);
#pragma unroll 1
      for (int k = 0; k < kRows; k += 16) {
        const int row = k + (lane & 7) + (lane >> 4) * 8;
        uint32_t b[2][4];
#pragma unroll
        for (int t = 0; t < 2; ++t)
          load_four_transposed(b[t], columns + 2 * panel_place(k + (lane & 15), 4 * warp + 2 * t + (lane >> 4), kChunks));
#pragma unroll
        for (int i = 0; i < RANK_TILES; ++i) {
          const uint32_t place = left + 2 * basis_place<RANK_TILES>(row, 2 * i + ((lane >> 3) & 1));
#pragma unroll
          for (int side = 0; side < kSides; ++side) {
            uint32_t a[4];
            load_four_transposed(a, place + 2 * side * kRows * kRanks);
#pragma unroll
            for (int t = 0; t < 4; ++t) multiply_add(y[i][t], a, b[t / 2][t % 2 * 2], b[t / 2][t % 2 * 2 + 1]);
          }
        }
      }
    }
    if (!both) {
      // The panel after the next overwrites this one.
      __syncthreads();
      continue;
    }
    {
      PanelProduct<kRowTiles, RANK_TILES, SPLIT> product;
      product.compute(here, kChunks, high, low, warp, lane);
      // The panel is done with; the part of X takes its place.
      __syncthreads();
      product.store(reinterpret_cast<float*>(here), warp, lane);
    }
    cluster_barrier();
    const int blocks = cluster_size(), slice = kRows * kRanks / 4 / blocks;
    const int64_t first_row = static_cast<int64_t>(panel) * kRows, group = blockIdx.x / blocks;
#pragma unroll 1
    for (int i = thread; i < slice; i += kPanelThreads) {
      const int at = cluster_rank() * slice + i, row = 4 * at / kRanks;
      const float4 value = sum_of_parts(reinterpret_cast<float*>(here), at, blocks);
      const int64_t to = (group * m + first_row + row) * kRanks + sum_column<RANK_TILES>(row, 4 * at % kRanks);
      if (first_row + row < m) *reinterpret_cast<float4*>(p.row_parts + to) = value;
    }
    // No block still reads this part.
    cluster_barrier();
  }

  // Y by columns, as `update` takes it.
  if (both) {
#pragma unroll
    for (int i = 0; i < RANK_TILES; ++i)
#pragma unroll
      for (int t = 0; t < 4; ++t)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int64_t column = first_column + 32 * warp + 8 * t + 2 * (lane % 4) + j % 2;
          const int rank = 16 * i + lane / 4 + 8 * (j / 2);
          if (column < n) p.column_parts[(blockIdx.y * n + column) * kRanks + rank] = y[i][t][j];
        }
  }

  // The core: Y, from the registers in two parts, times R. 16 of its rows at a time, summed over the warps in their order.
  constexpr int kWide = kRanks < 32 ? kRanks : 32;
  auto* parts = reinterpret_cast<float*>(panels);
  float* core = p.core_parts + (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * (kRanks * kRanks);
#pragma unroll
  for (int i = 0; i < RANK_TILES; ++i) {
#pragma unroll 1
    for (int first = 0; first < kRanks; first += kWide) {
      float sums[kWide / 8][4] = {};
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        // Two accumulators side by side are laid out as an A fragment.
        uint32_t a[4], rest[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Parts x(y[i][2 * k + j / 2][j % 2 * 2]), z(y[i][2 * k + j / 2][j % 2 * 2 + 1]);
          a[j] = pack(x.high, z.high), rest[j] = pack(x.low, z.low);
        }
#pragma unroll
        for (int t = 0; t < kWide / 8; t += 2) {
          const int place = 2 * basis_place<RANK_TILES>(32 * warp + 16 * k + (lane & 15), first / 8 + t + (lane >> 4));
          uint32_t b[4];
          load_four_transposed(b, shared_address(high) + place);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            multiply_add(sums[t + half], a, b[2 * half], b[2 * half + 1]);
            multiply_add(sums[t + half], rest, b[2 * half], b[2 * half + 1]);
          }
          if constexpr (SPLIT) {
            load_four_transposed(b, shared_address(low) + place);
#pragma unroll
            for (int half = 0; half < 2; ++half) multiply_add(sums[t + half], a, b[2 * half], b[2 * half + 1]);
          }
        }
      }
#pragma unroll
      for (int t = 0; t < kWide / 8; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<float2*>(parts + (warp * 16 + lane / 4 + 8 * half) * kWide + 8 * t + 2 * (lane % 4)) =
              make_float2(sums[t][2 * half], sums[t][2 * half + 1]);
      __syncthreads();
      for (int at = thread; at < 16 * kWide; at += kPanelThreads) {
        float total = parts[at];
#pragma unroll
        for (int other = 1; other < kWarps; ++other) total += parts[other * 16 * kWide + at];
        core[(16 * i + at / kWide) * kRanks + first + at % kWide] = total;
      }
      __syncthreads();
    }
  }
}

}  // namespace
}  // namespace sculpt

// Left projection in one pass, for Hopper: G -= U (Uᵀ G), or G = U (Uᵀ G), G bfloat16 (m x n), U (m x r).
//
// Moves: G read once and written once, 4 m n bytes; U once per cluster. Computes 6 m n r operations on tensor cores (with
// a float32 U, kept as two bfloat16 parts, 10 m n r).
//
// A cluster of blocks takes a panel of 64 columns at a time. Each block holds some of the panel's rows, and the same rows
// of U, in shared memory. Its part of Gᵀ U goes straight from registers to the blocks that own those ranks, which add the
// parts in the order of the blocks and send the sum, as two bfloat16 factors (to 2^-16), to all. Nothing depends on how
// many clusters run: results are the same to the bit every time.
//
// Both waits for the cluster have work in them: while the parts travel, the panel before this one is corrected, written
// and replaced; while the factors travel, the panel after this one is multiplied. Products are Hopper's own: with
// mma.sync and ldmatrix, shared memory gave out operands for longer than the memory took for the panel (a panel of 256
// rows took 8 us of which 2 are needed on an H200).
//
// NOT YET RUN ON A GPU: it compiles, and dispatch does not choose it. Not for float16, whose coefficients can overflow,
// for ranks above 128, or matrices too long for the shared memory of 16 blocks (`left_panels`).
#include "cuda/project_left.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "common/left_panels.h"
#include "cuda/cluster.h"
#include "cuda/mma.h"
#include "cuda/wgmma.h"

namespace sculpt {
namespace {

constexpr int kGroups = 2;  // of four warps, which multiply together
constexpr int kWarps = 4 * kGroups, kThreads = 32 * kWarps;
constexpr int kColumns = kPanelColumns, kPieces = kColumns / 8, kTile = kTileRows;

__device__ uint32_t packed(float x, float y) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// What rounding to bfloat16 took from x.
__device__ float rest_of(float x) { return x - __bfloat162float(__float2bfloat16_rn(x)); }

// RANKS: padded. SPLIT: U is float32.
template <int RANKS, bool SPLIT>
struct Block {
  // Columns of U and of the factors lie in arrays of up to 64 beside each other.
  static constexpr int kWidth = RANKS < 64 ? RANKS : 64, kGroupRanks = RANKS / kGroups;
  using Sums = float[kGroupRanks / 2];

  __nv_bfloat16* grad;
  int64_t m, n, first_row;
  int rows, stages, blocks, own, owned, lane, warp, group;
  bool keep;
  __nv_bfloat16 *high, *low, *panels, *factors;
  float* parts;
  // Of the parts, and of the factors of each parity: addresses in shared memory.
  uint32_t parts_barrier, factor_barriers;

  __device__ uint32_t factor_barrier(int parity) const { return factor_barriers + 8 * parity; }
  __device__ __nv_bfloat16* panel(int slot) const { return panels + slot * rows * kColumns; }
  // High parts, then low ones; a row is a column of the panel.
  __device__ __nv_bfloat16* factor(int parity) const { return factors + parity * 2 * RANKS * kColumns; }
  // Of an array of `length` rows of RANKS numbers.
  __device__ static int place(int length, int row, int column) {
    return column / kWidth * length * kWidth + swizzled<kWidth>(row, column % kWidth);
  }

  // This block's rows of U, eight columns at a time, zeros where there are none. bfloat16 ones are copied
  // asynchronously: with the panel whose group they are in they are there.
  __device__ void load_basis(const void* basis, int r) const {
#pragma unroll 4
    for (int i = threadIdx.x; i < rows * (RANKS / 8); i += kThreads) {
      const int row = i / (RANKS / 8), column = i % (RANKS / 8) * 8, to = place(rows, row, column);
      const int64_t at = (first_row + row) * r + column;
      const bool whole = r % 8 == 0 && column < r && first_row + row < m;
      if constexpr (SPLIT) {
        const auto* from = static_cast<const float*>(basis) + at;
        float x[8];
        if (whole) {
          *reinterpret_cast<float4*>(x) = *reinterpret_cast<const float4*>(from);
          *reinterpret_cast<float4*>(x + 4) = *reinterpret_cast<const float4*>(from + 4);
        } else {
          for (int k = 0; k < 8; ++k) x[k] = first_row + row < m && column + k < r ? from[k] : 0.0f;
        }
        for (int k = 0; k < 8; k += 2) {
          *reinterpret_cast<uint32_t*>(high + to + k) = packed(x[k], x[k + 1]);
          *reinterpret_cast<uint32_t*>(low + to + k) = packed(rest_of(x[k]), rest_of(x[k + 1]));
        }
      } else {
        const auto* from = static_cast<const __nv_bfloat16*>(basis) + at;
        if (whole)
          copy_async(high + to, from);
        else
          for (int k = 0; k < 8; ++k)
            high[to + k] = first_row + row < m && column + k < r ? from[k] : __float2bfloat16_rn(0.0f);
      }
    }
  }

  // The tiles of 64 rows are dealt out to the groups, and 16 rows of each to a warp, which loads, corrects and stores
  // them: no other waits for it.
  __device__ int row_of(int tile, int j) const { return kTile * tile + 16 * (warp % 4) + j; }

  // Rows beyond m are zero: an Inf there times a zero of U would be NaN.
  __device__ void load_tile(int slot, int tile, int64_t first_column) const {
    const int64_t column = first_column + lane % kPieces * 8;
#pragma unroll
    for (int j = 0; j < 16; j += 32 / kPieces) {
      const int row = row_of(tile, j + lane / kPieces);
      const bool row_inside = first_row + row < m;
      __nv_bfloat16* to = panel(slot) + swizzled<kColumns>(row, lane % kPieces * 8);
      const __nv_bfloat16* from = grad + (first_row + row) * n + column;
      // Rows of G start at multiples of 16 bytes.
      if (n % 8 == 0 && row_inside && column < n) {
        copy_async(to, from);
      } else {
        for (int k = 0; k < 8; ++k) to[k] = row_inside && column + k < n ? from[k] : __float2bfloat16_rn(0.0f);
      }
    }
  }

  __device__ void store_tile(int slot, int tile, int64_t first_column) const {
    constexpr int kSteps = 16 * kPieces / 32;
    const int64_t column = first_column + lane % kPieces * 8;
    uint4 piece[kSteps];
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const int row = row_of(tile, j * (32 / kPieces) + lane / kPieces);
      piece[j] = *reinterpret_cast<const uint4*>(panel(slot) + swizzled<kColumns>(row, lane % kPieces * 8));
    }
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const int row = row_of(tile, j * (32 / kPieces) + lane / kPieces);
      if (first_row + row >= m) continue;
      __nv_bfloat16* to = grad + (first_row + row) * n + column;
      if (n % 8 == 0) {
        if (column < n) *reinterpret_cast<uint4*>(to) = piece[j];
      } else {
        const auto* x = reinterpret_cast<const __nv_bfloat16*>(&piece[j]);
        for (int k = 0; k < 8; ++k)
          if (column + k < n) to[k] = x[k];
      }
    }
  }

  // This group's ranks of this block's part of Gᵀ U. K is the row of both operands.
  __device__ void multiply(int slot, Sums& sums) const {
    const int first = group * kGroupRanks, in_half = first % kWidth;
    const int half = first / kWidth * rows * kWidth;
    const uint64_t g = operand<kColumns>(shared_address(panel(slot)));
    const uint64_t u = further(operand<kWidth>(shared_address(high + half)), 2 * in_half);
    const uint64_t rest = further(operand<kWidth>(shared_address(low + half)), 2 * in_half);
    begin_products(sums);
    int tile = 0;
    // There is a tile, and each is a group of products: the compiler waits for each product of a loop that might not run.
#pragma unroll 1
    do {
      go_on_with_products();
#pragma unroll
      for (int step = 0; step < kTile; step += 16) {
        const int k = kTile * tile + step;
        multiply_add<false, false>(sums, further(g, 2 * k * kColumns), further(u, 2 * k * kWidth));
        if constexpr (SPLIT)
          multiply_add<false, false>(sums, further(g, 2 * k * kColumns), further(rest, 2 * k * kWidth));
      }
      end_products();
    } while (kTile * ++tile < rows);
    wait_for_products(sums);
  }

  // The part goes to the blocks that own its ranks; they have room for every block's, by column of the panel.
  __device__ void send_part(const Sums& sums) const {
    const int shift = __ffs(owned) - 1;
    const uint32_t here = shared_address(parts + own * owned * kColumns);
#pragma unroll
    for (int j = 0; j < kGroupRanks / 8; ++j) {
      const int rank = group * kGroupRanks + 8 * j + 2 * (lane % 4);
      const uint32_t to = address_in(here, rank >> shift) + 4 * (rank & (owned - 1));
      const uint32_t barrier = address_in(parts_barrier, rank >> shift);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        send(to + 4 * owned * (16 * (warp % 4) + lane / 4 + 8 * half), sums[4 * j + 2 * half],
             sums[4 * j + 2 * half + 1], barrier);
    }
  }

  __device__ bool owns() const { return own * owned < RANKS; }

  // The parts of the ranks that this block owns are added, and sent to every block. A thread has four ranks of a column,
  // and several threads the same ones, for different blocks.
  __device__ void send_factors(int parity) const {
    if (!owns()) return;
    const int fours = owned / 4 * kColumns, shares = max(1, min(blocks, kThreads / fours));
    const uint32_t to_high = shared_address(factor(parity)), to_low = to_high + RANKS * kColumns * 2;
    for (int item = threadIdx.x; item < fours * shares; item += kThreads) {
      const int four = item % fours, column = four / (owned / 4), rank = own * owned + four % (owned / 4) * 4;
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
      for (int other = 0; other < blocks; ++other) {
        const float4 part = *reinterpret_cast<const float4*>(parts + other * owned * kColumns + 4 * four);
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
      }
      const uint32_t at = 2 * place(kColumns, column, rank);
      const uint32_t high_x = packed(sum.x, sum.y), high_y = packed(sum.z, sum.w);
      const uint32_t low_x = packed(rest_of(sum.x), rest_of(sum.y)), low_y = packed(rest_of(sum.z), rest_of(sum.w));
      for (int other = item / fours; other < blocks; other += shares) {
        const uint32_t barrier = address_in(factor_barrier(parity), other);
        send(address_in(to_high + at, other), high_x, high_y, barrier);
        send(address_in(to_low + at, other), low_x, low_y, barrier);
      }
    }
  }

  // A tile of 64 rows: U times the factors is taken from them where they lie.
  __device__ void correct_tile(int slot, int parity, int tile) const {
    float sums[kColumns / 2];
    const __nv_bfloat16 *factor_high = factor(parity), *factor_low = factor_high + RANKS * kColumns;
    begin_products(sums);
#pragma unroll
    for (int k = 0; k < RANKS; k += 16) {
      const int half = k / kWidth, along = 2 * (k % kWidth), tile_at = (half * rows + kTile * tile) * kWidth;
      const uint64_t u = further(operand<kWidth>(shared_address(high + tile_at)), along);
      const uint64_t rest = further(operand<kWidth>(shared_address(low + tile_at)), along);
      const uint64_t c = further(operand<kWidth>(shared_address(factor_high + half * kColumns * kWidth)), along);
      const uint64_t c_rest = further(operand<kWidth>(shared_address(factor_low + half * kColumns * kWidth)), along);
      multiply_add<true, true>(sums, u, c);
      multiply_add<true, true>(sums, u, c_rest);
      if constexpr (SPLIT) multiply_add<true, true>(sums, rest, c);
    }
    end_products();
    const auto at = [&](int i) {
      const int row = row_of(tile, lane / 4 + i % 2 * 8), column = i / 2 * 8 + 2 * (lane % 4);
      return reinterpret_cast<__nv_bfloat162*>(panel(slot) + swizzled<kColumns>(row, column));
    };
    __nv_bfloat162 old[kColumns / 4];
#pragma unroll
    for (int i = 0; i < kColumns / 4; ++i) old[i] = *at(i);
    wait_for_products(sums);
#pragma unroll
    for (int i = 0; i < kColumns / 4; ++i) {
      const float2 was = __bfloat1622float2(old[i]);
      const float x = sums[2 * i], y = sums[2 * i + 1];
      *at(i) = keep ? __floats2bfloat162_rn(x, y) : __floats2bfloat162_rn(was.x - x, was.y - y);
    }
    __syncwarp();
  }

  // The panel before the newest ones that may still be on their way is there, for every warp.
  __device__ void wait_for_panel(bool begin) const {
    if (begin && stages == 3)
      wait_for_groups<2>();
    else if (begin || stages == 3)
      wait_for_groups<1>();
    else
      wait_for_groups<0>();
    show_to_products();
    __syncthreads();
  }
};

template <int RANKS, bool SPLIT>
__global__ void __launch_bounds__(kThreads, 1) project_left(__nv_bfloat16* grad, const void* basis, int64_t m, int64_t n,
                                                            int r, int rows, int stages, int blocks, int owned, bool keep) {
  // Rows of 128 bytes change their pieces by the address, so arrays begin at multiples of 1024.
  extern __shared__ __align__(1024) unsigned char memory[];
  Block<RANKS, SPLIT> block;
  block.own = static_cast<int>(cluster_rank());
  block.grad = grad, block.m = m, block.n = n, block.first_row = static_cast<int64_t>(block.own) * rows;
  block.rows = rows, block.stages = stages, block.blocks = blocks, block.owned = owned, block.keep = keep;
  block.lane = threadIdx.x % 32, block.warp = threadIdx.x / 32, block.group = block.warp / 4;
  block.panels = reinterpret_cast<__nv_bfloat16*>(memory);
  block.high = block.panels + stages * rows * kColumns;
  block.low = block.high + rows * RANKS;
  block.factors = SPLIT ? block.low + rows * RANKS : block.low;
  block.parts = reinterpret_cast<float*>(block.factors + 4 * RANKS * kColumns);
  block.parts_barrier = shared_address(block.parts + blocks * owned * kColumns);
  block.factor_barriers = block.parts_barrier + 8;

  const int64_t clusters = gridDim.x / blocks, cluster = blockIdx.x / blocks;
  const int64_t panels = (n + kColumns - 1) / kColumns;
  const int64_t count = (panels - cluster + clusters - 1) / clusters;  // no more clusters than panels
  const int tiles = rows / kTile;
  const auto column_of = [&](int64_t i) { return (cluster + i * clusters) * kColumns; };

  for (int i = 0; i < stages; ++i) {
    if (i < count)
      for (int tile = block.group; tile < tiles; tile += kGroups) block.load_tile(i, tile, column_of(i));
    if (i == 0) block.load_basis(basis, r);
    close_group();
  }
  const auto expect_parts = [&] {
    if (threadIdx.x == 0 && block.owns()) expect(block.parts_barrier, 4 * blocks * owned * kColumns);
  };
  const auto expect_factors = [&](int parity) {
    if (threadIdx.x == 0) expect(block.factor_barrier(parity), 4 * RANKS * kColumns);
  };
  if (threadIdx.x == 0)
    for (int i = 0; i < 3; ++i) make_barrier(block.parts_barrier + 8 * i);
  // Every block of the cluster runs and has its barriers: from here on the others' memory may be written.
  wait_for_cluster();

  typename Block<RANKS, SPLIT>::Sums sums;
  block.wait_for_panel(true);
  block.multiply(0, sums);
  int slot = 0, before = 0;
  // A part is sent when the factors of the panel before are there: their owner has added the parts up by then. Factors
  // are sent when all parts are there: no block corrects the panel before the last any more.
  for (int64_t i = 0; i < count; ++i) {
    const int parity = static_cast<int>(i % 2), phase = static_cast<int>(i / 2 % 2);
    expect_parts();
    expect_factors(parity);
    block.send_part(sums);
    if (i > 0) {
      for (int tile = block.group; tile < tiles; tile += kGroups) {
        block.correct_tile(before, parity ^ 1, tile);
        block.store_tile(before, tile, column_of(i - 1));
        __syncwarp();
        if (i - 1 + stages < count) block.load_tile(before, tile, column_of(i - 1 + stages));
      }
      close_group();
    }
    if (block.owns()) wait_for(block.parts_barrier, parity);
    block.send_factors(parity);
    before = slot, slot = slot + 1 == stages ? 0 : slot + 1;
    if (i + 1 < count) {
      block.wait_for_panel(false);
      block.multiply(slot, sums);
    }
    wait_for(block.factor_barrier(parity), phase);
    show_to_products();
  }
  for (int tile = block.group; tile < tiles; tile += kGroups) {
    block.correct_tile(before, static_cast<int>((count - 1) % 2), tile);
    block.store_tile(before, tile, column_of(count - 1));
  }
}

using Kernel = void (*)(__nv_bfloat16*, const void*, int64_t, int64_t, int, int, int, int, int, bool);

template <bool SPLIT>
Kernel kernel_of(int64_t ranks) {
  switch (ranks) {
    case 16: return project_left<16, SPLIT>;
    case 32: return project_left<32, SPLIT>;
    case 64: return project_left<64, SPLIT>;
    default: return project_left<128, SPLIT>;
  }
}

// Clusters that fit the device at a time; asked once for each kernel, size and device: the question takes longer than a
// launch.
cudaError_t active_clusters(Kernel kernel, const LeftPanels& plan, int device, const cudaLaunchConfig_t& config,
                            int& clusters) {
  static std::mutex mutex;
  static std::map<std::tuple<Kernel, int64_t, int64_t, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int& found = known[{kernel, plan.cluster, plan.bytes, device}];
  if (found == 0) {
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kSharedBytes));
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&found, kernel, &config);
    if (error != cudaSuccess) return error;
  }
  clusters = found;
  return cudaSuccess;
}

}  // namespace

cudaError_t project_left_sm90a(void* grad, const void* basis, int64_t m, int64_t n, int64_t r, bool split, bool keep,
                               const LeftPanels& plan, cudaStream_t stream) {
  if (!plan.fits) return cudaErrorInvalidValue;
  const Kernel kernel = split ? kernel_of<true>(plan.ranks) : kernel_of<false>(plan.ranks);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(plan.cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  const int64_t panels = (n + kPanelColumns - 1) / kPanelColumns;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.cluster * std::min<int64_t>(panels, 1024)));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(plan.bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int device = 0, clusters = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = active_clusters(kernel, plan, device, config, clusters);
  if (error != cudaSuccess) return error;
  // A GPU whose GPCs are cut smaller than the cluster.
  if (clusters < 1) return cudaErrorInvalidConfiguration;
  config.gridDim = dim3(static_cast<unsigned>(plan.cluster * std::min<int64_t>(panels, clusters)));
  return cudaLaunchKernelEx(&config, kernel, static_cast<__nv_bfloat16*>(grad), basis, m, n, static_cast<int>(r),
                            static_cast<int>(plan.rows), static_cast<int>(plan.stages), static_cast<int>(plan.cluster),
                            static_cast<int>(plan.owned), keep);
}

}  // namespace sculpt

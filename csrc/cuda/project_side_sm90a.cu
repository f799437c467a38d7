// Projection of one side in one pass, for Hopper: G -= U (Uᵀ G) or G -= (G U) Uᵀ, or what is subtracted there itself, G
// bfloat16 (m x n), U (m x r) or (n x r).
//
// Moves: G read once and written once, 4 m n bytes; U once per cluster. Computes 6 m n r operations on tensor cores (with
// a float32 U, kept as two bfloat16 parts, 10 m n r).
//
// A cluster of blocks takes a panel of 64 columns (right: rows) at a time. Each block holds some of the panel, in tiles of
// 64 x 64, and the rows of U that go with it, in shared memory. Its part of Gᵀ U (of G U) goes straight from registers to
// the blocks that own those ranks, which add the parts in the order of the blocks and send the sum, as two bfloat16
// factors (to 2^-16), to all. Nothing depends on how many clusters run: results are the same to the bit every time.
//
// Both waits for the other blocks have work in them: while the parts travel, the panel before this one is corrected,
// written and replaced; while the factors travel, the panel after this one is multiplied.
//
// NOT YET RUN ON A GPU: it compiles, and dispatch does not choose it. Not for float16, whose coefficients can overflow,
// for ranks above 128, or panels too long for the shared memory of 16 blocks (`side_panels`).
#include "cuda/project_side.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "common/side_panels.h"
#include "cuda/cluster.h"
#include "cuda/mma.h"
#include "cuda/wgmma.h"

namespace sculpt {
namespace {

constexpr int kGroups = 2;  // of four warps, which multiply together
constexpr int kWarps = 4 * kGroups, kThreads = 32 * kWarps;
constexpr int kWide = kTile, kPieces = kWide / 8;

__device__ uint32_t packed(float x, float y) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// What rounding to bfloat16 took from x.
__device__ float rest_of(float x) { return x - __bfloat162float(__float2bfloat16_rn(x)); }

// RANKS: padded. SPLIT: U is float32.
template <int RANKS, bool SPLIT, bool RIGHT>
struct Block {
  // Columns of U and of the factors lie in arrays of up to 64 beside each other.
  static constexpr int kWidth = RANKS < 64 ? RANKS : 64, kGroupRanks = RANKS / kGroups;
  using Sums = float[kGroupRanks / 2];

  __nv_bfloat16* grad;
  int64_t m, n, first;  // of the panel's length, what this block holds from there on
  int rows, stages, blocks, own, owned, lane, warp, group;
  bool keep;
  __nv_bfloat16 *high, *low, *panels, *factors;
  float* parts;
  // Of the parts, and of the factors of each parity: addresses in shared memory.
  uint32_t parts_barrier, factor_barriers;

  __device__ uint32_t factor_barrier(int parity) const { return factor_barriers + 8 * parity; }
  __device__ __nv_bfloat16* tile_of(int slot, int tile) const { return panels + (slot * rows + kWide * tile) * kWide; }
  // High parts, then low ones; a row for each column (right: row) of the panel.
  __device__ __nv_bfloat16* factor(int parity) const { return factors + parity * 2 * RANKS * kWide; }
  // Of an array of `length` rows of RANKS numbers.
  __device__ static int place(int length, int row, int column) {
    return column / kWidth * length * kWidth + swizzled<kWidth>(row, column % kWidth);
  }

  // This block's rows of U, eight columns at a time, zeros where there are none. bfloat16 ones are copied
  // asynchronously: with the panel whose group they are in they are there.
  __device__ void load_basis(const void* basis, int r) const {
    const int64_t length = RIGHT ? n : m;
#pragma unroll 4
    for (int i = threadIdx.x; i < rows * (RANKS / 8); i += kThreads) {
      const int row = i / (RANKS / 8), column = i % (RANKS / 8) * 8, to = place(rows, row, column);
      const int64_t at = (first + row) * r + column;
      const bool whole = r % 8 == 0 && column < r && first + row < length;
      if constexpr (SPLIT) {
        const auto* from = static_cast<const float*>(basis) + at;
        float x[8];
        if (whole) {
          *reinterpret_cast<float4*>(x) = *reinterpret_cast<const float4*>(from);
          *reinterpret_cast<float4*>(x + 4) = *reinterpret_cast<const float4*>(from + 4);
        } else {
          for (int k = 0; k < 8; ++k) x[k] = first + row < length && column + k < r ? from[k] : 0.0f;
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
            high[to + k] = first + row < length && column + k < r ? from[k] : __float2bfloat16_rn(0.0f);
      }
    }
  }

  // Tiles are dealt out to the groups, and 16 rows of each to a warp, which loads, corrects and stores them: no other
  // waits for it. Here row j of those, and this lane's piece of it.
  __device__ int row_of(int j) const { return 16 * (warp % 4) + j; }
  // Row and column of G. across: where the panel begins.
  __device__ int64_t row_in(int tile, int row, int64_t across) const {
    return row + (RIGHT ? across : first + kWide * tile);
  }
  __device__ int64_t column_in(int tile, int64_t across) const {
    return lane % kPieces * 8 + (RIGHT ? first + kWide * tile : across);
  }

  // What is beyond m and n is zero: an Inf there times a zero of U would be NaN.
  __device__ void load_tile(int slot, int tile, int64_t across) const {
    const int64_t column = column_in(tile, across);
#pragma unroll
    for (int j = 0; j < 16; j += 32 / kPieces) {
      const int row = row_of(j + lane / kPieces);
      const int64_t at = row_in(tile, row, across);
      __nv_bfloat16* to = tile_of(slot, tile) + swizzled<kWide>(row, lane % kPieces * 8);
      const __nv_bfloat16* from = grad + at * n + column;
      // Rows of G start at multiples of 16 bytes.
      if (n % 8 == 0 && at < m && column < n) {
        copy_async(to, from);
      } else {
        for (int k = 0; k < 8; ++k) to[k] = at < m && column + k < n ? from[k] : __float2bfloat16_rn(0.0f);
      }
    }
  }

  __device__ void store_tile(int slot, int tile, int64_t across) const {
    constexpr int kSteps = 16 * kPieces / 32;
    const int64_t column = column_in(tile, across);
    uint4 piece[kSteps];
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const int row = row_of(j * (32 / kPieces) + lane / kPieces);
      piece[j] = *reinterpret_cast<const uint4*>(tile_of(slot, tile) + swizzled<kWide>(row, lane % kPieces * 8));
    }
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const int64_t at = row_in(tile, row_of(j * (32 / kPieces) + lane / kPieces), across);
      if (at >= m) continue;
      __nv_bfloat16* to = grad + at * n + column;
      if (n % 8 == 0) {
        if (column < n) *reinterpret_cast<uint4*>(to) = piece[j];
      } else {
        const auto* x = reinterpret_cast<const __nv_bfloat16*>(&piece[j]);
        for (int k = 0; k < 8; ++k)
          if (column + k < n) to[k] = x[k];
      }
    }
  }

  // This group's ranks of this block's part of Gᵀ U (of G U). K is the row of U, and of the tile (its column).
  __device__ void multiply(int slot, Sums& sums) const {
    const int first_rank = group * kGroupRanks, in_half = first_rank % kWidth;
    const int half = first_rank / kWidth * rows * kWidth;
    const uint64_t g = operand<kWide>(shared_address(tile_of(slot, 0)));
    const uint64_t u = further(operand<kWidth>(shared_address(high + half)), 2 * in_half);
    const uint64_t rest = further(operand<kWidth>(shared_address(low + half)), 2 * in_half);
    begin_products(sums);
    int tile = 0;
    // There is a tile, and each is a group of products: the compiler waits for each product of a loop that might not run.
#pragma unroll 1
    do {
      go_on_with_products();
#pragma unroll
      for (int step = 0; step < kWide; step += 16) {
        const int k = kWide * tile + step;
        const uint64_t from = further(g, 2 * kWide * (RIGHT ? kWide * tile : k) + (RIGHT ? 2 * step : 0));
        multiply_add<RIGHT, false>(sums, from, further(u, 2 * k * kWidth));
        if constexpr (SPLIT) multiply_add<RIGHT, false>(sums, from, further(rest, 2 * k * kWidth));
      }
      end_products();
    } while (kWide * ++tile < rows);
    wait_for_products(sums);
  }

  // The part goes to the blocks that own its ranks; they have room for every block's, by column of the panel.
  __device__ void send_part(const Sums& sums) const {
    const int shift = __ffs(owned) - 1;
    const uint32_t here = shared_address(parts + own * owned * kWide);
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
    const int fours = owned / 4 * kWide, shares = max(1, min(blocks, kThreads / fours));
    const uint32_t to_high = shared_address(factor(parity)), to_low = to_high + RANKS * kWide * 2;
    for (int item = threadIdx.x; item < fours * shares; item += kThreads) {
      const int four = item % fours, column = four / (owned / 4), rank = own * owned + four % (owned / 4) * 4;
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
      for (int other = 0; other < blocks; ++other) {
        const float4 part = *reinterpret_cast<const float4*>(parts + other * owned * kWide + 4 * four);
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
      }
      const uint32_t at = 2 * place(kWide, column, rank);
      const uint32_t high_x = packed(sum.x, sum.y), high_y = packed(sum.z, sum.w);
      const uint32_t low_x = packed(rest_of(sum.x), rest_of(sum.y)), low_y = packed(rest_of(sum.z), rest_of(sum.w));
      for (int other = item / fours; other < blocks; other += shares) {
        const uint32_t barrier = address_in(factor_barrier(parity), other);
        send(address_in(to_high + at, other), high_x, high_y, barrier);
        send(address_in(to_low + at, other), low_x, low_y, barrier);
      }
    }
  }

  // U times the factors (the factors times Uᵀ) is taken from a tile where it lies.
  __device__ void correct_tile(int slot, int parity, int tile) const {
    float sums[kWide / 2];
    const __nv_bfloat16 *factor_high = factor(parity), *factor_low = factor_high + RANKS * kWide;
    const auto add = [&](uint64_t u, uint64_t c) {
      if constexpr (RIGHT)
        multiply_add<true, true>(sums, c, u);
      else
        multiply_add<true, true>(sums, u, c);
    };
    begin_products(sums);
#pragma unroll
    for (int k = 0; k < RANKS; k += 16) {
      const int half = k / kWidth, along = 2 * (k % kWidth), rows_at = (half * rows + kWide * tile) * kWidth;
      const uint64_t u = further(operand<kWidth>(shared_address(high + rows_at)), along);
      const uint64_t c = further(operand<kWidth>(shared_address(factor_high + half * kWide * kWidth)), along);
      add(u, c);
      add(u, further(operand<kWidth>(shared_address(factor_low + half * kWide * kWidth)), along));
      if constexpr (SPLIT) add(further(operand<kWidth>(shared_address(low + rows_at)), along), c);
    }
    end_products();
    const auto at = [&](int i) {
      const int row = row_of(lane / 4 + i % 2 * 8), column = i / 2 * 8 + 2 * (lane % 4);
      return reinterpret_cast<__nv_bfloat162*>(tile_of(slot, tile) + swizzled<kWide>(row, column));
    };
    __nv_bfloat162 old[kWide / 4];
#pragma unroll
    for (int i = 0; i < kWide / 4; ++i) old[i] = *at(i);
    wait_for_products(sums);
#pragma unroll
    for (int i = 0; i < kWide / 4; ++i) {
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

template <int RANKS, bool SPLIT, bool RIGHT>
__global__ void __launch_bounds__(kThreads, 1) project_side(__nv_bfloat16* grad, const void* basis, int64_t m, int64_t n,
                                                            int r, int rows, int stages, int blocks, int owned, bool keep) {
  // Rows of 128 bytes change their pieces by the address, so arrays begin at multiples of 1024.
  extern __shared__ __align__(1024) unsigned char memory[];
  Block<RANKS, SPLIT, RIGHT> block;
  block.own = cluster_rank();
  block.grad = grad, block.m = m, block.n = n, block.first = static_cast<int64_t>(block.own) * rows;
  block.rows = rows, block.stages = stages, block.blocks = blocks, block.owned = owned, block.keep = keep;
  block.lane = threadIdx.x % 32, block.warp = threadIdx.x / 32, block.group = block.warp / 4;
  block.panels = reinterpret_cast<__nv_bfloat16*>(memory);
  block.high = block.panels + stages * rows * kWide;
  block.low = block.high + rows * RANKS;
  block.factors = SPLIT ? block.low + rows * RANKS : block.low;
  block.parts = reinterpret_cast<float*>(block.factors + 4 * RANKS * kWide);
  block.parts_barrier = shared_address(block.parts + blocks * owned * kWide);
  block.factor_barriers = block.parts_barrier + 8;

  const int64_t clusters = gridDim.x / blocks, cluster = blockIdx.x / blocks;
  const int64_t panels = ((RIGHT ? m : n) + kWide - 1) / kWide;
  const int64_t count = (panels - cluster + clusters - 1) / clusters;  // no more clusters than panels
  const int tiles = rows / kWide;
  const auto across_of = [&](int64_t i) { return (cluster + i * clusters) * kWide; };

  for (int i = 0; i < stages; ++i) {
    if (i < count)
      for (int tile = block.group; tile < tiles; tile += kGroups) block.load_tile(i, tile, across_of(i));
    if (i == 0) block.load_basis(basis, r);
    close_group();
  }
  const auto expect_parts = [&] {
    if (threadIdx.x == 0 && block.owns()) expect(block.parts_barrier, 4 * blocks * owned * kWide);
  };
  const auto expect_factors = [&](int parity) {
    if (threadIdx.x == 0) expect(block.factor_barrier(parity), 4 * RANKS * kWide);
  };
  if (threadIdx.x == 0)
    for (int i = 0; i < 3; ++i) make_barrier(block.parts_barrier + 8 * i);
  // Every block of the cluster runs and has its barriers: from here on the others' memory may be written.
  cluster_barrier();

  typename Block<RANKS, SPLIT, RIGHT>::Sums sums;
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
        block.store_tile(before, tile, across_of(i - 1));
        __syncwarp();
        if (i - 1 + stages < count) block.load_tile(before, tile, across_of(i - 1 + stages));
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
    block.store_tile(before, tile, across_of(count - 1));
  }
}

using Kernel = void (*)(__nv_bfloat16*, const void*, int64_t, int64_t, int, int, int, int, int, bool);

template <bool SPLIT, bool RIGHT>
Kernel kernel_of(int64_t ranks) {
  switch (ranks) {
    case 16: return project_side<16, SPLIT, RIGHT>;
    case 32: return project_side<32, SPLIT, RIGHT>;
    case 64: return project_side<64, SPLIT, RIGHT>;
    default: return project_side<128, SPLIT, RIGHT>;
  }
}

Kernel kernel_of(int64_t ranks, bool split, bool right) {
  if (right) return split ? kernel_of<true, true>(ranks) : kernel_of<false, true>(ranks);
  return split ? kernel_of<true, false>(ranks) : kernel_of<false, false>(ranks);
}

// Clusters that fit the device at a time; asked once for each kernel, size and device: the question takes longer than a
// launch.
cudaError_t active_clusters(Kernel kernel, const SidePanels& plan, int device, const cudaLaunchConfig_t& config,
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

cudaError_t project_side_sm90a(void* grad, const void* basis, int64_t m, int64_t n, int64_t r, bool right, bool split,
                               bool keep, const SidePanels& plan, cudaStream_t stream) {
  if (!plan.fits) return cudaErrorInvalidValue;
  const Kernel kernel = kernel_of(plan.ranks, split, right);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(plan.cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  const int64_t panels = ((right ? m : n) + kTile - 1) / kTile;
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

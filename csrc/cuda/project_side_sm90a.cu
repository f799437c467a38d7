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
// Tests passed on an H200; memcheck does not (docs/kernels.md). An H200 takes 2 to 5 times the floor: an exchange costs a
// panel about 4 us. Dispatch chooses it for float32 bases of rank 16. Not for float16, whose coefficients can overflow,
// for ranks above 128 (64 with a float32 basis, whose 128 spill registers), or panels too long for the shared memory of 16 blocks (`side_panels`).
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

// Groups of four warps, which multiply together. Four, since two warps a scheduler had an instruction ready a quarter of
// the time.
constexpr int kGroups = 4;
constexpr int kWarps = 4 * kGroups, kThreads = 32 * kWarps;
constexpr int kWide = kTile, kStages = kPanelStages;

__device__ uint32_t load_shared(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}

__device__ uint4 load_piece(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

__device__ void store_shared(uint32_t address, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

__device__ uint32_t packed(__nv_bfloat16 x, __nv_bfloat16 y) {
  return static_cast<uint32_t>(__bfloat16_as_ushort(y)) << 16 | __bfloat16_as_ushort(x);
}

__device__ uint32_t packed(float x, float y) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// What rounding to bfloat16 took from x.
__device__ float rest_of(float x) { return x - __bfloat162float(__float2bfloat16_rn(x)); }

// RANKS: padded. SPLIT: U is float32.
template <int RANKS, bool SPLIT, bool RIGHT>
struct Block {
  // Groups that multiply the panel, for some of the ranks each. Each reads all of it, so two; at 128 ranks two would
  // spill registers.
  static constexpr int kMultipliers = RANKS == 128 ? 4 : 2;
  // Columns of U and of the factors lie in arrays of up to 64 beside each other.
  static constexpr int kWidth = RANKS < 64 ? RANKS : 64, kGroupRanks = RANKS / kMultipliers;
  using Sums = float[kGroupRanks / 2];

  __nv_bfloat16* grad;
  int64_t m, n, first;  // of the panel's length, what this block holds from there on
  int rows, blocks, own, owned, lane, warp, group;
  bool keep;
  __nv_bfloat16 *high, *low, *panels, *factors;
  float* parts;
  // Of the parts, and of the factors of each parity: addresses in shared memory. read: eight bytes that owners write when
  // they have read all parts.
  uint32_t parts_barrier, factor_barriers, read;

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
  // waits for it. A lane copies the same piece of rows lane / 8 and 4, 8, 12 further; eight rows further pieces change
  // places alike.
  static constexpr int kSteps = 4, kRowsApart = 16 / kSteps;

  __device__ int64_t row_in(int tile, int64_t across) const {
    return 16 * (warp % 4) + lane / 8 + (RIGHT ? across : first + kWide * tile);
  }
  __device__ int64_t column_in(int tile, int64_t across) const {
    return lane % 8 * 8 + (RIGHT ? first + kWide * tile : across);
  }
  __device__ uint32_t piece_in(int slot, int tile, int step) const {
    const int row = 16 * (warp % 4) + lane / 8, turn = lane / 8 ^ step % 2 * 4;
    return shared_address(tile_of(slot, tile)) + 128 * (row + kRowsApart * step) + 16 * (lane % 8 ^ turn);
  }
  // Whether all of a tile lies in G, in rows that start at multiples of 16 bytes.
  __device__ bool whole(int tile, int64_t across) const {
    const int64_t along = first + kWide * (tile + 1), beside = across + kWide;
    return n % 8 == 0 && (RIGHT ? beside : along) <= m && (RIGHT ? along : beside) <= n;
  }

  // What is beyond m and n is zero: an Inf there times a zero of U would be NaN.
  __device__ void load_tile(int slot, int tile, int64_t across) const {
    const int64_t row = row_in(tile, across), column = column_in(tile, across);
    const __nv_bfloat16* from = grad + row * n + column;
    if (whole(tile, across)) {
#pragma unroll
      for (int j = 0; j < kSteps; ++j) copy_async(piece_in(slot, tile, j), from + j * kRowsApart * n);
      return;
    }
    for (int j = 0; j < kSteps; ++j)
      for (int k = 0; k < 8; k += 2) {
        const int64_t at = row + j * kRowsApart;
        const auto element = [&](int64_t c) { return at < m && c < n ? grad[at * n + c] : __float2bfloat16_rn(0.0f); };
        store_shared(piece_in(slot, tile, j) + 2 * k, packed(element(column + k), element(column + k + 1)));
      }
  }

  __device__ void store_tile(int slot, int tile, int64_t across) const {
    const int64_t row = row_in(tile, across), column = column_in(tile, across);
    __nv_bfloat16* to = grad + row * n + column;
    if (whole(tile, across)) {
      uint4 piece[kSteps];
#pragma unroll
      for (int j = 0; j < kSteps; ++j) piece[j] = load_piece(piece_in(slot, tile, j));
#pragma unroll
      for (int j = 0; j < kSteps; ++j) *reinterpret_cast<uint4*>(to + j * kRowsApart * n) = piece[j];
      return;
    }
    for (int j = 0; j < kSteps; ++j)
      for (int k = 0; k < 8; ++k)
        if (row + j * kRowsApart < m && column + k < n) {
          const uint32_t two = load_shared(piece_in(slot, tile, j) + 4 * (k / 2));
          to[j * kRowsApart * n + k] = __ushort_as_bfloat16(static_cast<uint16_t>(k % 2 ? two >> 16 : two));
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

  // The part goes to the blocks that own its ranks; they have room for every block's, by column (row) of the panel.
  __device__ void send_part(const Sums& sums) const {
    const int shift = __ffs(owned) - 1;
    const uint32_t here = shared_address(parts + own * owned * kWide) + 4 * owned * (16 * (warp % 4) + lane / 4);
#pragma unroll
    for (int j = 0; j < kGroupRanks / 8; ++j) {
      const int rank = group * kGroupRanks + 8 * j + 2 * (lane % 4);
      const uint32_t barrier = address_in(parts_barrier, rank >> shift);
      const uint32_t to = barrier + (here - parts_barrier) + 4 * (rank & (owned - 1));
      send(to, sums[4 * j], sums[4 * j + 1], barrier);
      send(to + 32 * owned, sums[4 * j + 2], sums[4 * j + 3], barrier);
    }
  }

  __device__ bool owns() const { return own * owned < RANKS; }

  // The parts of the ranks that this block owns are added, one number a thread, and sent to every block, four ranks of a
  // column at a time: four lanes have the same four, for a fourth of the blocks each. What is to be taken away is sent
  // with its sign changed. A thread sends to some blocks only, so a block that has all factors may not send its next part
  // before it is told that all threads have read this one: without that, ranks of 16 came out wrong on an H200.
  __device__ void send_factors(int parity) const {
    if (!owns()) return;
    const int numbers = owned * kWide, shares = max(1, kThreads / numbers);
    for (int item = threadIdx.x; item < numbers * shares; item += kThreads) {
      const int number = item % numbers, column = number / owned, rank = own * owned + number % owned / 4 * 4;
      float sum = 0.0f;
#pragma unroll 4
      for (int other = 0; other < blocks; ++other) sum += parts[other * numbers + number];
      if (!keep) sum = -sum;
      const __nv_bfloat16 high_part = __float2bfloat16_rn(sum);
      const uint32_t mine = packed(high_part, __float2bfloat16_rn(sum - __bfloat162float(high_part)));
      uint32_t four[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) four[i] = __shfl_sync(0xffffffffu, mine, i, 4);
      const uint32_t to = shared_address(factor(parity)) + 2 * place(kWide, column, rank), barrier = factor_barrier(parity);
      for (int other = lane % 4 + item / numbers * 4; other < blocks; other += 4 * shares) {
        const uint32_t there = address_in(barrier, other), at = there + (to - barrier);
        send(at, __byte_perm(four[0], four[1], 0x5410), __byte_perm(four[2], four[3], 0x5410), there);
        send(at + RANKS * kWide * 2, __byte_perm(four[0], four[1], 0x7632), __byte_perm(four[2], four[3], 0x7632), there);
      }
    }
    __syncthreads();
    if (threadIdx.x < blocks) {
      const uint32_t barrier = factor_barrier(parity), there = address_in(barrier, threadIdx.x);
      send(there + (read - barrier), 0u, 0u, there);
    }
  }

  // U times the factors (the factors times Uᵀ) is added to a tile where it lies: the products begin from it.
  __device__ void correct_tile(int parity, int tile) const {
    float sums[kWide / 2];
    // Of row lane / 4 piece 0 lies at the lane's number of pieces; of the others the bits of their number change that.
    const uint32_t at = shared_address(tile_of(parity, tile)) + 128 * (16 * (warp % 4) + lane / 4) + 16 * (lane / 4) +
                        4 * (lane % 4);
    const uint32_t mask = keep ? 0u : 0xffffffffu;
    uint32_t old[kWide / 4];
#pragma unroll
    for (int i = 0; i < kWide / 4; ++i) old[i] = load_shared((at ^ i / 2 * 16) + i % 2 * 1024) & mask;
#pragma unroll
    for (int i = 0; i < kWide / 4; ++i) {
      sums[2 * i] = __uint_as_float(old[i] << 16);
      sums[2 * i + 1] = __uint_as_float(old[i] & 0xffff0000u);
    }
    const auto add = [&](uint64_t u, uint64_t c) {
      if constexpr (RIGHT)
        multiply_add<true, true>(sums, c, u);
      else
        multiply_add<true, true>(sums, u, c);
    };
    hold(sums);
    go_on_with_products();
    const __nv_bfloat16 *factor_high = factor(parity), *factor_low = factor_high + RANKS * kWide;
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
    wait_for_products(sums);
#pragma unroll
    for (int i = 0; i < kWide / 4; ++i)
      store_shared((at ^ i / 2 * 16) + i % 2 * 1024, packed(sums[2 * i], sums[2 * i + 1]));
    __syncwarp();
  }

  // All panels but the newest, which may still be on their way, are there, for every warp.
  template <int NEWER>
  __device__ void wait_for_panel() const {
    wait_for_groups<NEWER>();
    show_to_products();
    __syncthreads();
  }
};

template <int RANKS, bool SPLIT, bool RIGHT>
__global__ void __launch_bounds__(kThreads, 1) project_side(__nv_bfloat16* grad, const void* basis, int64_t m, int64_t n,
                                                            int r, int rows, int blocks, int owned, bool keep) {
  // Rows of 128 bytes change their pieces by the address, so arrays begin at multiples of 1024.
  extern __shared__ __align__(1024) unsigned char memory[];
  Block<RANKS, SPLIT, RIGHT> block;
  block.own = cluster_rank();
  block.grad = grad, block.m = m, block.n = n, block.first = static_cast<int64_t>(block.own) * rows;
  block.rows = rows, block.blocks = blocks, block.owned = owned, block.keep = keep;
  block.lane = threadIdx.x % 32;
  block.warp = threadIdx.x / 32;
  // The same in all lanes, so that addresses of operands are worked out once for a warp.
  block.warp = __shfl_sync(0xffffffffu, block.warp, 0), block.group = block.warp / 4;
  block.panels = reinterpret_cast<__nv_bfloat16*>(memory);
  block.high = block.panels + kStages * rows * kWide;
  block.low = block.high + rows * RANKS;
  block.factors = SPLIT ? block.low + rows * RANKS : block.low;
  block.parts = reinterpret_cast<float*>(block.factors + 4 * RANKS * kWide);
  block.parts_barrier = shared_address(block.parts + blocks * owned * kWide);
  block.factor_barriers = block.parts_barrier + 8, block.read = block.factor_barriers + 16;

  const int64_t clusters = gridDim.x / blocks, cluster = blockIdx.x / blocks;
  const int64_t panels = ((RIGHT ? m : n) + kWide - 1) / kWide;
  const int64_t count = (panels - cluster + clusters - 1) / clusters;  // no more clusters than panels
  const int tiles = rows / kWide;
  const auto across_of = [&](int64_t i) { return (cluster + i * clusters) * kWide; };

  for (int i = 0; i < kStages; ++i) {
    if (i < count)
      for (int tile = block.group; tile < tiles; tile += kGroups) block.load_tile(i, tile, across_of(i));
    if (i == 0) block.load_basis(basis, r);
    close_group();
  }
  const auto expect_parts = [&] {
    if (threadIdx.x == 0 && block.owns()) expect(block.parts_barrier, 4 * blocks * owned * kWide);
  };
  const auto expect_factors = [&](int parity) {
    if (threadIdx.x == 0) expect(block.factor_barrier(parity), 4 * RANKS * kWide + 8 * (RANKS / owned));
  };
  if (threadIdx.x == 0)
    for (int i = 0; i < 3; ++i) make_barrier(block.parts_barrier + 8 * i);
  // Every block of the cluster runs and has its barriers: from here on the others' memory may be written.
  cluster_barrier();

  typename Block<RANKS, SPLIT, RIGHT>::Sums sums;
  block.template wait_for_panel<1>();
  if (block.group < block.kMultipliers) block.multiply(0, sums);
  // A part is sent when the factors of the panel before are there: their owners have read the parts by then. Factors are
  // sent when all parts are there: no block corrects the panel before the last any more, and a block's threads meet before
  // its next part.
  for (int64_t i = 0; i < count; ++i) {
    const int parity = static_cast<int>(i % 2), phase = static_cast<int>(i / 2 % 2);
    expect_parts();
    expect_factors(parity);
    if (block.group < block.kMultipliers) block.send_part(sums);
    if (i > 0) {
      for (int tile = block.group; tile < tiles; tile += kGroups) {
        block.correct_tile(parity ^ 1, tile);
        block.store_tile(parity ^ 1, tile, across_of(i - 1));
        __syncwarp();
        if (i + 1 < count) block.load_tile(parity ^ 1, tile, across_of(i + 1));
      }
      close_group();
    }
    if (block.owns()) wait_for(block.parts_barrier, parity);
    block.send_factors(parity);
    if (i + 1 < count) {
      block.template wait_for_panel<0>();
      if (block.group < block.kMultipliers) block.multiply(parity ^ 1, sums);
    }
    wait_for(block.factor_barrier(parity), phase);
    show_to_products();
  }
  for (int tile = block.group; tile < tiles; tile += kGroups) {
    const int parity = static_cast<int>((count - 1) % 2);
    block.correct_tile(parity, tile);
    block.store_tile(parity, tile, across_of(count - 1));
  }
}

using Kernel = void (*)(__nv_bfloat16*, const void*, int64_t, int64_t, int, int, int, int, bool);

template <bool SPLIT, bool RIGHT>
Kernel kernel_of(int64_t ranks) {
  switch (ranks) {
    case 16: return project_side<16, SPLIT, RIGHT>;
    case 32: return project_side<32, SPLIT, RIGHT>;
    case 64: return project_side<64, SPLIT, RIGHT>;
    default: return SPLIT ? nullptr : project_side<128, false, RIGHT>;
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
  if (kernel == nullptr) return cudaErrorInvalidValue;
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
                            static_cast<int>(plan.rows), static_cast<int>(plan.cluster), static_cast<int>(plan.owned), keep);
}

}  // namespace sculpt

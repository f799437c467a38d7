// Left projection in one pass, for Hopper: G -= U (Uᵀ G), or G = U (Uᵀ G), G bfloat16 (m x n), U (m x r).
//
// Moves: G read once and written once, 4 m n bytes; U once per cluster. Computes 4 m n r operations on tensor cores (with
// a float32 U, kept as two bfloat16 parts, 10 m n r).
//
// A cluster of blocks takes 64 columns at a time. Each block holds some of their rows, and the same rows of U, in shared
// memory; its part of Uᵀ G goes there in float32. The parts are summed in the order of the blocks over distributed shared
// memory, each block for a slice, and read back as two bfloat16 factors, to 2^-16. Nothing depends on how many clusters
// run: results are the same to the bit every time.
//
// NOT YET RUN ON A GPU: it compiles, and dispatch does not choose it. Not for float16, whose coefficients can overflow,
// for ranks above 128, or matrices too long for the shared memory of 16 blocks (`left_panels`).
#include "cuda/project_left.h"

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "common/left_panels.h"
#include "cuda/mma.h"

namespace sculpt {
namespace {

namespace cg = cooperative_groups;

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kColumns = kPanelColumns, kPitch = kPanelPitch, kParts = kPartPitch;
constexpr int kColumnTiles = kColumns / 8;

struct Split {
  __nv_bfloat16 high, low;
  __device__ explicit Split(float value)
      : high(__float2bfloat16_rn(value)), low(__float2bfloat16_rn(value - __bfloat162float(high))) {}
};

// RANK_TILES: ranks / 16. SPLIT: U is float32.
template <int RANK_TILES, bool SPLIT>
__global__ void __launch_bounds__(kThreads, 1)
    project_left(__nv_bfloat16* grad, const void* basis, int64_t m, int64_t n, int r, int rows, bool keep) {
  constexpr int kRanks = 16 * RANK_TILES, kBasisPitch = kRanks + 8;
  const cg::cluster_group cluster = cg::this_cluster();
  const int blocks = cluster.num_blocks(), block = cluster.block_rank();
  const int64_t clusters = gridDim.x / blocks, first_row = static_cast<int64_t>(block) * rows;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;

  // 16-bit arrays first: their sizes are multiples of 16 bytes.
  extern __shared__ __align__(16) unsigned char memory[];
  auto* high = reinterpret_cast<__nv_bfloat16*>(memory);
  auto* low = high + rows * kBasisPitch;
  auto* panel = SPLIT ? low + rows * kBasisPitch : low;
  auto* factor_high = panel + rows * kPitch;
  auto* factor_low = factor_high + kRanks * kPitch;
  auto* part = reinterpret_cast<float*>(factor_low + kRanks * kPitch);
  auto* sum = part + kRanks * kParts;
  const int slice = kRanks * kColumns / blocks;

  for (int i = thread; i < rows * kRanks; i += kThreads) {
    const int row = i / kRanks, column = i % kRanks;
    const bool inside = first_row + row < m && column < r;
    const int64_t at = (first_row + row) * r + column;
    if constexpr (SPLIT) {
      const Split value(inside ? static_cast<const float*>(basis)[at] : 0.0f);
      high[row * kBasisPitch + column] = value.high;
      low[row * kBasisPitch + column] = value.low;
    } else {
      high[row * kBasisPitch + column] =
          inside ? static_cast<const __nv_bfloat16*>(basis)[at] : __float2bfloat16_rn(0.0f);
    }
  }

  const int64_t panels = (n + kColumns - 1) / kColumns;
  // Rows of G start at multiples of 16 bytes.
  const bool aligned = n % 8 == 0;
  for (int64_t p = blockIdx.x / blocks; p < panels; p += clusters) {
    const int64_t first_column = p * kColumns;
    for (int i = thread; i < rows * (kColumns / 8); i += kThreads) {
      const int row = i / (kColumns / 8), column = i % (kColumns / 8) * 8;
      __nv_bfloat16* to = panel + row * kPitch + column;
      const bool row_inside = first_row + row < m;
      const __nv_bfloat16* from = grad + (first_row + row) * n + first_column + column;
      if (aligned && row_inside && first_column + column < n) {
        copy_async(to, from);
        continue;
      }
      for (int j = 0; j < 8; ++j)
        to[j] = row_inside && first_column + column + j < n ? from[j] : __float2bfloat16_rn(0.0f);
    }
    wait_for_copies();
    __syncthreads();

    // This block's part of Uᵀ G. A warp has 16 of its rows and RANK_TILES of its 8 tiles of columns.
    {
      const int tile = warp % RANK_TILES, first_tile = warp / RANK_TILES * RANK_TILES;
      float sums[RANK_TILES][4] = {};
      for (int k = 0; k < rows; k += 16) {
        uint32_t a[4], rest[4], b[2];
        load_transposed(a, high + k * kBasisPitch + 16 * tile, kBasisPitch, lane);
        if constexpr (SPLIT) load_transposed(rest, low + k * kBasisPitch + 16 * tile, kBasisPitch, lane);
#pragma unroll
        for (int t = 0; t < RANK_TILES; ++t) {
          load_columns(b, panel + k * kPitch + 8 * (first_tile + t), kPitch, lane);
          multiply_add(sums[t], a, b);
          if constexpr (SPLIT) multiply_add(sums[t], rest, b);
        }
      }
      const int row = 16 * tile + lane / 4;
#pragma unroll
      for (int t = 0; t < RANK_TILES; ++t) {
        const int column = 8 * (first_tile + t) + 2 * (lane % 4);
        *reinterpret_cast<float2*>(part + row * kParts + column) = make_float2(sums[t][0], sums[t][1]);
        *reinterpret_cast<float2*>(part + (row + 8) * kParts + column) = make_float2(sums[t][2], sums[t][3]);
      }
    }
    // Parts are whole, and no block still reads the last panel's sums.
    cluster.sync();
    for (int i = thread; i < slice; i += kThreads) {
      const int at = block * slice + i, place = at / kColumns * kParts + at % kColumns;
      float total = 0.0f;
      for (int other = 0; other < blocks; ++other) total += cluster.map_shared_rank(part, other)[place];
      sum[i] = total;
    }
    // Sums are whole, and no block still reads this panel's parts.
    cluster.sync();
    for (int i = thread; i < kRanks * kColumns; i += kThreads) {
      const Split value(cluster.map_shared_rank(sum, i / slice)[i % slice]);
      const int place = i / kColumns * kPitch + i % kColumns;
      factor_high[place] = value.high;
      factor_low[place] = value.low;
    }
    __syncthreads();

    // U times the sum, 16 rows a warp, taken from the panel where it lies.
    for (int tile = warp; tile < rows / 16; tile += kWarps) {
      float sums[kColumnTiles][4] = {};
#pragma unroll
      for (int k = 0; k < RANK_TILES; ++k) {
        uint32_t a[4], rest[4], b[2];
        load_rows(a, high + 16 * tile * kBasisPitch + 16 * k, kBasisPitch, lane);
        if constexpr (SPLIT) load_rows(rest, low + 16 * tile * kBasisPitch + 16 * k, kBasisPitch, lane);
#pragma unroll
        for (int t = 0; t < kColumnTiles; ++t) {
          load_columns(b, factor_high + 16 * k * kPitch + 8 * t, kPitch, lane);
          multiply_add(sums[t], a, b);
          if constexpr (SPLIT) multiply_add(sums[t], rest, b);
          load_columns(b, factor_low + 16 * k * kPitch + 8 * t, kPitch, lane);
          multiply_add(sums[t], a, b);
        }
      }
#pragma unroll
      for (int t = 0; t < kColumnTiles; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = 16 * tile + lane / 4 + 8 * half, column = 8 * t + 2 * (lane % 4);
          auto* at = reinterpret_cast<__nv_bfloat162*>(panel + row * kPitch + column);
          const float2 old = __bfloat1622float2(*at);
          const float x = sums[t][2 * half], y = sums[t][2 * half + 1];
          *at = keep ? __floats2bfloat162_rn(x, y) : __floats2bfloat162_rn(old.x - x, old.y - y);
        }
      }
    }
    __syncthreads();
    for (int i = thread; i < rows * (kColumns / 8); i += kThreads) {
      const int row = i / (kColumns / 8), column = i % (kColumns / 8) * 8;
      if (first_row + row >= m) continue;
      const __nv_bfloat16* from = panel + row * kPitch + column;
      __nv_bfloat16* to = grad + (first_row + row) * n + first_column + column;
      if (aligned && first_column + column < n) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        continue;
      }
      for (int j = 0; j < 8 && first_column + column + j < n; ++j) to[j] = from[j];
    }
    // The next panel overwrites this one.
    __syncthreads();
  }
  // No block may go while another reads its sums.
  cluster.sync();
}

using Kernel = void (*)(__nv_bfloat16*, const void*, int64_t, int64_t, int, int, bool);

template <bool SPLIT>
Kernel kernel_of(int64_t ranks) {
  switch (ranks) {
    case 16: return project_left<1, SPLIT>;
    case 32: return project_left<2, SPLIT>;
    case 64: return project_left<4, SPLIT>;
    default: return project_left<8, SPLIT>;
  }
}

}  // namespace

cudaError_t project_left_sm90a(void* grad, const void* basis, int64_t m, int64_t n, int64_t r, bool split, bool keep,
                               cudaStream_t stream) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const LeftPanels plan = left_panels(m, n, r, split, multiprocessors);
  if (!plan.fits) return cudaErrorInvalidValue;
  const Kernel kernel = split ? kernel_of<true>(plan.ranks) : kernel_of<false>(plan.ranks);
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.bytes));
  if (error == cudaSuccess && plan.cluster > 8)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;

  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(plan.cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.cluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(plan.bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (error != cudaSuccess) return error;
  // A GPU whose GPCs are cut smaller than the cluster.
  if (clusters < 1) return cudaErrorInvalidConfiguration;
  const int64_t panels = (n + kPanelColumns - 1) / kPanelColumns;
  config.gridDim = dim3(static_cast<unsigned>(plan.cluster * std::min<int64_t>(panels, clusters)));
  return cudaLaunchKernelEx(&config, kernel, static_cast<__nv_bfloat16*>(grad), basis, m, n, static_cast<int>(r),
                            static_cast<int>(plan.rows), keep);
}

}  // namespace sculpt

// Right projection in one pass, for Hopper: G -= (G R) Rᵀ, or G = (G R) Rᵀ, G bfloat16 (m x n), R (n x s).
//
// Moves: G read once and written once, 4 m n bytes; R once per cluster. Computes 6 m n s operations on tensor cores, the
// coefficients being two bfloat16 factors (with a float32 R, kept as two parts, 10 m n s).
//
// A cluster of blocks takes 64 or 32 rows at a time. Each block holds some of their columns, and the same rows of R, in
// shared memory; its part of G R goes there in float32. The parts are summed in the order of the blocks over distributed
// shared memory, each block for a slice, and read back as two factors, to 2^-17. Nothing depends on how many clusters
// run: results are the same to the bit every time.
//
// An SM would stand still while a lone block waits for its cluster. `right_panels` therefore prefers two blocks an SM, and
// two panels a block: 4096 columns at rank 64 take 16 blocks of 113 KB, all that half an SM has.
//
// NOT YET RUN ON A GPU: it compiles, and dispatch does not choose it. Not for float16, whose coefficients can overflow,
// for ranks above 128, or matrices too wide for the shared memory of 16 blocks (`right_panels`).
#include "cuda/project_right.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/row_panels.h"

namespace sculpt {
namespace {

// Starts to copy the block's rows of R, from `first_row` on, zero beyond R.
template <int RANK_TILES, bool SPLIT>
__device__ void load_slice(__nv_bfloat16* high, __nv_bfloat16* low, const void* basis, int64_t first_row, int64_t n, int s,
                           int rows) {
  constexpr int kChunks = 2 * RANK_TILES;
  for (int i = threadIdx.x; i < rows * kChunks; i += kPanelThreads) {
    const int row = i / kChunks, chunk = i % kChunks, place = basis_place<RANK_TILES>(row, chunk), left = s - 8 * chunk;
    const bool inside = first_row + row < n;
    const int64_t at = (first_row + row) * s + 8 * chunk;
    if constexpr (SPLIT) {
      const float* from = static_cast<const float*>(basis) + at;
      float x[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) x[j] = inside && j < left ? from[j] : 0.0f;
      store_parts(high + place, low + place, make_float4(x[0], x[1], x[2], x[3]));
      store_parts(high + place + 4, low + place + 4, make_float4(x[4], x[5], x[6], x[7]));
    } else {
      const __nv_bfloat16* from = static_cast<const __nv_bfloat16*>(basis) + at;
      if (s % 8 == 0 && inside && left > 0) {
        copy_async(high + place, from);
        continue;
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) high[place + j] = inside && j < left ? from[j] : __float2bfloat16_rn(0.0f);
    }
  }
}

// ROW_TILES: rows of a panel / 16. RANK_TILES: ranks / 16. SPLIT: R is float32. 128 registers, so that two blocks fit.
template <int ROW_TILES, int RANK_TILES, bool SPLIT>
__global__ void __launch_bounds__(kPanelThreads, 2) project_right(__nv_bfloat16* grad, const void* basis, int64_t m,
                                                                   int64_t n, int s, int columns, int buffers, bool keep) {
  constexpr int kRows = 16 * ROW_TILES, kRanks = 16 * RANK_TILES, kTiles = ROW_TILES == 4 ? 8 : 4;
  const int blocks = cluster_size(), block = cluster_rank();
  const int clusters = gridDim.x / blocks;
  const int64_t first_column = static_cast<int64_t>(block) * columns;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, chunks = columns / 8;

  extern __shared__ __align__(128) unsigned char memory[];
  auto* high = reinterpret_cast<__nv_bfloat16*>(memory);
  auto* low = high + columns * kRanks;
  auto* panels = SPLIT ? low + columns * kRanks : low;
  // The parts, and when all have been summed the factors.
  auto* factor_high = panels + buffers * kRows * columns;
  auto* factor_low = factor_high + kRows * kRanks;
  auto* part = reinterpret_cast<float*>(factor_high);
  auto* sum = part + kRows * kRanks;
  const int slice = kRows * kRanks / 4 / blocks;

  // Panels of a matrix that fits a GPU are far fewer than 2^31.
  const int last = static_cast<int>((m + kRows - 1) / kRows);
  const auto window = [&](int p) { return Window(grad, m, n, static_cast<int64_t>(p) * kRows, first_column); };
  int p = blockIdx.x / blocks;
  if (buffers == 2) load_panel(panels, window(p), kRows, chunks);
  load_slice<RANK_TILES, SPLIT>(high, low, basis, first_column, n, s, columns);
  end_group_of_copies();

  for (int turn = 0; p < last; p += clusters, turn ^= 1) {
    __nv_bfloat16* panel = panels + (buffers == 2 ? turn * kRows * columns : 0);
    if (buffers == 2) {
      if (p + clusters < last) load_panel(panels + (turn ^ 1) * kRows * columns, window(p + clusters), kRows, chunks);
      end_group_of_copies();
      wait_for_groups<1>();
    } else {
      load_panel(panel, window(p), kRows, chunks);
      end_group_of_copies();
      wait_for_groups<0>();
    }
    __syncthreads();

    {
      PanelProduct<ROW_TILES, RANK_TILES, SPLIT> product;
      product.compute(panel, chunks, high, low, warp, lane);
      product.store(part, warp, lane);
    }
    // Parts are whole, and no block still reads the last panel's sums.
    cluster_barrier();
    for (int i = thread; i < slice; i += kPanelThreads)
      reinterpret_cast<float4*>(sum)[i] = sum_of_parts(part, block * slice + i, blocks);
    // Sums are whole, and no block still reads this panel's parts.
    cluster_barrier();
    // Up to four reads of other blocks' memory on their way at once.
    constexpr int kEach = kRows * kRanks / 4 / kPanelThreads, kAtOnce = kEach > 4 ? 4 : kEach > 1 ? kEach : 1;
#pragma unroll 1
    for (int first = thread; first < kRows * kRanks / 4; first += kAtOnce * kPanelThreads) {
      float4 values[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = first + j * kPanelThreads;
        values[j] = of_block(sum, i / slice, i % slice);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = first + j * kPanelThreads;
        const int row = 4 * i / kRanks, column = sum_column<RANK_TILES>(row, 4 * i % kRanks);
        const int place = basis_place<RANK_TILES>(row, column / 8) + column % 8;
        store_parts(factor_high + place, factor_low + place, values[j]);
      }
    }
    __syncthreads();

    constexpr int kRowGroups = ROW_TILES / 2;
#pragma unroll 1
    for (int unit = warp; unit < columns / (8 * kTiles) * kRowGroups; unit += kPanelThreads / 32) {
      const int row = unit % kRowGroups * 32, column = unit / kRowGroups * 8 * kTiles;
      Correction<kTiles> correction;
      correction.template add<RANK_TILES, true, SPLIT>(factor_high, factor_low, high, low, row, column, lane);
      correction.write(panel, window(p), chunks, row, column, keep, lane);
    }
    // The panel after the next overwrites this one, the next one's parts the factors.
    __syncthreads();
  }
  // No block may go while another reads its sums.
  cluster_barrier();
}

using Kernel = void (*)(__nv_bfloat16*, const void*, int64_t, int64_t, int, int, int, bool);

template <int ROW_TILES, bool SPLIT>
Kernel kernel_of(int64_t ranks) {
  switch (ranks) {
    case 16: return project_right<ROW_TILES, 1, SPLIT>;
    case 32: return project_right<ROW_TILES, 2, SPLIT>;
    case 64: return project_right<ROW_TILES, 4, SPLIT>;
    default: return project_right<ROW_TILES, 8, SPLIT>;
  }
}

Kernel kernel_of(const RightPanels& plan, bool split) {
  if (plan.rows == 64) return split ? kernel_of<4, true>(plan.ranks) : kernel_of<4, false>(plan.ranks);
  return split ? kernel_of<2, true>(plan.ranks) : kernel_of<2, false>(plan.ranks);
}

}  // namespace

cudaError_t project_right_sm90a(void* grad, const void* basis, int64_t m, int64_t n, int64_t s, bool split, bool keep,
                                const RightPanels& plan, cudaStream_t stream) {
  if (!plan.fits) return cudaErrorInvalidValue;
  const Kernel kernel = kernel_of(plan, split);
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.bytes));
  // All of the SM's memory as shared memory, without which two blocks would not find room.
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess && plan.cluster > 8)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;

  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(plan.cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.cluster));
  config.blockDim = dim3(kPanelThreads);
  config.dynamicSmemBytes = static_cast<size_t>(plan.bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (error != cudaSuccess) return error;
  // A GPU whose GPCs are cut smaller than the cluster.
  if (clusters < 1) return cudaErrorInvalidConfiguration;
  const int64_t panels = (m + plan.rows - 1) / plan.rows;
  // As few clusters as need no more rounds: a panel more for some would leave the others waiting.
  const int64_t rounds = (panels + clusters - 1) / clusters;
  config.gridDim = dim3(static_cast<unsigned>(plan.cluster * ((panels + rounds - 1) / rounds)));
  return cudaLaunchKernelEx(&config, kernel, static_cast<__nv_bfloat16*>(grad), basis, m, n, static_cast<int>(s),
                            static_cast<int>(plan.columns), static_cast<int>(plan.buffers), keep);
}

}  // namespace sculpt

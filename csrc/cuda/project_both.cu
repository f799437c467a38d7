// Both sides removed, G = (I - L Lᵀ) G (I - R Rᵀ), or G -= L (Lᵀ G R) Rᵀ (`block`), G bfloat16 (m x n): G is read once for
// all that is needed of it, then read and written once.
//
//   1. split    L and R as bfloat16 parts, padded
//   2. thin     (both_thin.h) reads G: X = G R, Y = Lᵀ G and the core C = Y R, in parts
//   3. sum      Y and C from their parts, Y as two bfloat16 factors
//   4. factor   X' = X - L C, for `block` L C, as two bfloat16 factors
//   5. update   G -= L Y + X' Rᵀ, for `block` G -= (L C) Rᵀ
//
// Moves 6 m n bytes of G. The parts of X are 4 m s bytes for 2048 columns (a cluster sums its own), those of Y 4 n r bytes
// for the rows of a block; for 4096 x 4096 at rank 64 together half of G, written and read once. Computes 2 m n (r + s)
// operations in pass 2 and 4 m n (r + s) in pass 5, with a float32 basis 4 and 6.
// Every sum has a fixed order, which depends on shapes and GPU alone: results are the same to the bit every time.
//
// Tests passed on an H200, where it is faster than library products at small ranks (csrc/common/heuristics.h). Not for
// ranks above 128.
#include "cuda/project_both.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/both_thin.h"
#include "cuda/row_panels.h"
#include "cuda/runs.h"

namespace sculpt {
namespace {

// Rows of a block of `factor`.
constexpr int kFactorRows = 32;

__device__ float read(const void* from, int64_t at, bool is_float) {
  return is_float ? static_cast<const float*>(from)[at] : __bfloat162float(static_cast<const Half*>(from)[at]);
}

__global__ void __launch_bounds__(kPanelThreads)
    split(BothBases bases, Pointers to, int64_t m, int64_t n, int ranks, bool low) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kPanelThreads, end = (m + n) * ranks;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kPanelThreads + threadIdx.x; i < end; i += step) {
    const bool is_left = i < m * ranks;
    const int64_t at = is_left ? i : i - m * ranks, row = at / ranks, column = at % ranks;
    const int64_t rank = is_left ? bases.r : bases.s;
    const float value = column >= rank ? 0.0f
                        : is_left      ? read(bases.left, row * rank + column, bases.left_float)
                                       : read(bases.right, row * rank + column, bases.right_float);
    const Parts parts(value);
    (is_left ? to.left_high : to.right_high)[at] = parts.high;
    if (low) (is_left ? to.left_low : to.right_low)[at] = parts.low;
  }
}

// The first blocks sum the core, 8 times 4 numbers each, its many parts in 32 runs; the others Y.
__global__ void __launch_bounds__(kPanelThreads) sum(Pointers p, int64_t n, int ranks, int chunks, int core_parts) {
  __shared__ float4 runs[kPanelThreads];
  const int thread = threadIdx.x;
  const int64_t size = ranks * ranks / 4, core_blocks = size / 8;
  if (blockIdx.x < core_blocks) {
    const int64_t at = blockIdx.x * 8 + thread % 8;
    const int run = thread / 8, each = (core_parts + 31) / 32;
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
    for (int part = run * each; part < min(core_parts, (run + 1) * each); ++part)
      total = plus(total, reinterpret_cast<const float4*>(p.core_parts)[part * size + at]);
    runs[thread] = total;
    __syncthreads();
    if (thread >= 8) return;
    for (int other = 1; other < 32; ++other) total = plus(total, runs[8 * other + thread]);
    reinterpret_cast<float4*>(p.core)[at] = total;
    return;
  }
  const int64_t at = (blockIdx.x - core_blocks) * kPanelThreads + thread, all = n * ranks / 4;
  if (at >= all) return;
  float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
  for (int chunk = 0; chunk < chunks; ++chunk)
    total = plus(total, reinterpret_cast<const float4*>(p.column_parts)[chunk * all + at]);
  store_parts(p.column_high + 4 * at, p.column_low + 4 * at, total);
}

__global__ void __launch_bounds__(kPanelThreads)
    factor(Pointers p, int64_t m, int ranks, int groups, bool low, bool both) {
  extern __shared__ __align__(128) unsigned char memory[];
  auto* core = reinterpret_cast<float*>(memory);
  auto* left = core + ranks * ranks;
  const int thread = threadIdx.x, wide = ranks / 4;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kFactorRows;
  for (int i = thread; i < ranks * wide; i += kPanelThreads)
    reinterpret_cast<float4*>(core)[i] = reinterpret_cast<const float4*>(p.core)[i];
  for (int i = thread; i < kFactorRows * ranks; i += kPanelThreads) {
    const int64_t at = first_row * ranks + i;
    float value = 0.0f;
    if (at < m * ranks) value = __bfloat162float(p.left_high[at]) + (low ? __bfloat162float(p.left_low[at]) : 0.0f);
    left[i] = value;
  }
  __syncthreads();
  for (int i = thread; i < kFactorRows * wide; i += kPanelThreads) {
    const int row = i / wide, column = 4 * (i % wide);
    const int64_t at = (first_row + row) * ranks + column;
    if (first_row + row >= m) continue;
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
    for (int k = 0; k < ranks; ++k) {
      const float x = left[row * ranks + k];
      const float4 y = *reinterpret_cast<const float4*>(core + k * ranks + column);
      total.x += x * y.x, total.y += x * y.y, total.z += x * y.z, total.w += x * y.w;
    }
    if (both) {
      float4 product = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      for (int group = 0; group < groups; ++group)
        product = plus(product, *reinterpret_cast<const float4*>(p.row_parts + group * m * ranks + at));
      total = make_float4(product.x - total.x, product.y - total.y, product.z - total.z, product.w - total.w);
    }
    store_parts(p.row_high + at, p.row_low + at, total);
  }
}

// A block: the factors of its columns stay in shared memory, panels of rows and their factors pass through it.
template <int ROW_TILES, int RANK_TILES, bool SPLIT>
__global__ void __launch_bounds__(kPanelThreads, RANK_TILES <= 2 ? 2 : 1)
    update(Half* grad, Pointers p, int64_t m, int64_t n, int panels_each, bool both) {
  constexpr int kRanks = 16 * RANK_TILES, kColumns = RANK_TILES <= 4 ? 256 : 128, kSides = SPLIT ? 2 : 1;
  constexpr int kRows = 16 * ROW_TILES, kSlice = kColumns * kRanks, kPanel = kRows * kRanks, kChunks = kColumns / 8;
  // A tile a warp.
  constexpr int kTiles = kColumns * ROW_TILES / 2 / 8 / kWarps;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kColumns;

  extern __shared__ __align__(128) unsigned char memory[];
  auto* right = reinterpret_cast<Half*>(memory);
  auto* columns = right + kSides * kSlice;
  auto* panels = columns + (both ? 2 * kSlice : 0);
  // Of each panel X' in two parts, then L.
  auto* rows = panels + 2 * kRows * kColumns;
  const int rows_each = (both ? 2 + kSides : 2) * kPanel;

  const int all = static_cast<int>((m + kRows - 1) / kRows), begin = static_cast<int>(blockIdx.y) * panels_each;
  const int end = all - begin < panels_each ? all : begin + panels_each;
  const auto load = [&](int panel, int buffer) {
    const int64_t row = static_cast<int64_t>(panel) * kRows;
    load_panel(panels + buffer * kRows * kColumns, Window(grad, m, n, row, first_column), kRows, kChunks);
    Half* to = rows + buffer * rows_each;
    load_basis<RANK_TILES>(to, p.row_high, row, m, kRows);
    load_basis<RANK_TILES>(to + kPanel, p.row_low, row, m, kRows);
    if (both) load_basis<RANK_TILES>(to + 2 * kPanel, p.left_high, row, m, kRows);
    if (SPLIT && both) load_basis<RANK_TILES>(to + 3 * kPanel, p.left_low, row, m, kRows);
  };
  load_basis<RANK_TILES>(right, p.right_high, first_column, n, kColumns);
  if constexpr (SPLIT) load_basis<RANK_TILES>(right + kSlice, p.right_low, first_column, n, kColumns);
  if (both) {
    load_basis<RANK_TILES>(columns, p.column_high, first_column, n, kColumns);
    load_basis<RANK_TILES>(columns + kSlice, p.column_low, first_column, n, kColumns);
  }
  load(begin, 0);
  close_group();

  const int row = warp % (ROW_TILES / 2) * 32, column = warp / (ROW_TILES / 2) * 8 * kTiles;
  for (int panel = begin, turn = 0; panel < end; ++panel, turn ^= 1) {
    if (panel + 1 < end) load(panel + 1, turn ^ 1);
    close_group();
    wait_for_groups<1>();
    __syncthreads();
    const Half* factors = rows + turn * rows_each;
    Correction<kTiles> correction;
    correction.template add<RANK_TILES, true, SPLIT>(factors, factors + kPanel, right, right + kSlice, row, column, lane);
    if (both)
      correction.template add<RANK_TILES, SPLIT, true>(factors + 2 * kPanel, factors + 3 * kPanel, columns,
                                                       columns + kSlice, row, column, lane);
    const Window window(grad, m, n, static_cast<int64_t>(panel) * kRows, first_column);
    correction.write(panels + turn * kRows * kColumns, window, kChunks, row, column, lane);
    // The panel after the next overwrites this one.
    __syncthreads();
  }
}

using Kernel = void (*)(Half*, Pointers, int64_t, int64_t, int, bool);

template <bool SPLIT>
Kernel thin_of(int64_t ranks) {
  switch (ranks) {
    case 16: return thin<1, SPLIT>;
    case 32: return thin<2, SPLIT>;
    case 64: return thin<4, SPLIT>;
    default: return thin<8, SPLIT>;
  }
}

template <bool SPLIT>
Kernel update_of(int64_t ranks) {
  switch (ranks) {
    case 16: return update<2, 1, SPLIT>;
    case 32: return update<2, 2, SPLIT>;
    case 64: return update<2, 4, SPLIT>;
    default: return update<2, 8, SPLIT>;
  }
}

// Room for `bytes` of shared memory, and all of the SM's memory as shared memory, for more than one block.
template <typename... Parameters>
cudaError_t make_room(void (*kernel)(Parameters...), int64_t bytes) {
  if (bytes == 0) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int64_t bytes, int64_t cluster, cudaStream_t stream,
                   Arguments... arguments) {
  const cudaError_t error = make_room(kernel, bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(kPanelThreads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return cleared(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// Fewer blocks below each other where the GPU holds fewer clusters than its multiprocessors have room for (a GPC may be
// left with a part of one): a second round for a few of them would take as long as the first.
cudaError_t limit_chunks(Pass& thin, Kernel kernel, int64_t cluster, int64_t m) {
  if (cluster == 1) return cudaSuccess;
  cudaError_t error = make_room(kernel, thin.bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(cluster));
  config.blockDim = dim3(kPanelThreads);
  config.dynamicSmemBytes = static_cast<size_t>(thin.bytes);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  error = cleared(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
  if (error != cudaSuccess) return error;
  if (clusters < 1) return cudaErrorInvalidConfiguration;
  const int64_t most = std::max<int64_t>(1, clusters * cluster / thin.slices);
  if (thin.chunks <= most) return cudaSuccess;
  const int64_t panels = (m + thin.rows - 1) / thin.rows;
  thin.panels = (panels + most - 1) / most;
  thin.chunks = (panels + thin.panels - 1) / thin.panels;
  return cudaSuccess;
}

dim3 blocks(int64_t x, int64_t y = 1) { return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)); }

}  // namespace

bool both_runs() { return has_code(split); }

cudaError_t both_device(BothDevice* device) {
  int index = 0, multiprocessors = 0, bytes = 0, major = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  *device = {multiprocessors, bytes, major};
  return error;
}

cudaError_t project_both(void* grad, const BothBases& bases, int64_t m, int64_t n, bool block, const BothPanels& plan,
                         void* scratch, cudaStream_t stream) {
  if (!plan.fits) return cudaErrorInvalidValue;
  const auto at = [&](int64_t offset) { return static_cast<unsigned char*>(scratch) + offset; };
  const auto half = [&](int64_t offset) { return reinterpret_cast<Half*>(at(offset)); };
  const auto single = [&](int64_t offset) { return reinterpret_cast<float*>(at(offset)); };
  const Pointers p{half(plan.left_high), half(plan.left_low), half(plan.right_high), half(plan.right_low),
                   half(plan.row_high), half(plan.row_low), half(plan.column_high), half(plan.column_low),
                   single(plan.row_parts), single(plan.column_parts), single(plan.core_parts), single(plan.core)};
  const bool low = bases.left_float || bases.right_float, both = !block;
  const int ranks = static_cast<int>(plan.ranks);
  auto* matrix = static_cast<Half*>(grad);

  const Kernel thin_kernel = low ? thin_of<true>(ranks) : thin_of<false>(ranks);
  Pass pass = plan.thin;
  cudaError_t error = limit_chunks(pass, thin_kernel, plan.cluster, m);
  if (error != cudaSuccess) return error;
  const int64_t split_blocks = std::min<int64_t>(((m + n) * ranks + 4 * kPanelThreads - 1) / (4 * kPanelThreads), 1 << 20);
  error = launch(split, blocks(split_blocks), 0, 1, stream, bases, p, m, n, ranks, low);
  if (error != cudaSuccess) return error;
  error = launch(thin_kernel, blocks(pass.slices, pass.chunks), pass.bytes, plan.cluster, stream, matrix, p, m, n,
                 static_cast<int>(pass.panels), both);
  if (error != cudaSuccess) return error;
  const int64_t core_blocks = ranks * ranks / 32;
  const int64_t column_blocks = both ? (n * ranks / 4 + kPanelThreads - 1) / kPanelThreads : 0;
  error = launch(sum, blocks(core_blocks + column_blocks), 0, 1, stream, p, n, ranks,
                 static_cast<int>(pass.chunks), static_cast<int>(pass.slices * pass.chunks));
  if (error != cudaSuccess) return error;
  error = launch(factor, blocks((m + kFactorRows - 1) / kFactorRows), (ranks + kFactorRows) * ranks * 4, 1, stream, p, m,
                 ranks, static_cast<int>(plan.groups), low, both);
  if (error != cudaSuccess) return error;
  const Kernel kernel = plan.update.rows == 64 ? update<4, 4, false>
                        : low                  ? update_of<true>(ranks)
                                               : update_of<false>(ranks);
  return launch(kernel, blocks(plan.update.slices, plan.update.chunks), plan.update.bytes, 1, stream, matrix, p, m, n,
                static_cast<int>(plan.update.panels), both);
}

}  // namespace sculpt

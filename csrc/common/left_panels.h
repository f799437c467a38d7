// How csrc/cuda/project_left_sm90a.cu divides a matrix: pure functions, so that they are tested without a GPU.
#pragma once
#include <algorithm>
#include <cstdint>

namespace sculpt {

// A row of a panel is 128 bytes: one full line of memory.
constexpr int64_t kPanelColumns = 64;
// 16 bytes after every row of a 16-bit array: rows that are read together lie in different banks.
constexpr int64_t kPanelPitch = kPanelColumns + 8;
// Rows of coefficients in float32, the sum of the cluster's parts.
constexpr int64_t kPartPitch = kPanelColumns + 4;
// Of an SM of capability 9.0, less the kilobyte that each block reserves.
constexpr int64_t kSharedBytes = 227 * 1024;
constexpr int64_t kMaxLeftRank = 128;
// Beyond 8 blocks a cluster needs cudaFuncAttributeNonPortableClusterSizeAllowed; an H100 has GPCs of 16 or 18 SMs.
constexpr int64_t kMaxCluster = 16;

// fits: whether the kernel can run. cluster: blocks that share a panel, each `rows` of its rows. ranks: the columns of
// the basis, padded to 16, 32, 64 or 128. bytes: shared memory of a block.
struct LeftPanels {
  bool fits = false;
  int64_t cluster = 0, rows = 0, ranks = 0, bytes = 0;
};

// `split`: the basis is float32, kept as two bfloat16 parts.
inline int64_t left_panel_bytes(int64_t rows, int64_t ranks, int64_t cluster, bool split) {
  const int64_t basis = rows * (ranks + 8) * 2 * (split ? 2 : 1), panel = rows * kPanelPitch * 2;
  const int64_t factors = 2 * ranks * kPanelPitch * 2;
  const int64_t parts = ranks * kPartPitch * 4, sums = ranks * kPanelColumns / cluster * 4;
  return basis + panel + factors + parts + sums;
}

// The fewest blocks a cluster into whose shared memory a panel and its rows of the basis fit; more while the GPU would
// otherwise have multiprocessors with nothing to do.
inline LeftPanels left_panels(int64_t m, int64_t n, int64_t r, bool split, int64_t multiprocessors) {
  LeftPanels plan;
  if (m < 1 || n < 1 || r < 1 || r > std::min(m, kMaxLeftRank)) return plan;
  plan.ranks = 16;
  while (plan.ranks < r) plan.ranks *= 2;
  const int64_t panels = (n + kPanelColumns - 1) / kPanelColumns;
  for (int64_t cluster = 1; cluster <= kMaxCluster; cluster *= 2) {
    const int64_t rows = ((m + cluster - 1) / cluster + 15) / 16 * 16;
    const int64_t bytes = left_panel_bytes(rows, plan.ranks, cluster, split);
    // No block without a row, and none with too few to be worth its share of the sums.
    if (plan.fits && (panels * plan.cluster >= multiprocessors || rows < 64)) break;
    if (bytes > kSharedBytes || (cluster - 1) * rows >= m) continue;
    plan.fits = true, plan.cluster = cluster, plan.rows = rows, plan.bytes = bytes;
  }
  return plan;
}

}  // namespace sculpt

// How csrc/cuda/project_right_sm90a.cu divides a matrix: pure functions, so that they are tested without a GPU.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/left_panels.h"

namespace sculpt {

// A block's columns come in groups of this many: 128 bytes of a row, a full line of memory.
constexpr int64_t kColumnGroup = 64;
constexpr int64_t kMaxRightRank = 128;
// For each of two blocks on an SM of capability 9.0, which has 228 KB and keeps one back for each.
constexpr int64_t kHalfSharedBytes = 113 * 1024;
// Fewer columns in a block are not worth its share of the sums.
constexpr int64_t kLeastColumns = 128;
// Panels are counted in 32 bits.
constexpr int64_t kMaxRightRows = int64_t(1) << 36;

// fits: whether the kernel can run. cluster: blocks that share a panel of `rows` rows, each `columns` of its columns.
// buffers: panels in shared memory at once. ranks: the basis's columns, padded to 16, 32, 64 or 128. bytes: shared
// memory of a block.
struct RightPanels {
  bool fits = false;
  int64_t cluster = 0, columns = 0, rows = 0, buffers = 0, ranks = 0, bytes = 0;
};

// `split`: the basis is float32, kept as two bfloat16 parts. A block's float32 parts and the two bfloat16 factors made of
// their sums take turns in the same memory.
inline int64_t right_panel_bytes(int64_t columns, int64_t rows, int64_t buffers, int64_t ranks, int64_t cluster,
                                 bool split) {
  const int64_t basis = columns * ranks * 2 * (split ? 2 : 1), panels = buffers * rows * columns * 2;
  return basis + panels + rows * ranks * 4 + rows * ranks / cluster * 4;
}

// Best first: two blocks an SM, so that one moves what the other computes; then a panel loaded while another is computed;
// then many rows, which share the cluster's two barriers. Of each the fewest blocks a cluster; more while multiprocessors
// would have nothing to do.
inline RightPanels right_panels(int64_t m, int64_t n, int64_t s, bool split, int64_t multiprocessors) {
  RightPanels plan;
  if (m < 1 || m >= kMaxRightRows || n < 1 || s < 1 || s > std::min(n, kMaxRightRank)) return plan;
  plan.ranks = 16;
  while (plan.ranks < s) plan.ranks *= 2;
  struct Choice {
    int64_t limit, rows, buffers;
  };
  constexpr Choice kChoices[] = {{kHalfSharedBytes, 64, 2}, {kHalfSharedBytes, 32, 2}, {kHalfSharedBytes, 32, 1},
                                 {kSharedBytes, 64, 2},     {kSharedBytes, 32, 2},     {kSharedBytes, 32, 1}};
  for (const Choice& choice : kChoices) {
    const int64_t panels = (m + choice.rows - 1) / choice.rows;
    for (int64_t cluster = 1; cluster <= kMaxCluster; cluster *= 2) {
      const int64_t columns = ((n + cluster - 1) / cluster + kColumnGroup - 1) / kColumnGroup * kColumnGroup;
      const int64_t bytes = right_panel_bytes(columns, choice.rows, choice.buffers, plan.ranks, cluster, split);
      if (plan.fits && (panels * plan.cluster >= multiprocessors || columns < kLeastColumns)) break;
      // No block without a column.
      if (bytes > choice.limit || (cluster - 1) * columns >= n) continue;
      plan.fits = true, plan.cluster = cluster, plan.columns = columns, plan.bytes = bytes;
      plan.rows = choice.rows, plan.buffers = choice.buffers;
    }
    if (plan.fits) break;
  }
  return plan;
}

}  // namespace sculpt

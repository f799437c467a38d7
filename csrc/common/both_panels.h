// How csrc/cuda/project_both.cu divides a matrix and its scratch memory: pure functions, tested without a GPU.
#pragma once
#include <algorithm>
#include <cstdint>

namespace sculpt {

constexpr int64_t kMaxBothRank = 128;
// Columns of a block of the first pass: 32 for each of its 8 warps.
constexpr int64_t kThinColumns = 256;
// Up to 8 blocks make a cluster on every GPU of capability 9.0 and later.
constexpr int64_t kThinCluster = 8;

// The GPU: multiprocessors, most shared memory of a block (an SM has a kilobyte more), and its generation: from 9 on it has
// clusters.
struct BothDevice {
  int64_t multiprocessors = 0, shared_bytes = 0;
  int major = 0;
};

// What a pass does: blocks side by side, blocks one below the other, panels of `rows` rows that each of these takes, and
// shared memory of a block.
struct Pass {
  int64_t columns = 0, slices = 0, rows = 0, chunks = 0, panels = 0, bytes = 0;
};

// ranks: both bases' columns, padded alike to 16, 32, 64 or 128. cluster: blocks side by side in the first pass that sum
// their parts of G R. groups: clusters side by side. Then bytes from the beginning of the scratch memory.
struct BothPanels {
  bool fits = false;
  int64_t ranks = 0, cluster = 0, groups = 0;
  Pass thin, update;
  int64_t left_high = 0, left_low = 0, right_high = 0, right_low = 0, row_high = 0, row_low = 0, column_high = 0,
          column_low = 0, row_parts = 0, column_parts = 0, core_parts = 0, core = 0, bytes = 0;
};

inline int64_t blocks_that_fit(int64_t bytes, const BothDevice& device) {
  return std::max<int64_t>(1, (device.shared_bytes + 1024) / (bytes + 1024));
}

// As many blocks below each other as the GPU holds at once, and no more than there are panels.
inline void divide_rows(Pass& pass, int64_t m, int64_t resident, const BothDevice& device) {
  const int64_t panels = (m + pass.rows - 1) / pass.rows;
  const int64_t most = std::min<int64_t>(panels, 65535);
  const int64_t chunks = std::clamp<int64_t>(resident * device.multiprocessors / pass.slices, 1, most);
  pass.panels = (panels + chunks - 1) / chunks;
  pass.chunks = (panels + pass.panels - 1) / pass.panels;
}

// `split`: a basis is float32, and both are kept as two bfloat16 parts. `block`: I - L Lᵀ · R Rᵀ, without G R.
inline BothPanels both_panels(int64_t m, int64_t n, int64_t r, int64_t s, bool split, bool block,
                              const BothDevice& device) {
  BothPanels plan;
  if (m < 1 || n < 1 || r < 1 || s < 1 || r > std::min(m, kMaxBothRank) || s > std::min(n, kMaxBothRank)) return plan;
  // Panels and blocks are counted in 32 bits.
  if (m >= int64_t(1) << 36 || n >= int64_t(1) << 36) return plan;
  plan.ranks = 16;
  while (plan.ranks < std::max(r, s)) plan.ranks *= 2;
  const int64_t parts = split ? 2 : 1, row = 2 * plan.ranks;

  Pass& thin = plan.thin;
  thin.columns = kThinColumns, thin.slices = (n + kThinColumns - 1) / kThinColumns;
  // The largest cluster that adds at most a tenth of blocks with nothing to do.
  plan.cluster = device.major >= 9 ? kThinCluster : 1;
  const auto padded = [&](int64_t cluster) { return (thin.slices + cluster - 1) / cluster * cluster; };
  while (plan.cluster > 1 && 10 * padded(plan.cluster) > 11 * thin.slices) plan.cluster /= 2;
  thin.slices = padded(plan.cluster), plan.groups = thin.slices / plan.cluster;
  thin.rows = plan.ranks * parts <= 64 ? 64 : 32;
  thin.bytes = kThinColumns * row * parts + 2 * thin.rows * (2 * kThinColumns + row * parts);
  divide_rows(thin, m, plan.ranks <= 64 ? std::min<int64_t>(2, blocks_that_fit(thin.bytes, device)) : 1, device);

  Pass& update = plan.update;
  update.columns = plan.ranks <= 64 ? 256 : 128, update.slices = (n + update.columns - 1) / update.columns;
  const int64_t by_column = (block ? 0 : 2) + parts, by_row = (block ? 0 : parts) + 2;
  const auto bytes = [&](int64_t rows) {
    return update.columns * row * by_column + 2 * rows * (2 * update.columns + row * by_row);
  };
  // 64 rows read the columns' factors half as often; with other ranks the kernel has no registers or memory for them.
  update.rows = plan.ranks == 64 && !split && bytes(64) <= device.shared_bytes ? 64 : 32;
  update.bytes = bytes(update.rows);
  divide_rows(update, m, plan.ranks <= 32 ? std::min<int64_t>(2, blocks_that_fit(update.bytes, device)) : 1, device);

  int64_t end = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t begin = end;
    end += (bytes + 255) / 256 * 256;
    return begin;
  };
  plan.left_high = take(m * row), plan.left_low = take(split ? m * row : 0);
  plan.right_high = take(n * row), plan.right_low = take(split ? n * row : 0);
  plan.row_high = take(m * row), plan.row_low = take(m * row);
  plan.column_high = take(block ? 0 : n * row), plan.column_low = take(block ? 0 : n * row);
  plan.row_parts = take(block ? 0 : plan.groups * m * row * 2);
  plan.column_parts = take(block ? 0 : thin.chunks * n * row * 2);
  plan.core_parts = take(thin.slices * thin.chunks * plan.ranks * row * 2);
  plan.core = take(plan.ranks * row * 2);
  plan.bytes = end;
  plan.fits = std::max(thin.bytes, update.bytes) <= device.shared_bytes;
  return plan;
}

}  // namespace sculpt

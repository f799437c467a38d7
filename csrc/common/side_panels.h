// How csrc/cuda/project_side_sm90a.cu divides a matrix: pure functions, so that they are tested without a GPU.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/bits.h"

namespace sculpt {

// Of an SM of capability 9.0, less the kilobyte that each block reserves.
constexpr int64_t kSharedBytes = 227 * 1024;
constexpr int64_t kMaxSideRank = 128;
constexpr int64_t kMaxSideRankFloat32 = 64;
// Beyond 8 blocks a cluster needs cudaFuncAttributeNonPortableClusterSizeAllowed; an H100 has GPCs of 16 or 18 SMs.
constexpr int64_t kMaxCluster = 16;
// A panel is this wide, and is held in square tiles: 128 bytes of a row, one full line of memory, and the rows of one
// tensor-core product.
constexpr int64_t kTile = 64;
// Panels in shared memory at a time: one is corrected while the other is multiplied. A third, loaded meanwhile, was no
// faster on an H200, and needs more blocks a cluster.
constexpr int64_t kPanelStages = 2;
// Ranks that a block at least adds up: four float32 are stored at once.
constexpr int64_t kLeastOwned = 4;

// Left: `length` is m, `extent` n, a panel some columns; right: n, m, some rows.
//
// fits: whether the kernel can run. cluster: blocks that share a panel, each with `rows` of its length and those rows of
// the basis. ranks: the columns of the basis, padded to 16, 32, 64 or 128. owned: ranks whose parts a block adds up;
// `ranks / owned` of the blocks do. bytes: shared memory of a block.
struct SidePanels {
  bool fits = false;
  int64_t cluster = 0, rows = 0, ranks = 0, owned = 0, bytes = 0;
};

// `split`: the basis is float32, kept as two bfloat16 parts. The factors of two panels, in two bfloat16 parts each, and
// one panel's parts of them in float32 lie beside the panels, with three barriers and a word.
inline int64_t side_panel_bytes(const SidePanels& plan, bool split) {
  const int64_t basis = plan.rows * plan.ranks * 2 * (split ? 2 : 1);
  const int64_t panels = kPanelStages * plan.rows * kTile * 2;
  const int64_t factors = 2 * plan.ranks * kTile * 4, parts = plan.cluster * plan.owned * kTile * 4;
  return basis + panels + factors + parts + 4 * 8;
}

// The fewest blocks a cluster into whose shared memory all fits, more while the GPU would otherwise have multiprocessors
// with nothing to do. Few, since what a panel waits for the others costs as much for a small part of it: on an H200 two
// blocks of 512 rows took 8 us where four of 256 took 12.
inline SidePanels side_panels(int64_t length, int64_t extent, int64_t r, bool split, int64_t multiprocessors) {
  SidePanels best;
  const int64_t most = split ? kMaxSideRankFloat32 : kMaxSideRank;
  if (length < 1 || extent < 1 || r < 1 || r > std::min(length, most)) return best;
  SidePanels plan;
  plan.ranks = 16;
  while (plan.ranks < r) plan.ranks *= 2;
  const int64_t panels = (extent + kTile - 1) / kTile;
  for (plan.cluster = 1; plan.cluster <= kMaxCluster; plan.cluster *= 2) {
    plan.rows = ((length + plan.cluster - 1) / plan.cluster + kTile - 1) / kTile * kTile;
    plan.owned = std::max(kLeastOwned, plan.ranks / plan.cluster);
    plan.bytes = side_panel_bytes(plan, split);
    if (best.fits && panels * best.cluster >= multiprocessors) break;
    // No block without a row.
    if (plan.bytes > kSharedBytes || (plan.cluster - 1) * plan.rows >= length) continue;
    best = plan;
    best.fits = true;
  }
  return best;
}

// Where element (row, column) of rows of W 16-bit numbers lies. Pieces of 16 bytes change places within a row, by the
// row, so that the same piece of eight rows in a row lies in different banks: the swizzling modes of wgmma's operands.
template <int W>
SCULPT_HOST_DEVICE inline int swizzled(int row, int column) {
  static_assert(W == 16 || W == 32 || W == 64);
  constexpr int kPieces = W / 8, kShift = W == 64 ? 0 : W == 32 ? 1 : 2;
  return row * W + (((column / 8) ^ ((row >> kShift) & (kPieces - 1))) * 8) + column % 8;
}

}  // namespace sculpt

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
// Rows of the basis that are multiplied at a time: those of one tensor-core product.
constexpr int64_t kTile = 64;
// Exchanges under way at a time, at most: more were no faster on an H200.
constexpr int64_t kMostStages = 3;
// Panels in shared memory at a time, at most.
constexpr int64_t kMostSlots = 12;

// Left: `length` is m, `extent` n, a panel some columns; right: n, m, some rows.
//
// fits: whether the kernel can run. cluster: blocks that share a panel of `width`, each with `rows` of its length and those
// rows of the basis. ranks: the columns of the basis, padded to 16, 32, 64 or 128. owned: ranks whose parts a block adds
// up. slots: panels in shared memory. stages: exchanges under way. bytes: shared memory of a block.
struct SidePanels {
  bool fits = false;
  int64_t cluster = 0, width = 0, rows = 0, ranks = 0, owned = 0, slots = 0, stages = 0, bytes = 0;
};

// `split`: the basis is float32, kept as two bfloat16 parts. A stage has, of a coefficient, the parts of what the block owns
// (four bytes) and its factors (two bytes, or two of them). Then three barriers for every slot and stage that there could be.
inline int64_t side_panel_bytes(const SidePanels& plan, bool split) {
  const int64_t basis = plan.rows * plan.ranks * 2 * (split ? 2 : 1);
  const int64_t slot = plan.rows * plan.width * 2, stage = plan.ranks * plan.width * (split ? 8 : 6);
  return basis + plan.slots * slot + plan.stages * stage + 3 * 8 * (kMostSlots + kMostStages);
}

// With so many blocks and so wide: as many stages as fit beside one slot more, then as many slots as fit. Without two of
// both, or with a block that has no row (but for the second), it does not fit.
inline SidePanels side_panels_of(int64_t cluster, int64_t width, int64_t length, int64_t r, bool split) {
  SidePanels plan;
  plan.cluster = cluster, plan.width = width, plan.ranks = 16;
  while (plan.ranks < r) plan.ranks *= 2;
  plan.rows = ((length + cluster - 1) / cluster + kTile - 1) / kTile * kTile;
  plan.owned = plan.ranks / cluster;
  const auto bytes = [&](int64_t stages, int64_t slots) {
    plan.stages = stages, plan.slots = slots;
    return plan.bytes = side_panel_bytes(plan, split);
  };
  int64_t stages = kMostStages, slots = 2;
  while (stages > 2 && bytes(stages, stages + 1) > kSharedBytes) --stages;
  while (slots < kMostSlots && bytes(stages, slots + 1) <= kSharedBytes) ++slots;
  plan.fits = bytes(stages, slots) <= kSharedBytes && (cluster == 2 || (cluster - 1) * plan.rows < length);
  return plan;
}

// The fewest blocks a cluster with two slots more than stages, so that neither waits for the other, else those that have
// most slots; more while the GPU would otherwise have multiprocessors with nothing to do. Two at least: compute-sanitizer
// takes what a block alone sends to itself for a fault.
inline SidePanels side_panels_of_width(int64_t width, int64_t length, int64_t extent, int64_t r, bool split,
                                       int64_t multiprocessors) {
  SidePanels best;
  for (int64_t cluster = 2; cluster <= kMaxCluster; cluster *= 2) {
    const bool enough = best.fits && best.slots >= best.stages + 2;
    if (enough && (extent + width - 1) / width * best.cluster >= multiprocessors) break;
    const SidePanels plan = side_panels_of(cluster, width, length, r, split);
    if (plan.fits && (!best.fits || plan.slots > best.slots || enough)) best = plan;
  }
  return best;
}

// Panels of 32, or of 16 where only two of those fit: 11008 x 4096 at rank 64 takes 82 us with five slots of 16 and 95 with
// two of 32, but 108 with eight of 16 at rank 16 in float32 and 75 with three of 32 (left, an H200).
inline SidePanels side_panels(int64_t length, int64_t extent, int64_t r, bool split, int64_t multiprocessors) {
  const int64_t most = split ? kMaxSideRankFloat32 : kMaxSideRank, largest = int64_t(1) << 31;
  if (length < 1 || extent < 1 || length >= largest || extent >= largest || r < 1 || r > std::min(length, most))
    return {};
  const SidePanels wide = side_panels_of_width(32, length, extent, r, split, multiprocessors);
  if (wide.fits && wide.slots >= 3) return wide;
  const SidePanels narrow = side_panels_of_width(16, length, extent, r, split, multiprocessors);
  return narrow.fits && (!wide.fits || narrow.slots >= 4) ? narrow : wide;
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

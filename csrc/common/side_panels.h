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
// What is projected on: U Uᵀ of a bfloat16 U; of a float32 one, kept as two bfloat16 parts; U M Uᵀ of a bfloat16 U and a
// float32 M, kept as U and, in bfloat16, U (M - 1); or, of a float16 matrix, U Uᵀ of a float16 U.
enum class BasisForm { kBFloat16, kFloat32, kMetric, kFloat16 };
// Arrays that the basis is kept as, and factors that a coefficient is sent as.
SCULPT_HOST_DEVICE constexpr int parts_of(BasisForm form) {
  return form == BasisForm::kFloat32 || form == BasisForm::kMetric ? 2 : 1;
}
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

// A stage has, of a coefficient, the parts of what the block owns (four bytes) and its factors (two bytes each). Then three
// barriers for every slot and stage that there could be.
inline int64_t side_panel_bytes(const SidePanels& plan, BasisForm form) {
  const int64_t basis = plan.rows * plan.ranks * 2 * parts_of(form);
  const int64_t slot = plan.rows * plan.width * 2, stage = plan.ranks * plan.width * (4 + 2 * parts_of(form));
  return basis + plan.slots * slot + plan.stages * stage + 3 * 8 * (kMostSlots + kMostStages);
}

// With so many blocks and so wide: as many stages as fit beside one slot more, then as many slots as fit. Without two of
// both, or with a block that has no row (but for the second), it does not fit.
inline SidePanels side_panels_of(int64_t cluster, int64_t width, int64_t length, int64_t r, BasisForm form) {
  SidePanels plan;
  plan.cluster = cluster, plan.width = width, plan.ranks = 16;
  while (plan.ranks < r) plan.ranks *= 2;
  plan.rows = ((length + cluster - 1) / cluster + kTile - 1) / kTile * kTile;
  plan.owned = plan.ranks / cluster;
  const auto bytes = [&](int64_t stages, int64_t slots) {
    plan.stages = stages, plan.slots = slots;
    return plan.bytes = side_panel_bytes(plan, form);
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
inline SidePanels side_panels_of_width(int64_t width, int64_t length, int64_t extent, int64_t r, BasisForm form,
                                       int64_t multiprocessors) {
  SidePanels best;
  for (int64_t cluster = 2; cluster <= kMaxCluster; cluster *= 2) {
    const bool enough = best.fits && best.slots >= best.stages + 2;
    if (enough && (extent + width - 1) / width * best.cluster >= multiprocessors) break;
    const SidePanels plan = side_panels_of(cluster, width, length, r, form);
    if (plan.fits && (!best.fits || plan.slots > best.slots || enough)) best = plan;
  }
  return best;
}

// Panels of 32, or of 16 where only two of those fit: 11008 x 4096 at rank 64 takes 82 us with five slots of 16 and 95 with
// two of 32, but 108 with eight of 16 at rank 16 in float32 and 75 with three of 32 (left, an H200).
inline SidePanels side_panels(int64_t length, int64_t extent, int64_t r, BasisForm form, int64_t multiprocessors) {
  const int64_t most = form == BasisForm::kFloat32 ? kMaxSideRankFloat32 : kMaxSideRank, largest = int64_t(1) << 31;
  if (length < 1 || extent < 1 || length >= largest || extent >= largest || r < 1 || r > std::min(length, most))
    return {};
  const SidePanels wide = side_panels_of_width(32, length, extent, r, form, multiprocessors);
  if (wide.fits && wide.slots >= 3) return wide;
  const SidePanels narrow = side_panels_of_width(16, length, extent, r, form, multiprocessors);
  return narrow.fits && (!wide.fits || narrow.slots >= 4) ? narrow : wide;
}

// The panels of an entry that a cluster takes, numbered over all entries. Of one matrix clusters take panels in turn, which
// beside each other are brought from memory together: 2 to 8 % faster on an H200 than some in a row. Of a list they take
// some in a row, as a basis has to be brought for every entry.
struct PanelRun {
  int at, end, step;

  SCULPT_HOST_DEVICE PanelRun(int first, int count, int all, int cluster, int clusters, bool in_a_row) {
    const auto share = [&](int i) { return static_cast<int>(static_cast<int64_t>(all) * i / clusters); };
    const int begin = in_a_row ? share(cluster) : cluster, stop = in_a_row ? share(cluster + 1) : all;
    at = in_a_row && begin < first ? first : begin;
    end = stop < first + count ? stop : first + count;
    step = in_a_row ? 1 : clusters;
  }
  SCULPT_HOST_DEVICE explicit operator bool() const { return at < end; }
  SCULPT_HOST_DEVICE void next() { at += step; }
};

// Where element (row, column) of rows of W 16-bit numbers lies. Pieces of 16 bytes change places within a row, by the
// row, so that the same piece of eight rows in a row lies in different banks: the swizzling modes of wgmma's operands.
template <int W>
SCULPT_HOST_DEVICE inline int swizzled(int row, int column) {
  static_assert(W == 16 || W == 32 || W == 64);
  constexpr int kPieces = W / 8, kShift = W == 64 ? 0 : W == 32 ? 1 : 2;
  return row * W + (((column / 8) ^ ((row >> kShift) & (kPieces - 1))) * 8) + column % 8;
}

}  // namespace sculpt

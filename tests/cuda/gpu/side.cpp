// The launcher of the one-sided projection, run on an emulated GPU.
#include "emulated.h"

#include "cuda/project_side_sm90a.inc"

// cluster: 0, or blocks of a cluster other than the plan has. clusters: at a time.
extern "C" int side(void* grad, const void* basis, int64_t m, int64_t n, int64_t r, int right, int split, int keep,
                    int cluster, int clusters, unsigned seed) {
  emulated::device.clusters = clusters, emulated::device.seed = seed;
  const int64_t length = right ? n : m;
  sculpt::SidePanels plan = sculpt::side_panels(length, right ? m : n, r, split != 0, emulated::device.multiprocessors);
  if (cluster) {
    plan.cluster = cluster;
    plan.rows = ((length + cluster - 1) / cluster + sculpt::kTile - 1) / sculpt::kTile * sculpt::kTile;
    plan.owned = std::max(sculpt::kLeastOwned, plan.ranks / cluster);
    plan.bytes = sculpt::side_panel_bytes(plan, split != 0);
    if ((plan.cluster - 1) * plan.rows >= length || plan.bytes > sculpt::kSharedBytes) return -1;
  }
  emulated::forget();
  emulated::allow(grad, static_cast<size_t>(m * n * 2), true);
  emulated::allow(basis, static_cast<size_t>(length * r * (split ? 4 : 2)), false);
  return sculpt::project_side_sm90a(grad, basis, m, n, r, right != 0, split != 0, keep != 0, plan, nullptr);
}

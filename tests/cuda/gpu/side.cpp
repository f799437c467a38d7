// The launchers of the one-sided projection, run on an emulated GPU.
#include <vector>

#include "emulated.h"

#include "cuda/project_side_sm90a.inc"

namespace {

using Form = sculpt::BasisForm;

sculpt::SidePanels planned(int64_t length, int64_t extent, int64_t r, Form form, int cluster, int width) {
  if (cluster) return sculpt::side_panels_of(cluster, width, length, r, form);
  return sculpt::side_panels(length, extent, r, form, emulated::device.multiprocessors);
}

void allow(void* grad, const void* basis, const float* metric, int64_t m, int64_t n, int64_t r, bool right, Form form) {
  emulated::allow(grad, static_cast<size_t>(m * n * 2), true);
  emulated::allow(basis, static_cast<size_t>((right ? n : m) * r * (form == Form::kFloat32 ? 4 : 2)), false);
  if (metric) emulated::allow(metric, static_cast<size_t>(r * r * 4), false);
}

}  // namespace

// cluster: 0, or blocks of a cluster other than the plan has, with panels of `width`. clusters: at a time.
extern "C" int side(void* grad, const void* basis, const float* metric, int64_t m, int64_t n, int64_t r, int right,
                    int form_, int keep, int cluster, int width, int clusters, unsigned seed) {
  const auto form = static_cast<Form>(form_);
  emulated::device.clusters = clusters, emulated::device.seed = seed;
  const sculpt::SidePanels plan = planned(right ? n : m, right ? m : n, r, form, cluster, width);
  if (!plan.fits) return -1;
  emulated::forget();
  allow(grad, basis, metric, m, n, r, right != 0, form);
  sculpt::SideEntry entry;
  if (sculpt::side_entry(grad, basis, metric, m, n, r, right != 0, keep != 0, plan, entry)) return -2;
  return sculpt::project_side_sm90a(entry, right != 0, form, plan, nullptr);
}

struct Given {
  void* grad;
  const void* basis;
  const float* metric;
  int64_t m, n, r, keep;
};

extern "C" int sides(const Given* given, int64_t count, int right, int form_, int cluster, int width, int clusters,
                     unsigned seed) {
  const auto form = static_cast<Form>(form_);
  emulated::device.clusters = clusters, emulated::device.seed = seed;
  emulated::forget();
  std::vector<sculpt::SideEntry> list(static_cast<size_t>(count));
  int64_t length = 1, r = 1, panels = 0;
  for (int64_t i = 0; i < count; ++i)
    length = std::max(length, right ? given[i].n : given[i].m), r = std::max(r, given[i].r);
  const sculpt::SidePanels plan = planned(length, 1, r, form, cluster, width);
  if (!plan.fits) return -1;
  for (int64_t i = 0; i < count; ++i) {
    const Given& g = given[i];
    allow(g.grad, g.basis, g.metric, g.m, g.n, g.r, right != 0, form);
    if (sculpt::side_entry(g.grad, g.basis, g.metric, g.m, g.n, g.r, right != 0, g.keep != 0, plan, list[i])) return -2;
    panels += list[i].panels;
  }
  emulated::allow(list.data(), list.size() * sizeof(sculpt::SideEntry), false);
  return sculpt::project_sides_sm90a(list.data(), panels, right != 0, form, plan, nullptr);
}

// The launchers of the row-panel kernels, run by the emulation. The .cu files beside this are the kernels' own, their
// declarations of shared memory replaced (tests/cuda/test_emulated.py).
#include "emulated.h"

#ifdef RIGHT
#include "cuda/project_right_sm90a.inc"

// cluster 0: the plan for a GPU of that many multiprocessors; otherwise this plan.
extern "C" int right(void* grad, const void* basis, int64_t m, int64_t n, int64_t s, int split, int keep, int processors,
                     int64_t cluster, int64_t rows, int64_t buffers) {
  emulated::multiprocessors = processors;
  sculpt::RightPanels plan = sculpt::right_panels(m, n, s, split != 0, processors);
  if (cluster) {
    plan.cluster = cluster, plan.rows = rows, plan.buffers = buffers;
    plan.columns = ((n + cluster - 1) / cluster + 63) / 64 * 64;
    plan.bytes = sculpt::right_panel_bytes(plan.columns, rows, buffers, plan.ranks, cluster, split != 0);
  }
  return sculpt::project_right_sm90a(grad, basis, m, n, s, split != 0, keep != 0, plan, nullptr);
}
#else
#include "cuda/project_both.inc"

extern "C" int both(void* grad, const void* left, const void* right, int64_t m, int64_t n, int64_t r, int64_t s,
                    int left_float, int right_float, int block, int multiprocessors, int capability) {
  emulated::multiprocessors = multiprocessors, emulated::capability = capability;
  sculpt::BothDevice device;
  sculpt::both_device(&device);
  const sculpt::BothPanels plan = sculpt::both_panels(m, n, r, s, left_float || right_float, block != 0, device);
  // Not a number wherever nothing is written before it is read.
  std::vector<unsigned char> scratch(static_cast<size_t>(plan.bytes) + 256, 0xff);
  auto* aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(scratch.data()) + 255) / 256 * 256);
  return sculpt::project_both(grad, {left, right, r, s, left_float != 0, right_float != 0}, m, n, block != 0, plan,
                              aligned, nullptr);
}
#endif

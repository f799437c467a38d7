// Runs the pieces of one call over torch's threads: the shared packing first, then the panels.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "cpu/arena.h"
#include "cpu/kernels.h"

namespace sculpt::cpu {

// Work below this many operations is done by the calling thread: waking a second one costs about 5 us.
constexpr double kSerialWork = 1 << 20;

inline int64_t threads_for(double operations) {
  return operations < kSerialWork ? 1 : int64_t(torch::stable::get_num_threads());
}

// pack(shared, task) and panel(shared, scratch, index).
template <class Pack, class Panel>
void run_panels(const Plan& plan, int64_t threads, const Pack& pack, const Panel& panel) {
  void* shared = shared_arena.reserve(plan.shared_bytes);
  const auto pack_range = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) pack(shared, task);
  };
  const auto panel_range = [&](int64_t begin, int64_t end) {
    void* scratch = scratch_arena.reserve(plan.scratch_bytes);
    for (int64_t index = begin; index < end; ++index) panel(shared, scratch, index);
    scratch_arena.trim();
  };
  if (threads == 1) {
    pack_range(0, plan.pack_tasks);
    panel_range(0, plan.panels);
  } else {
    torch::stable::parallel_for(0, plan.pack_tasks, 1, pack_range);
    torch::stable::parallel_for(0, plan.panels, 1, panel_range);
  }
  shared_arena.trim();
}

}  // namespace sculpt::cpu

// The launcher of the sums of steps, run on an emulated GPU.
#include <vector>

#include "cuda/add_steps.inc"

struct Given {
  void* weight;
  int16_t* low;
  const float* step;
  int64_t numel, seed;
  bool half;
};

extern "C" int add_steps(const Given* given, int64_t n, bool stochastic) {
  std::vector<sculpt::AddEntry> entries;
  emulated::forget();
  for (const Given* e = given; e != given + n; ++e) {
    const auto numel = static_cast<size_t>(e->numel);
    emulated::allow(e->weight, numel * (e->half ? 2 : 4), true), emulated::allow(e->low, numel * 2, true);
    emulated::allow(e->step, numel * 4, false);
    entries.push_back({e->weight, e->low, e->step, e->numel, sculpt::Key::of(e->seed), e->half});
  }
  return sculpt::add_steps(entries.data(), n, stochastic, nullptr);
}

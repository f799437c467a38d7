// The launcher of AdamW, run on an emulated GPU.
#include "cuda/adam.inc"

extern "C" int adam(const sculpt::AdamEntry* entries, int64_t n, const sculpt::AdamSettings* settings) {
  emulated::forget();
  for (int64_t i = 0; i < n; ++i) {
    const sculpt::AdamEntry& e = entries[i];
    const auto numel = static_cast<size_t>(e.numel);
    emulated::allow(e.grad, numel * (e.half_grad ? 2 : 4), true);
    emulated::allow(e.weight, numel * (e.half_weight ? 2 : 4), false);
    emulated::allow(e.start, numel * (e.half_weight ? 2 : 4), false);
    emulated::allow(e.low, numel * 2, false), emulated::allow(e.count, 4, true);
    for (void* each : {e.first, e.second}) emulated::allow(each, numel * (e.half_moments ? 2 : 4), true);
    emulated::allow(e.out, numel * (e.half_out ? 2 : 4), true);
  }
  emulated::allow(settings->lr, settings->lr_double ? 8 : 4, false);
  return sculpt::adam(entries, n, *settings, nullptr);
}

extern "C" int64_t size() { return sizeof(sculpt::AdamEntry) + 1000 * sizeof(sculpt::AdamSettings); }

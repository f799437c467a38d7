// The launcher of the two-sided projection, run on an emulated GPU.
#include <cstring>
#include <vector>

#include "emulated.h"

#include "cuda/project_both.inc"

extern "C" int both(void* grad, const void* left, const void* right, int64_t m, int64_t n, int64_t r, int64_t s,
                    int left_float, int right_float, int block, int multiprocessors, int capability, unsigned seed) {
  emulated::device.multiprocessors = multiprocessors, emulated::device.capability = capability;
  emulated::device.seed = seed;
  sculpt::BothDevice device;
  sculpt::both_device(&device);
  const sculpt::BothPanels plan = sculpt::both_panels(m, n, r, s, left_float || right_float, block != 0, device);
  // Not a number wherever nothing is written before it is read.
  std::vector<unsigned char> scratch(static_cast<size_t>(plan.bytes) + 256, 0xff);
  auto* aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(scratch.data()) + 255) / 256 * 256);
  emulated::forget();
  emulated::allow(grad, static_cast<size_t>(m * n * 2), true), emulated::allow(aligned, plan.bytes, true);
  emulated::allow(left, static_cast<size_t>(m * r * (left_float ? 4 : 2)), false);
  emulated::allow(right, static_cast<size_t>(n * s * (right_float ? 4 : 2)), false);
  return sculpt::project_both(grad, {left, right, r, s, left_float != 0, right_float != 0}, m, n, block != 0,
                                         plan, aligned, nullptr);
}

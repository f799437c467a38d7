// Facts about the build, for `sculpt doctor`, and the words of Philox, for tests. pybind11 does not go with the limited
// API, so it stays out of the op library.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <array>

#include "common/philox.h"

namespace {

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, int64_t seed) {
  const sculpt::Words x = sculpt::philox({counter[0], counter[1], counter[2], counter[3]}, sculpt::Key::of(seed));
  return {x.a, x.b, x.c, x.d};
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build facts of sculpt-ops, and its random words.";
  m.def("philox", &philox, pybind11::arg("counter"), pybind11::arg("seed"),
        "The four words that Philox4x32-10 makes of a counter of four.");
  m.attr("torch_version") = TORCH_VERSION;
#if defined(__VERSION__)
  m.attr("compiler") = __VERSION__;
#else
  m.attr("compiler") = "unknown";
#endif
}

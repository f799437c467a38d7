// Facts about the build, for `sculpt doctor`. pybind11 does not go with the limited API, so it stays out
// of the op library.
#include <pybind11/pybind11.h>
#include <torch/version.h>

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build facts of sculpt-ops.";
  m.attr("torch_version") = TORCH_VERSION;
#if defined(__VERSION__)
  m.attr("compiler") = __VERSION__;
#else
  m.attr("compiler") = "unknown";
#endif
}

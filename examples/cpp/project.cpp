// Projects a gradient in a program without Python: the ops are in one shared library, whose kernels the dispatcher finds.
//
//   ./project LIBRARY [DEVICE]      prints what is left in the protected space, before and after; DEVICE: cpu, cuda
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>

#include <cstdio>

namespace {

// The op's results; the arguments are those of its schema (csrc/ops.cpp), all of them and in their order.
c10::Stack call(const char* op, c10::Stack arguments) {
  c10::Dispatcher::singleton().findSchemaOrThrow(op, "").callBoxed(arguments);
  return arguments;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) return std::fprintf(stderr, "usage: %s path of sculpt_ops/_C.abi3.so [device]\n", arguments[0]), 2;
  if (!dlopen(arguments[1], RTLD_NOW)) return std::fprintf(stderr, "%s\n", dlerror()), 1;

  at::manual_seed(0);
  const auto on = at::TensorOptions().device(count > 2 ? arguments[2] : "cpu");
  const at::Tensor weight = at::randn({512, 384}, on);
  // Rank, no start, oversampling, power iterations, seed.
  const at::Tensor left = call("sculpt::rsvd", {weight, 64, c10::IValue(), 16, 2, 0})[0].toTensor();
  at::Tensor grad = at::randn({512, 384}, on);
  const auto inside = [&] { return left.t().mm(grad).norm().item<double>() / grad.norm().item<double>(); };
  const double before = inside();
  // Left and right basis, left and right metric, three flags.
  call("sculpt::project_", {grad, left, c10::IValue(), c10::IValue(), c10::IValue(), false, false, false});
  std::printf("%.3g %.3g\n", before, inside());
}

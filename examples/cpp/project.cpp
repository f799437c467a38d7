// Projects a gradient in a program without Python: the ops are in one shared library, whose kernels the dispatcher finds.
//
//   ./project LIBRARY      prints what is left in the protected space, before and after
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>

#include <cstdio>

int main(int count, char** arguments) {
  if (count != 2) return std::fprintf(stderr, "usage: %s path of sculpt_ops/_C.abi3.so\n", arguments[0]), 2;
  if (!dlopen(arguments[1], RTLD_NOW)) return std::fprintf(stderr, "%s\n", dlerror()), 1;

  at::manual_seed(0);
  const at::Tensor left = std::get<0>(at::linalg_qr(at::randn({512, 64})));
  at::Tensor grad = at::randn({512, 384});
  const auto inside = [&] { return left.t().mm(grad).norm().item<double>() / grad.norm().item<double>(); };
  const double before = inside();

  // The arguments of the schema in their order: left and right basis, left and right metric, three flags.
  c10::Stack stack{grad, left, c10::IValue(), c10::IValue(), c10::IValue(), false, false, false};
  c10::Dispatcher::singleton().findSchemaOrThrow("sculpt::project_", "").callBoxed(stack);
  std::printf("%.3g %.3g\n", before, inside());
}

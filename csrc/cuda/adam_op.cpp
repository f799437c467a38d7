// `_cuda_adam_`, private: `_adam_` by the CUDA C++ kernel. Dispatch does not choose it: it has not run on a GPU yet.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "common/adam_checks.h"
#include "cuda/adam.h"

namespace sculpt::cuda {
namespace {

constexpr const char* kOp = "_cuda_adam_";

const void* pointer(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

void adam_(Tensors steps, Tensors grads, Tensors firsts, Tensors seconds, Tensors counts, Optionals weights,
           Optionals lows, Optionals starts, Tensor lr, double beta1, double beta2, double eps, double weight_decay,
           bool maximize) {
  check_adam(kOp, steps, grads, firsts, seconds, counts, weights, lows, starts, lr);
  if (grads.empty()) return;
  const auto device = grads[0].get_device_index();
  const auto here = [&](const char* name, const Tensor& t) {
    STD_TORCH_CHECK(!t.is_cpu() && t.get_device_index() == device, kOp, ": ", name,
                    ": wanted the device of the first of grads, given another");
  };
  if (!lr.is_cpu()) here("lr", lr);
  const bool lr_double = lr.scalar_type() == ScalarType::Double;
  AdamSettings settings{lr.is_cpu() ? nullptr : lr.const_data_ptr(), 0.0, beta1, beta2, eps, weight_decay, lr_double,
                        maximize};
  if (lr.is_cpu())
    settings.lr_value = lr_double ? *static_cast<const double*>(lr.const_data_ptr())
                                  : double(*static_cast<const float*>(lr.const_data_ptr()));
  std::vector<AdamEntry> entries;
  for (size_t i = 0; i < grads.size(); ++i) {
    here("grads", grads[i]), here("steps", steps[i]), here("firsts", firsts[i]), here("seconds", seconds[i]);
    here("counts", counts[i]);
    for (const auto& [name, list] : {std::pair{"weights", &weights}, {"lows", &lows}, {"starts", &starts}})
      if ((*list)[i]) here(name, *(*list)[i]);
    const bool decays = weights[i] && weight_decay != 0.0;
    entries.push_back({grads[i].const_data_ptr(), static_cast<float*>(firsts[i].mutable_data_ptr()),
                       static_cast<float*>(seconds[i].mutable_data_ptr()),
                       static_cast<float*>(steps[i].mutable_data_ptr()),
                       static_cast<float*>(counts[i].mutable_data_ptr()), decays ? pointer(weights[i]) : nullptr,
                       decays ? static_cast<const int16_t*>(pointer(lows[i])) : nullptr,
                       decays ? pointer(starts[i]) : nullptr, grads[i].numel(),
                       grads[i].scalar_type() == ScalarType::BFloat16,
                       weights[i] && weights[i]->scalar_type() == ScalarType::BFloat16});
  }
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const cudaError_t error =
      adam(entries.data(), static_cast<int64_t>(entries.size()), settings, static_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(error == cudaSuccess, kOp, ": ", entries.size(), " tensors, the first of shape ", shape(grads[0]), ": ",
                  cudaGetErrorString(error));
}

}  // namespace
}  // namespace sculpt::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(sculpt, m) {
  m.def(
      "_cuda_adam_(Tensor(a!)[] steps, Tensor[] grads, Tensor(b!)[] firsts, Tensor(c!)[] seconds, Tensor(d!)[] counts, "
      "Tensor?[] weights, Tensor?[] lows, Tensor?[] starts, Tensor lr, *, float beta1, float beta2, float eps, "
      "float weight_decay, bool maximize=False) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sculpt, CUDA, m) { m.impl("_cuda_adam_", TORCH_BOX(&sculpt::cuda::adam_)); }

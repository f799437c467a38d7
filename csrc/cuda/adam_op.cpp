// `_cuda_adam_`, private: `_adam_` by the CUDA C++ kernel, see sculpt_ops/ops/adam.py. `_cuda_adam_runs`: whether the build
// has code for a device.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "common/adam_checks.h"
#include "cuda/adam.h"
#include "cuda/stream.h"

namespace sculpt::cuda {
namespace {

constexpr const char* kOp = "_cuda_adam_";

const void* pointer(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

void adam_(Tensors steps, Tensors grads, Tensors firsts, Tensors seconds, Tensors counts, Optionals weights,
           Optionals lows, Optionals starts, Tensor lr, double beta1, double beta2, double eps, double weight_decay,
           bool maximize) {
  // Python refuses the same beforehand: on torch 2.11 an exception from here ended the process.
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
  std::vector<float*> on_host;
  for (size_t i = 0; i < grads.size(); ++i) {
    here("grads", grads[i]), here("steps", steps[i]), here("firsts", firsts[i]), here("seconds", seconds[i]);
    if (!counts[i].is_cpu()) here("counts", counts[i]);
    for (const auto& [name, list] : {std::pair{"weights", &weights}, {"lows", &lows}, {"starts", &starts}})
      if ((*list)[i]) here(name, *(*list)[i]);
    auto* const count = static_cast<float*>(counts[i].mutable_data_ptr());
    if (counts[i].is_cpu()) on_host.push_back(count);
    const bool decays = weights[i] && weight_decay != 0.0;
    entries.push_back({grads[i].const_data_ptr(), firsts[i].mutable_data_ptr(), seconds[i].mutable_data_ptr(),
                       steps[i].mutable_data_ptr(), counts[i].is_cpu() ? nullptr : count,
                       decays ? pointer(weights[i]) : nullptr,
                       decays ? static_cast<const int16_t*>(pointer(lows[i])) : nullptr,
                       decays ? pointer(starts[i]) : nullptr, grads[i].numel(),
                       counts[i].is_cpu() ? *count + 1.0f : 0.0f,
                       grads[i].scalar_type() == ScalarType::BFloat16,
                       firsts[i].scalar_type() == ScalarType::BFloat16,
                       steps[i].scalar_type() == ScalarType::BFloat16,
                       weights[i] && weights[i]->scalar_type() == ScalarType::BFloat16});
  }
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const auto check = [&](cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, kOp, ": ", entries.size(), " tensors, the first of shape ", shape(grads[0]),
                    ": ", cudaGetErrorString(error));
  };
  if (!on_host.empty()) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream, &capture));
    STD_TORCH_CHECK(capture == cudaStreamCaptureStatusNone, kOp,
                    ": counts: given on the CPU while a CUDA graph is captured, which would repeat one and the same "
                    "step; wanted on the device of grads (capturable=True)");
  }
  check(adam(entries.data(), static_cast<int64_t>(entries.size()), settings, stream));
  for (float* count : on_host) *count += 1.0f;
}

bool adam_runs(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  return sculpt::adam_runs();
}

}  // namespace
}  // namespace sculpt::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(sculpt, m) {
  m.def(
      "_cuda_adam_(Tensor(a!)[] steps, Tensor[] grads, Tensor(b!)[] firsts, Tensor(c!)[] seconds, Tensor(d!)[] counts, "
      "Tensor?[] weights, Tensor?[] lows, Tensor?[] starts, Tensor lr, *, float beta1, float beta2, float eps, "
      "float weight_decay, bool maximize=False) -> ()");
  m.def("_cuda_adam_runs(int device) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(sculpt, CUDA, m) { m.impl("_cuda_adam_", TORCH_BOX(&sculpt::cuda::adam_)); }

// No tensor among its arguments tells a device.
STABLE_TORCH_LIBRARY_IMPL(sculpt, CompositeExplicitAutograd, m) {
  m.impl("_cuda_adam_runs", TORCH_BOX(&sculpt::cuda::adam_runs));
}

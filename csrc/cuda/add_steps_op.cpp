// `_cuda_add_steps_`, private: what `_add_split_`, `_round_stochastic_` and torch's addition do tensor by tensor, for a
// list. The optimizer does not use it yet.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "common/check.h"
#include "cuda/add_steps.h"
#include "cuda/stream.h"

namespace sculpt::cuda {
namespace {

constexpr const char* kOp = "_cuda_add_steps_";

void add_steps_(std::vector<Tensor> weights, std::vector<Tensor> lows, std::vector<Tensor> steps,
                std::vector<int64_t> seeds) {
  const size_t n = weights.size();
  STD_TORCH_CHECK(steps.size() == n, kOp, ": steps: wanted ", n, " entries, one for each of weights, given ",
                  steps.size());
  STD_TORCH_CHECK(lows.empty() || lows.size() == n, kOp, ": lows: wanted none, or ", n,
                  " entries, one for each of weights, given ", lows.size());
  STD_TORCH_CHECK(seeds.empty() || (seeds.size() == n && lows.empty()), kOp, ": seeds: wanted none, or ", n,
                  " numbers, one for each of weights, and no lows, given ", seeds.size());
  if (n == 0) return;
  const auto device = weights[0].get_device_index();
  Uses uses;
  std::vector<AddEntry> entries;
  for (size_t i = 0; i < n; ++i) {
    const Tensor& weight = weights[i];
    const auto elements = [&](const char* name, const Tensor& t, bool written) {
      STD_TORCH_CHECK(t.sizes().equals(weight.sizes()), kOp, ": ", name, ": wanted the shape ", shape(weight),
                      " of entry ", i, " of weights, given ", shape(t));
      STD_TORCH_CHECK(t.is_contiguous(), kOp, ": ", name, ": wanted contiguous memory, given strides in entry ", i);
      STD_TORCH_CHECK(!t.is_cpu() && t.get_device_index() == device, kOp, ": ", name,
                      ": wanted the device of the first of weights, given another");
      uses.add(name, t, written);
    };
    elements("weights", weight, true), elements("steps", steps[i], false);
    const bool half = weight.scalar_type() == ScalarType::BFloat16;
    STD_TORCH_CHECK(half || (weight.scalar_type() == ScalarType::Float && lows.empty() && seeds.empty()), kOp,
                    ": weights: wanted dtype bfloat16, or float32 without lows and seeds, given another in entry ", i);
    STD_TORCH_CHECK(steps[i].scalar_type() == ScalarType::Float, kOp, ": steps: wanted dtype float32, given another");
    if (!lows.empty()) {
      elements("lows", lows[i], true);
      STD_TORCH_CHECK(lows[i].scalar_type() == ScalarType::Short, kOp, ": lows: wanted dtype int16, given another");
    }
    entries.push_back({weight.mutable_data_ptr(),
                       lows.empty() ? nullptr : static_cast<int16_t*>(lows[i].mutable_data_ptr()),
                       static_cast<const float*>(steps[i].const_data_ptr()), weight.numel(),
                       Key::of(seeds.empty() ? 0 : seeds[i]), half});
  }
  uses.check(kOp);
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const cudaError_t error = add_steps(entries.data(), static_cast<int64_t>(n), !seeds.empty(), stream);
  STD_TORCH_CHECK(error == cudaSuccess, kOp, ": ", n, " tensors, the first of shape ", shape(weights[0]), ": ",
                  cudaGetErrorString(error));
}

}  // namespace
}  // namespace sculpt::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(sculpt, m) {
  // lows: none, or one for each weight; so too seeds, with which bfloat16 is rounded stochastically.
  m.def("_cuda_add_steps_(Tensor(a!)[] weights, Tensor(b!)[] lows, Tensor[] steps, int[] seeds) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sculpt, CUDA, m) { m.impl("_cuda_add_steps_", TORCH_BOX(&sculpt::cuda::add_steps_)); }

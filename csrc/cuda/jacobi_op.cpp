// `_cuda_jacobi_svd`, private: `_jacobi_svd` by the CUDA C++ kernel.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "common/jacobi_checks.h"
#include "common/shapes.h"
#include "cuda/jacobi.h"
#include "cuda/stream.h"

namespace sculpt::cuda {
namespace {

constexpr const char* kOp = "_cuda_jacobi_svd";

std::tuple<Tensor, Tensor, Tensor> jacobi_svd(const Tensor& input) {
  check_jacobi(kOp, input);
  STD_TORCH_CHECK(!input.is_cpu(), kOp, ": input: wanted a tensor on a GPU, given one on the CPU");
  const int q = static_cast<int>(input.size(input.dim() - 1));
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < input.dim() - 1; ++i) sizes.push_back(input.size(i));
  const auto device = input.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor u = torch::stable::new_empty(input, input.sizes()), v = torch::stable::new_empty(input, input.sizes());
  const Tensor s = torch::stable::new_empty(input, sizes);
  if (input.numel() == 0) return {u, s, v};
  const int64_t batch = batch_of(input);
  STD_TORCH_CHECK(batch <= 0x7fffffff, kOp, ": input: wanted at most 2^31 - 1 matrices, given shape ", shape(input));
  const auto check = [&](cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, kOp, ": shape ", shape(input), ": ", cudaGetErrorString(error));
  };
  const JacobiRoom room = jacobi_room(q);
  check(room.error);
  STD_TORCH_CHECK(room.one, kOp, ": input: wanted matrices that take at most ", room.limit,
                  " bytes of shared memory, what a block may have on this device, given shape ", shape(input), ": ",
                  jacobi_bytes(q, false));
  const Tensor from = torch::stable::contiguous(input);
  const Tensor scratch = torch::stable::new_empty(input, {room.both ? 0 : batch * q * q});
  const cudaStream_t stream = current_stream(device);
  const auto at = [](const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
  check(sculpt::jacobi_svd(static_cast<const float*>(from.const_data_ptr()), at(u), at(s), at(v), at(scratch), batch, q,
                           room.both, stream));
  return {u, s, v};
}

bool jacobi_runs(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  return sculpt::jacobi_runs();
}

}  // namespace
}  // namespace sculpt::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(sculpt, m) {
  m.def("_cuda_jacobi_svd(Tensor input) -> (Tensor U, Tensor S, Tensor V)");
  m.def("_cuda_jacobi_runs(int device) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(sculpt, CUDA, m) { m.impl("_cuda_jacobi_svd", TORCH_BOX(&sculpt::cuda::jacobi_svd)); }

// No tensor among its arguments tells a device.
STABLE_TORCH_LIBRARY_IMPL(sculpt, CompositeExplicitAutograd, m) {
  m.impl("_cuda_jacobi_runs", TORCH_BOX(&sculpt::cuda::jacobi_runs));
}

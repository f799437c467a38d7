// `_cuda_project_`, private: the CUDA C++ kernels by themselves. SCULPT_BACKEND=cuda reaches them, dispatch does not: none
// has run on a GPU yet. What they cannot do is refused with the reason, before anything is written.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "common/check.h"
#include "common/side_panels.h"
#include "cuda/project_side.h"

namespace sculpt::cuda {
namespace {

constexpr const char* kOp = "_cuda_project_";

bool aligned(const Tensor& t) {
  return t.is_contiguous() && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

void project_(Tensor grad, std::optional<Tensor> left, std::optional<Tensor> right, bool keep_left, bool keep_right,
              bool block) {
  check_matrix(kOp, "grad", grad);
  STD_TORCH_CHECK(left.has_value() != right.has_value() && !block, kOp,
                  ": wanted a left or a right basis alone: there is no kernel for both or block yet");
  const char* name = right ? "right" : "left";
  const Tensor& basis = right ? *right : *left;
  STD_TORCH_CHECK(grad.dim() == 2 && basis.dim() == 2, kOp, ": grad: wanted one matrix, given shape ", shape(grad));
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::BFloat16, kOp, ": grad: wanted dtype bfloat16, given another");
  const int64_t m = grad.size(0), n = grad.size(1), r = basis.size(1);
  check_basis(kOp, name, basis, grad, right ? n : m);
  STD_TORCH_CHECK(aligned(grad) && aligned(basis), kOp, ": grad, ", name,
                  ": wanted contiguous memory that starts at a multiple of 16 bytes");
  if (m == 0 || n == 0) return;
  const bool split = basis.scalar_type() == ScalarType::Float;
  int multiprocessors = 0;
  cudaError_t error =
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, grad.get_device_index());
  STD_TORCH_CHECK(error == cudaSuccess, kOp, ": ", cudaGetErrorString(error));
  const SidePanels plan = side_panels(right ? n : m, right ? m : n, r, split, multiprocessors);
  STD_TORCH_CHECK(plan.fits, kOp, ": ", name, ": wanted a rank of 1 to ", kMaxSideRank,
                  " whose rows fit the shared memory of ", kMaxCluster, " blocks, given shapes ", shape(grad), " and ",
                  shape(basis));
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(grad.get_device_index(), &stream));
  error = project_side_sm90a(grad.mutable_data_ptr(), basis.const_data_ptr(), m, n, r, right.has_value(), split,
                             right ? keep_right : keep_left, plan, static_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(error == cudaSuccess, kOp, ": shapes ", shape(grad), " and ", shape(basis), ": ",
                  cudaGetErrorString(error));
}

}  // namespace
}  // namespace sculpt::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(sculpt, m) {
  m.def(
      "_cuda_project_(Tensor(a!) grad, Tensor? left=None, Tensor? right=None, *, bool keep_left=False, "
      "bool keep_right=False, bool block=False) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sculpt, CUDA, m) { m.impl("_cuda_project_", TORCH_BOX(&sculpt::cuda::project_)); }

// Private: the CUDA C++ projections by themselves. SCULPT_BACKEND=cuda reaches them, dispatch where they are faster. What
// they cannot do is refused with the reason, before anything is written.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/side_panels.h"
#include "cuda/project_both.h"
#include "cuda/project_side.h"
#include "cuda/stream.h"

namespace sculpt::cuda {
namespace {

constexpr const char* kOp = "_cuda_project_";
constexpr const char* kEntriesOp = "_cuda_side_entries";
constexpr const char* kSidesOp = "_cuda_project_sides_";

bool aligned(const Tensor& t) {
  return t.is_contiguous() && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

// Why a basis is no operand of these kernels, before anything is written.
void check_side(const char* name, const std::optional<Tensor>& basis, const Tensor& grad, int64_t rows, bool keep) {
  STD_TORCH_CHECK(basis.has_value() || !keep, kOp, ": keep_", name, ": wanted only with a ", name,
                  " basis, given without");
  if (!basis) return;
  STD_TORCH_CHECK(basis->dim() == 2, kOp, ": ", name, ": wanted one matrix, given shape ", shape(*basis));
  check_basis(kOp, name, *basis, grad, rows);
  STD_TORCH_CHECK(aligned(*basis), kOp, ": ", name,
                  ": wanted contiguous memory that starts at a multiple of 16 bytes, given shape ", shape(*basis));
  STD_TORCH_CHECK(grad.scalar_type() != ScalarType::Half || basis->scalar_type() == ScalarType::Half, kOp, ": ", name,
                  ": wanted dtype float16 with a float16 matrix");
  check_apart(kOp, "grad", grad, name, basis);
}

// The same of a metric, which is read number by number.
void check_weights(const char* name, const std::optional<Tensor>& metric, const char* side,
                   const std::optional<Tensor>& basis, const Tensor& grad) {
  if (!metric) return;
  check_metric(kOp, name, *metric, side, basis, grad);
  STD_TORCH_CHECK(metric->dim() == 2 && metric->is_contiguous(), kOp, ": ", name,
                  ": wanted one contiguous matrix, given shape ", shape(*metric));
  STD_TORCH_CHECK(basis->scalar_type() == ScalarType::BFloat16, kOp, ": ", name, ": wanted a bfloat16 basis with it");
  check_apart(kOp, "grad", grad, name, metric);
}

BasisForm form_of(const std::optional<Tensor>& basis, const std::optional<Tensor>& metric) {
  if (metric) return BasisForm::kMetric;
  if (basis && basis->scalar_type() == ScalarType::Half) return BasisForm::kFloat16;
  return basis && basis->scalar_type() == ScalarType::Float ? BasisForm::kFloat32 : BasisForm::kBFloat16;
}

const float* numbers_of(const std::optional<Tensor>& metric) {
  return metric ? static_cast<const float*>(metric->const_data_ptr()) : nullptr;
}

void project_(Tensor grad, std::optional<Tensor> left, std::optional<Tensor> right, std::optional<Tensor> left_metric,
              std::optional<Tensor> right_metric, bool keep_left, bool keep_right, bool block) {
  check_matrix(kOp, "grad", grad);
  STD_TORCH_CHECK(grad.dim() == 2, kOp, ": grad: wanted one matrix, given shape ", shape(grad));
  const bool half = grad.scalar_type() == ScalarType::Half;
  STD_TORCH_CHECK(half || grad.scalar_type() == ScalarType::BFloat16, kOp,
                  ": grad: wanted dtype bfloat16 or float16, given another");
  STD_TORCH_CHECK(left.has_value() || right.has_value(), kOp, ": left, right: wanted at least one basis, given none");
  const bool both = left.has_value() && right.has_value();
  STD_TORCH_CHECK(both || !block, kOp, ": block: wanted only with both bases, given with one");
  STD_TORCH_CHECK(!block || !(keep_left || keep_right), kOp, ": block: wanted no keep_left and no keep_right with it");
  const int64_t m = grad.size(0), n = grad.size(1);
  check_side("left", left, grad, m, keep_left);
  check_side("right", right, grad, n, keep_right);
  check_weights("left_metric", left_metric, "left", left, grad);
  check_weights("right_metric", right_metric, "right", right, grad);
  STD_TORCH_CHECK(aligned(grad), kOp,
                  ": grad: wanted contiguous memory that starts at a multiple of 16 bytes, given shape ", shape(grad));
  if (m == 0 || n == 0) return;

  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const cudaStream_t on = current_stream(grad.get_device_index());
  const std::string shapes =
      shape(grad) + (left ? ", left " + shape(*left) : "") + (right ? ", right " + shape(*right) : "");
  BothDevice device;
  cudaError_t error = both_device(&device);
  STD_TORCH_CHECK(error == cudaSuccess, kOp, ": device of grad ", shapes, ": ", cudaGetErrorString(error));
  const BasisForm left_form = form_of(left, left_metric), right_form = form_of(right, right_metric);
  const int64_t r = left ? left->size(1) : 0, s = right ? right->size(1) : 0;
  SidePanels left_plan, right_plan;
  if (left) left_plan = side_panels(m, n, r, left_form, device.multiprocessors);
  if (right) right_plan = side_panels(n, m, s, right_form, device.multiprocessors);
  const bool fit = n % 8 == 0 && (!left || left_plan.fits) && (!right || right_plan.fits);
  if (fit && !block && device.major == 9) {
    void* const matrix = grad.mutable_data_ptr();
    SideEntry first, second;
    if (left)
      error = side_entry(matrix, left->const_data_ptr(), numbers_of(left_metric), m, n, r, false, keep_left, left_plan,
                         first);
    if (right && error == cudaSuccess)
      error = side_entry(matrix, right->const_data_ptr(), numbers_of(right_metric), m, n, s, true, keep_right, right_plan,
                         second);
    if (left && error == cudaSuccess) error = side_runs(false, left_form, left_plan);
    if (right && error == cudaSuccess) error = side_runs(true, right_form, right_plan);
    if (left && error == cudaSuccess) error = project_side_sm90a(first, false, left_form, left_plan, on);
    if (right && error == cudaSuccess) error = project_side_sm90a(second, true, right_form, right_plan, on);
  } else {
    STD_TORCH_CHECK(!left_metric && !right_metric && !half, kOp,
                    ": float16, left_metric, right_metric: wanted sides one by one, on a GPU of capability 9.0, with rows of a "
                    "multiple of 8 numbers and ranks of 1 to ", kMaxSideRank,
                    " whose rows fit the shared memory of ", kMaxCluster, " blocks, given grad ", shapes);
    STD_TORCH_CHECK(both && !(keep_left || keep_right), kOp,
                    ": left, right: wanted a GPU of capability 9.0, rows of a multiple of 8 numbers, and ranks of 1 to ",
                    kMaxSideRank, " (", kMaxSideRankFloat32, " in float32) whose rows fit the shared memory of ",
                    kMaxCluster, " blocks, given grad ", shapes);
    const bool left_float = left_form == BasisForm::kFloat32, right_float = right_form == BasisForm::kFloat32;
    const BothPanels plan = both_panels(m, n, r, s, left_float || right_float, block, device);
    STD_TORCH_CHECK(plan.fits, kOp, ": left, right: wanted ranks of 1 to ", kMaxBothRank, " and at most ",
                    device.shared_bytes, " bytes of shared memory a block, given grad ", shapes, ", which take ",
                    std::max(plan.thin.bytes, plan.update.bytes));
    const Tensor scratch = torch::stable::new_empty(grad, {plan.bytes}, ScalarType::Byte);
    const BothBases bases{left->const_data_ptr(), right->const_data_ptr(), r, s, left_float, right_float};
    error = project_both(grad.mutable_data_ptr(), bases, m, n, block, plan, scratch.mutable_data_ptr(), on);
  }
  STD_TORCH_CHECK(error == cudaSuccess, kOp, ": grad ", shapes, ": ", cudaGetErrorString(error));
}

// The division, on the current device, of all matrices of a list, the longest of which is `length`: as if there were panels
// for all multiprocessors.
SidePanels plan_of_list(const char* op, int64_t length, int64_t r, BasisForm form) {
  BothDevice device;
  const cudaError_t error = both_device(&device);
  STD_TORCH_CHECK(error == cudaSuccess, op, ": device: ", cudaGetErrorString(error));
  const SidePanels plan = side_panels(length, int64_t(1) << 30, r, form, device.multiprocessors);
  STD_TORCH_CHECK(plan.fits, op, ": length, r: given ", length, " and ", r, ", which do not fit");
  return plan;
}

BasisForm form_of(const char* op, int64_t form) {
  STD_TORCH_CHECK(form >= 0 && form <= static_cast<int64_t>(BasisForm::kFloat16), op, ": form: wanted 0 to 3, given ", form);
  return static_cast<BasisForm>(form);
}

// Into `out`, on the CPU, what `_cuda_project_sides_` takes, on the device. Matrices, bases and metrics (one each, or none at
// all) are checked by the caller.
void side_entries(std::vector<Tensor> grads, std::vector<Tensor> bases, std::vector<Tensor> metrics,
                  std::vector<int64_t> keep, bool right, int64_t form, int64_t length, int64_t r, Tensor out) {
  const size_t count = grads.size();
  STD_TORCH_CHECK(count > 0 && bases.size() == count && keep.size() == count, kEntriesOp,
                  ": grads, bases, keep: wanted lists of one length");
  const bool weighed = form_of(kEntriesOp, form) == BasisForm::kMetric;
  STD_TORCH_CHECK(metrics.size() == (weighed ? count : 0), kEntriesOp, ": metrics: wanted ", weighed ? count : 0,
                  ", given ", metrics.size());
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Byte && out.is_contiguous() &&
                      out.numel() >= static_cast<int64_t>(count * sizeof(SideEntry)),
                  kEntriesOp, ": out: wanted ", sizeof(SideEntry), " bytes a matrix");
  const torch::stable::accelerator::DeviceGuard guard(grads[0].get_device_index());
  const SidePanels plan = plan_of_list(kEntriesOp, length, r, form_of(kEntriesOp, form));
  auto* const entries = static_cast<SideEntry*>(out.mutable_data_ptr());
  for (size_t i = 0; i < count; ++i) {
    const Tensor& grad = grads[i];
    const float* const metric = weighed ? static_cast<const float*>(metrics[i].const_data_ptr()) : nullptr;
    const cudaError_t error =
        side_entry(const_cast<void*>(grad.const_data_ptr()), bases[i].const_data_ptr(), metric, grad.size(0), grad.size(1),
                   bases[i].size(1), right, keep[i] != 0, plan, entries[i]);
    STD_TORCH_CHECK(error == cudaSuccess, kEntriesOp, ": grads[", i, "] ", shape(grad), ": ", cudaGetErrorString(error));
  }
}

void project_sides_(Tensor entries, int64_t panels, bool right, int64_t form, int64_t length, int64_t r) {
  const torch::stable::accelerator::DeviceGuard guard(entries.get_device_index());
  const SidePanels plan = plan_of_list(kSidesOp, length, r, form_of(kSidesOp, form));
  const cudaError_t error =
      project_sides_sm90a(static_cast<const SideEntry*>(entries.const_data_ptr()), panels, right, form_of(kSidesOp, form),
                          plan, current_stream(entries.get_device_index()));
  STD_TORCH_CHECK(error == cudaSuccess, kSidesOp, ": length ", length, ", rank ", r, ": ", cudaGetErrorString(error));
}

bool both_runs(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  return sculpt::both_runs();
}

// Also whether the device has room for the clusters: GPCs may be cut smaller than 16 multiprocessors.
bool side_runs(int64_t device, bool right, int64_t form, int64_t length, int64_t extent, int64_t r) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  BothDevice facts;
  if (both_device(&facts) != cudaSuccess || facts.major != 9) return false;
  const BasisForm of = form_of("_cuda_side_runs", form);
  return sculpt::side_runs(right, of, side_panels(length, extent, r, of, facts.multiprocessors)) == cudaSuccess;
}

}  // namespace
}  // namespace sculpt::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(sculpt, m) {
  m.def(
      "_cuda_project_(Tensor(a!) grad, Tensor? left=None, Tensor? right=None, Tensor? left_metric=None, "
      "Tensor? right_metric=None, *, bool keep_left=False, bool keep_right=False, bool block=False) -> ()");
  m.def(
      "_cuda_side_entries(Tensor[] grads, Tensor[] bases, Tensor[] metrics, int[] keep, bool right, int form, int length, "
      "int r, Tensor(a!) out) -> ()");
  // What it writes, the entries point to.
  m.def("_cuda_project_sides_(Tensor entries, int panels, bool right, int form, int length, int r) -> ()");
  m.def("_cuda_both_runs(int device) -> bool");
  m.def("_cuda_side_runs(int device, bool right, int form, int length, int extent, int r) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(sculpt, CUDA, m) {
  m.impl("_cuda_project_", TORCH_BOX(&sculpt::cuda::project_));
  m.impl("_cuda_side_entries", TORCH_BOX(&sculpt::cuda::side_entries));
  m.impl("_cuda_project_sides_", TORCH_BOX(&sculpt::cuda::project_sides_));
}

// No tensor among their arguments tells a device.
STABLE_TORCH_LIBRARY_IMPL(sculpt, CompositeExplicitAutograd, m) {
  m.impl("_cuda_both_runs", TORCH_BOX(&sculpt::cuda::both_runs));
  m.impl("_cuda_side_runs", TORCH_BOX(&sculpt::cuda::side_runs));
}

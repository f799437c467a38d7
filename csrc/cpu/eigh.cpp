// Symmetric eigendecompositions of a batch, one matrix a thread.
//
// On a quiet machine this takes the time of LAPACK with all threads on one matrix after the other (AMD Zen 5, two cores,
// MKL, fp32: 11 ms a matrix of 576 x 576 either way). But its threads do not wait for each other within a matrix, which
// beside one other busy process cost half as much again.
#include "common/aten.h"
#include "common/check.h"
#include "common/shapes.h"

namespace sculpt::cpu {
namespace {

Tensor flat(const Tensor& t, int64_t keep) {
  std::vector<int64_t> sizes{-1};
  for (int64_t i = t.dim() - keep; i < t.dim(); ++i) sizes.push_back(t.size(i));
  return torch::stable::view(t, sizes);
}

}  // namespace

std::tuple<Tensor, Tensor> eigh(const Tensor& input) {
  const int64_t d = input.dim();
  const ScalarType type = input.scalar_type();
  STD_TORCH_CHECK(d >= 2 && input.size(d - 1) == input.size(d - 2), "_eigh: input: wanted (..., n, n), given ",
                  shape(input));
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "_eigh: input: wanted float32 or float64");
  const auto one = [](const Tensor& matrix) {
    return aten::call<Tensor, Tensor>("aten::linalg_eigh", "", matrix, std::string("L"));
  };
  const int64_t batch = batch_of(input);
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < d - 1; ++i) sizes.push_back(input.size(i));
  if (batch <= 1 || input.size(d - 1) == 0) return one(input);
  // Vector after vector in memory, as LAPACK leaves them: a plain copy instead of a transposing one.
  const Tensor values = torch::stable::empty(sizes, type), rows = torch::stable::empty(input.sizes(), type);
  const Tensor from = flat(torch::stable::contiguous(input), 2), to_values = flat(values, 1), to = flat(rows, 2);
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      auto [w, v] = one(torch::stable::select(from, 0, b));
      Tensor w_out = torch::stable::select(to_values, 0, b);
      Tensor v_out = torch::stable::transpose(torch::stable::select(to, 0, b), 0, 1);
      torch::stable::copy_(w_out, w);
      torch::stable::copy_(v_out, v);
    }
  });
  return {values, torch::stable::transpose(rows, d - 2, d - 1)};
}

}  // namespace sculpt::cpu

STABLE_TORCH_LIBRARY_IMPL(sculpt, CPU, m) { m.impl("_eigh", TORCH_BOX(&sculpt::cpu::eigh)); }

// What the decompositions are composed of, on every device that has no kernels of its own: aten's products and
// factorizations, and random numbers drawn on the CPU. On GPUs `import sculpt_ops` puts tensor-core products, Triton's
// random numbers and the CUDA C++ SVD in the place of some (sculpt_ops/ops/products.py, sketch.py, jacobi.py).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>

#include "common/aten.h"
#include "common/check.h"
#include "common/jacobi_checks.h"
#include "common/shapes.h"
#include "linalg/products.h"

namespace sculpt::linalg {
namespace {

ScalarType wide_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor test_matrix(const Tensor& input, int64_t q, int64_t seed, bool transpose, bool rademacher, int64_t row,
                   int64_t column) {
  check_sketch("test_matrix", input, q, transpose, row, column);
  const int64_t rows = input.size(input.dim() - (transpose ? 2 : 1));
  // Of its input only shape and dtype count: a column stands for it.
  const Tensor stand_in = torch::stable::empty(batch_sizes(input, rows, 1), input.scalar_type());
  const Tensor drawn =
      aten::call<Tensor>("sculpt::test_matrix", "", stand_in, q, seed, true, rademacher, row, column);
  Tensor out = torch::stable::new_empty(input, batch_sizes(input, rows, q), wide_type(input));
  return torch::stable::copy_(out, drawn);
}

Tensor product_plain(const Tensor& input, const Tensor& factor, bool transpose) {
  const Tensor matrix = torch::stable::to(input, factor.scalar_type());
  return torch::stable::matmul(transpose ? transposed(matrix) : matrix, factor);
}

Tensor gram(const Tensor& input, bool transpose, bool wide) {
  const Tensor matrix = torch::stable::to(input, wide ? ScalarType::Double : wide_type(input));
  return transpose ? torch::stable::matmul(matrix, transposed(matrix)) : torch::stable::matmul(transposed(matrix), matrix);
}

std::tuple<Tensor, Tensor> eigh(const Tensor& input) {
  return aten::call<Tensor, Tensor>("aten::linalg_eigh", "", input, std::string("L"));
}

std::tuple<Tensor, Tensor, Tensor> jacobi_svd(const Tensor& input) {
  check_jacobi("_jacobi_svd", input);
  const auto [u, s, vt] =
      aten::call<Tensor, Tensor, Tensor>("aten::linalg_svd", "", input, false, std::optional<std::string>());
  return {torch::stable::contiguous(u), s, torch::stable::contiguous(transposed(vt))};
}

}  // namespace
}  // namespace sculpt::linalg

STABLE_TORCH_LIBRARY_IMPL(sculpt, CompositeExplicitAutograd, m) {
  m.impl("test_matrix", TORCH_BOX(&sculpt::linalg::test_matrix));
  m.impl("_product", TORCH_BOX(&sculpt::linalg::product_plain));
  m.impl("_gram", TORCH_BOX(&sculpt::linalg::gram));
  m.impl("_eigh", TORCH_BOX(&sculpt::linalg::eigh));
  m.impl("_jacobi_svd", TORCH_BOX(&sculpt::linalg::jacobi_svd));
}

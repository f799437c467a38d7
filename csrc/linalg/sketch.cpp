// sketch: a matrix times a test matrix, on every device. The test matrix is materialised: drawing a number costs more
// than reading it, and a fused product would draw it once for every tile of rows.
#include <torch/csrc/stable/library.h>

#include "common/aten.h"
#include "common/check.h"
#include "linalg/products.h"

namespace sculpt::linalg {

Tensor sketch(const Tensor& input, int64_t q, int64_t seed, bool transpose, bool rademacher, int64_t row,
              int64_t column) {
  check_sketch("sketch", input, q, transpose, row, column);
  const Tensor omega =
      aten::call<Tensor>("sculpt::test_matrix", "", input, q, seed, transpose, rademacher, row, column);
  return product(input, omega, transpose);
}

}  // namespace sculpt::linalg

STABLE_TORCH_LIBRARY_IMPL(sculpt, CompositeExplicitAutograd, m) { m.impl("sketch", TORCH_BOX(&sculpt::linalg::sketch)); }

// What `_jacobi_svd` accepts, on every device.
#pragma once
#include "common/check.h"
#include "common/jacobi.h"

namespace sculpt {

inline void check_jacobi(const char* op, const Tensor& input) {
  const int64_t d = input.dim();
  STD_TORCH_CHECK(input.scalar_type() == ScalarType::Float, op, ": input: wanted dtype float32, given another");
  STD_TORCH_CHECK(d >= 2 && input.size(d - 1) == input.size(d - 2) && input.size(d - 1) <= kJacobiMaxSize, op,
                  ": input: wanted square matrices (..., q, q) with q at most ", kJacobiMaxSize, ", given shape ",
                  shape(input));
}

}  // namespace sculpt

// Orthonormal and well-conditioned bases of the columns of tall matrices: products and q x q Cholesky factors only.
#pragma once
#include <torch/csrc/stable/tensor.h>

namespace sculpt::linalg {

using torch::stable::Tensor;

// Orthonormal columns (..., m, q), float32 or (for float64 input) float64.
Tensor orthonormal(const Tensor& input);

// The same span with columns well conditioned but not orthonormal: what a power iteration needs between two products,
// at a fifth of the cost. `input` is float32 or float64.
Tensor well_conditioned(const Tensor& input);

}  // namespace sculpt::linalg

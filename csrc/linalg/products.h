// The calls that the decompositions share.
#pragma once
#include "common/aten.h"

namespace sculpt::linalg {

using torch::stable::Tensor;

inline Tensor mul(const Tensor& a, const Tensor& b) { return aten::call<Tensor>("aten::mul", "Tensor", a, b); }
inline Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, t.dim() - 2, t.dim() - 1); }
inline Tensor product(const Tensor& input, const Tensor& factor, bool transpose = false) {
  return aten::call<Tensor>("sculpt::_product", "", input, factor, transpose);
}

}  // namespace sculpt::linalg

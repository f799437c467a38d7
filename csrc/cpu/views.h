// Tensors as the kernels see them: one matrix of a batch, its strides in elements.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "common/check.h"
#include "cpu/kernels.h"

namespace sculpt::cpu {

inline Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return Type::f64;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    default: return Type::f32;
  }
}

inline View transposed(View v) {
  std::swap(v.rows, v.cols);
  std::swap(v.row_stride, v.col_stride);
  return v;
}

// Data pointers of zero-size tensors may be null, and a null view means absent.
inline const void* data(const Tensor& t) {
  static const char nothing = 0;
  const void* p = t.const_data_ptr();
  return p ? p : &nothing;
}

// The matrix of batch entry `index` of `t`, broadcast over the leading dimensions of `matrix`.
inline View entry(const Optional& t, const Tensor& matrix, int64_t index) {
  View v;
  if (!t) return v;
  const int64_t d = t->dim();
  v.rows = t->size(d - 2);
  v.cols = t->size(d - 1);
  v.row_stride = t->stride(d - 2);
  v.col_stride = t->stride(d - 1);
  v.type = type_of(*t);
  int64_t offset = 0;
  for (int64_t i = matrix.dim() - 3, j = d - 3; i >= 0; --i, --j) {
    const int64_t at = index % matrix.size(i);
    index /= matrix.size(i);
    if (j >= 0 && t->size(j) != 1) offset += at * t->stride(j);
  }
  v.data = static_cast<const char*>(data(*t)) + offset * int64_t(t->element_size());
  return v;
}

inline bool rows_contiguous(const View& v) { return !v.data || v.cols <= 1 || v.col_stride == 1; }
inline bool cols_contiguous(const View& v) { return !v.data || v.rows <= 1 || v.row_stride == 1; }

inline Tensor contiguous_copy(const Tensor& t, std::optional<ScalarType> type = {}) {
  Tensor copy = torch::stable::empty(t.sizes(), type.value_or(t.scalar_type()));
  torch::stable::copy_(copy, t);
  return copy;
}

}  // namespace sculpt::cpu

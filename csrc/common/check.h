// What the ops accept, checked before anything is written. Every message names the argument, what was given and what
// was wanted. sculpt_ops/ops/checks.py says the same to Python callers; this is the guard of the C++ kernels.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace sculpt {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;
using Optional = std::optional<Tensor>;

inline bool is_half(ScalarType t) { return t == ScalarType::BFloat16 || t == ScalarType::Half; }
inline bool is_supported(ScalarType t) { return is_half(t) || t == ScalarType::Float || t == ScalarType::Double; }

inline std::string shape(const Tensor& t) {
  std::string s = "(";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + ")";
}

inline void check_matrix(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(is_supported(t.scalar_type()), op, ": ", name,
                  ": wanted dtype float32, float64, bfloat16 or float16, given another");
  STD_TORCH_CHECK(t.dim() >= 2, op, ": ", name, ": wanted a matrix (..., m, n), given shape ", shape(t));
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

// `rows` x anything (cols < 0), leading dimensions broadcastable to those of the matrix.
inline bool fits(const Tensor& t, const Tensor& matrix, int64_t rows, int64_t cols) {
  const int64_t d = t.dim(), batch = matrix.dim() - 2;
  bool good = d >= 2 && t.size(d - 2) == rows && (cols < 0 || t.size(d - 1) == cols) && d - 2 <= batch;
  for (int64_t i = 0; good && i < d - 2; ++i)
    good = t.size(i) == matrix.size(batch - (d - 2) + i) || t.size(i) == 1;
  return good;
}

inline void check_thin(const char* op, const char* name, const Tensor& t, const Tensor& matrix, int64_t rows,
                       int64_t cols) {
  STD_TORCH_CHECK(fits(t, matrix, rows, cols), op, ": ", name, ": wanted shape (..., ", rows, ", ",
                  cols < 0 ? "r" : std::to_string(cols), ") for a matrix of shape ", shape(matrix), ", given ", shape(t));
  STD_TORCH_CHECK(t.scalar_type() == matrix.scalar_type() ||
                      (is_half(matrix.scalar_type()) && t.scalar_type() == ScalarType::Float),
                  op, ": ", name, ": wanted the matrix's dtype (or float32 with a bfloat16 or float16 matrix)");
  STD_TORCH_CHECK(same_device(t, matrix), op, ": ", name, ": wanted the matrix's device");
}

inline void check_basis(const char* op, const char* name, const Tensor& t, const Tensor& matrix, int64_t rows) {
  check_thin(op, name, t, matrix, rows, -1);
  STD_TORCH_CHECK(t.size(t.dim() - 1) <= rows, op, ": ", name, ": wanted at most ", rows,
                  " orthonormal columns of length ", rows, ", given shape ", shape(t));
}

// M of the projector L M L^T.
inline void check_metric(const char* op, const char* name, const Tensor& t, const char* side,
                         const Optional& basis, const Tensor& matrix) {
  STD_TORCH_CHECK(basis, op, ": ", name, ": wanted a ", side, " basis with it, given ", side, "=None");
  const int64_t r = basis->size(basis->dim() - 1);
  STD_TORCH_CHECK(fits(t, matrix, r, r), op, ": ", name, ": wanted shape (..., ", r, ", ", r, ") for a basis of ", r,
                  " columns, given ", shape(t));
  const bool wide = matrix.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || (wide && t.scalar_type() == ScalarType::Double), op, ": ",
                  name, ": wanted dtype float32", wide ? " or float64" : "", ", given another");
  STD_TORCH_CHECK(same_device(t, matrix), op, ": ", name, ": wanted the matrix's device");
}

// One tensor of an elementwise op: the dtype it must have, and shape and device of `like`.
inline void check_elements(const char* op, const char* name, const Tensor& t, ScalarType type, const char* type_name,
                           const char* like_name, const Tensor& like) {
  STD_TORCH_CHECK(t.scalar_type() == type, op, ": ", name, ": wanted dtype ", type_name, ", given another");
  STD_TORCH_CHECK(t.sizes().equals(like.sizes()), op, ": ", name, ": wanted ", like_name, "'s shape ", shape(like),
                  ", given ", shape(t));
  STD_TORCH_CHECK(same_device(t, like), op, ": ", name, ": wanted ", like_name, "'s device");
}

// A test matrix: its rows and columns // 4 are words of Philox's counter.
inline void check_sketch(const char* op, const Tensor& input, int64_t q, bool transpose, int64_t row, int64_t column) {
  check_matrix(op, "input", input);
  constexpr int64_t words = int64_t(1) << 32;
  const int64_t rows = input.size(input.dim() - (transpose ? 2 : 1));
  STD_TORCH_CHECK(q >= 0, op, ": q: wanted 0 or more columns, given ", q);
  STD_TORCH_CHECK(row >= 0 && row <= words - rows, op, ": row: wanted 0 to 2^32 - ", rows, ", the rows drawn, given ",
                  row);
  STD_TORCH_CHECK(column >= 0 && column <= 4 * words - q, op, ": column: wanted 0 to 2^34 - ", q,
                  ", the columns drawn, given ", column);
}

// The bytes that a tensor spans, [begin, end).
struct Extent {
  uintptr_t begin = 0, end = 0;
  explicit Extent(const Tensor& t) {
    begin = end = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    if (t.numel() == 0 || begin == 0) return;  // 0: a tensor without memory
    int64_t last = 0;
    for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
    end = begin + (last + 1) * t.element_size();
  }
  bool meets(const Extent& o) const { return begin < o.end && o.begin < end; }
};

// Whether an element of one has a byte of the other: exact for slices, transposes and interleaved views; where it would
// take too long, whether their spans meet. As `_share_memory` in sculpt_ops/ops/checks.py.
class Overlap {
 public:
  Overlap(const Tensor& a, const Tensor& b) {
    add(1, int64_t(a.element_size()) - 1, int64_t(b.element_size()) - 1);
    for (int64_t i = 0; i < a.dim(); ++i) add(a.stride(i) * int64_t(a.element_size()), a.size(i) - 1, 0);
    for (int64_t i = 0; i < b.dim(); ++i) add(b.stride(i) * int64_t(b.element_size()), 0, b.size(i) - 1);
    std::sort(steps_.begin(), steps_.end(), [](const Step& x, const Step& y) { return x.stride > y.stride; });
  }
  // `distance`: bytes from the first of a to the first of b.
  bool meets(int64_t distance, size_t at = 0) {
    if (at == steps_.size() || ++tries_ > kMostTries) return distance == 0 || tries_ > kMostTries;
    int64_t forth = 0, back = 0;
    for (size_t i = at + 1; i < steps_.size(); ++i) {
      forth += steps_[i].of_a * steps_[i].stride;
      back += steps_[i].of_b * steps_[i].stride;
    }
    const auto [stride, of_a, of_b] = steps_[at];
    const int64_t first = std::max(-floor(forth - distance, stride), -of_b);
    const int64_t last = std::min(floor(distance + back, stride), of_a);
    for (int64_t x = first; x <= last; ++x)
      if (meets(distance - x * stride, at + 1)) return true;
    return false;
  }

 private:
  static constexpr int64_t kMostTries = 1000;
  // How far an index of a goes, and one of b, by steps of so many bytes.
  struct Step {
    int64_t stride, of_a, of_b;
  };
  static int64_t floor(int64_t x, int64_t by) { return x / by - (x % by < 0); }
  void add(int64_t stride, int64_t of_a, int64_t of_b) {
    if (stride == 0 || (of_a == 0 && of_b == 0 && stride != 1)) return;
    for (Step& step : steps_)
      if (step.stride == stride) {
        step.of_a += of_a;
        step.of_b += of_b;
        return;
      }
    steps_.push_back({stride, of_a, of_b});
  }
  std::vector<Step> steps_;
  int64_t tries_ = 0;
};

inline bool share_memory(const Tensor& a, const Tensor& b) {
  const Extent x(a), y(b);
  return x.meets(y) && Overlap(a, b).meets(int64_t(y.begin) - int64_t(x.begin));
}

// A tensor to be written must not hold one element twice.
inline void check_written(const char* op, const char* name, const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t i = 0; i < t.dim(); ++i)
    if (t.size(i) > 1) dims.emplace_back(t.stride(i), t.size(i));
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;
  for (auto [stride, size] : dims) {
    STD_TORCH_CHECK(t.numel() == 0 || stride > reach, op, ": ", name,
                    ": wanted memory in which every element is stored once, given a tensor that overlaps itself "
                    "(an expanded tensor?); pass a clone");
    reach += (size - 1) * stride;
  }
}

inline void check_apart(const char* op, const char* written, const Tensor& w, const char* name,
                        const Optional& t) {
  STD_TORCH_CHECK(!t || !share_memory(w, *t), op, ": ", name, ": wanted memory of its own, given memory shared with ",
                  written);
}

// Of lists of contiguous tensors everything that is written, against everything: memory of its own.
class Uses {
 public:
  void add(const char* name, const Tensor& t, bool written) {
    if (t.numel()) uses_.push_back({Extent(t), name, written});
  }
  void check(const char* op) {
    std::sort(uses_.begin(), uses_.end(), [](const Use& a, const Use& b) { return a.extent.begin < b.extent.begin; });
    for (size_t i = 0; i < uses_.size(); ++i)
      for (size_t j = i + 1; j < uses_.size() && uses_[j].extent.begin < uses_[i].extent.end; ++j)
        STD_TORCH_CHECK(!uses_[i].written && !uses_[j].written, op, ": ", uses_[i].name,
                        ": wanted memory of its own, given memory shared with ", uses_[j].name);
  }

 private:
  struct Use {
    Extent extent;
    const char* name;
    bool written;
  };
  std::vector<Use> uses_;
};

}  // namespace sculpt

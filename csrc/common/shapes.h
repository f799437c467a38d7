// Sizes of batches of matrices.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace sculpt {

// Number of matrices in (..., m, n).
inline int64_t batch_of(const torch::stable::Tensor& t) {
  int64_t batch = 1;
  for (int64_t i = 0; i < t.dim() - 2; ++i) batch *= t.size(i);
  return batch;
}

// (..., rows, cols) with the leading dimensions of `like`.
inline std::vector<int64_t> batch_sizes(const torch::stable::Tensor& like, int64_t rows, int64_t cols) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < like.dim() - 2; ++i) sizes.push_back(like.size(i));
  sizes.push_back(rows);
  sizes.push_back(cols);
  return sizes;
}

}  // namespace sculpt

// Projections of single matrices with bases of their own dtype, in library products.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace sculpt::linalg {

using torch::stable::Tensor;

// What `forms` says of a matrix.
constexpr int64_t kKeepLeft = 1, kKeepRight = 2, kBlock = 4;

// Checks nothing. outs may be grads; lefts and rights have a tensor of one dimension where there is no basis.
void foreach_project_products_(std::vector<Tensor> grads, std::vector<Tensor> lefts, std::vector<Tensor> rights,
                               std::vector<Tensor> outs, std::vector<int64_t> forms);

}  // namespace sculpt::linalg

// Products of the range finder on the CPU: a matrix times a thin factor, and Gram matrices. The arithmetic is in matmul.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/shapes.h"
#include "cpu/run.h"
#include "cpu/views.h"

namespace sculpt::cpu {
namespace {

constexpr int64_t kMirrorTile = 64;

void run(const Matmul& p) {
  const Kernels& k = kernels();
  const double work = 2.0 * double(p.a.rows) * double(p.b.cols) * double(p.a.cols);
  const int64_t threads = threads_for(work);
  const Plan plan = k.plan_matmul(p, threads);
  run_panels(
      plan, threads, [&](void* shared, int64_t task) { k.pack_matmul(p, plan, shared, task); },
      [&](const void* shared, void* scratch, int64_t index) { k.panel_matmul(p, plan, shared, scratch, index); });
}

template <class T>
void mirror(T* g, int64_t n, bool lower) {
  const int64_t tiles = (n + kMirrorTile - 1) / kMirrorTile;
  torch::stable::parallel_for(0, tiles, n < 512 ? tiles : 1, [&](int64_t begin, int64_t end) {
    for (int64_t i0 = begin * kMirrorTile; i0 < std::min(n, end * kMirrorTile); i0 += kMirrorTile)
      for (int64_t j0 = 0; j0 <= i0; j0 += kMirrorTile)
        for (int64_t i = i0; i < std::min(n, i0 + kMirrorTile); ++i)
          for (int64_t j = j0; j < std::min(i, j0 + kMirrorTile); ++j)
            (lower ? g[j * n + i] : g[i * n + j]) = lower ? g[i * n + j] : g[j * n + i];
  });
}

// The kernels read the matrix along a unit stride.
Tensor strided_well(const Tensor& t) {
  const int64_t d = t.dim();
  if (t.stride(d - 1) == 1 || t.stride(d - 2) == 1) return t;
  return contiguous_copy(t);
}

Tensor result(const Tensor& like, int64_t rows, int64_t cols, bool wide) {
  return torch::stable::empty(batch_sizes(like, rows, cols), wide ? ScalarType::Double : ScalarType::Float);
}

void multiply(View matrix, View factor, View out, bool wide) {
  Matmul p;
  p.wide = wide;
  if (rows_contiguous(matrix)) {  // panels of its rows
    p.a = matrix;
    p.b = factor;
    p.out = out;
  } else {  // out^T = factor^T matrix^T: panels of the columns of matrix^T
    p.a = transposed(factor);
    p.b = transposed(matrix);
    p.out = transposed(out);
    p.share_a = true;
  }
  run(p);
}

void gram_of(View matrix, void* out, bool wide) {
  const int64_t n = matrix.cols;
  Matmul p;
  p.a = transposed(matrix);
  p.b = matrix;
  p.share_a = rows_contiguous(matrix);
  p.symmetric = true;
  p.wide = wide;
  p.out = {out, n, n, n, 1, wide ? Type::f64 : Type::f32};
  run(p);
  wide ? mirror(static_cast<double*>(out), n, p.share_a) : mirror(static_cast<float*>(out), n, p.share_a);
}

}  // namespace

Tensor product(const Tensor& input, const Tensor& factor, bool transpose) {
  const char* op = "_product";
  check_matrix(op, "input", input);
  const bool wide = factor.scalar_type() == ScalarType::Double;
  const int64_t d = input.dim(), depth = input.size(transpose ? d - 2 : d - 1);
  bool good = factor.dim() == d && factor.size(d - 2) == depth;
  for (int64_t i = 0; good && i < d - 2; ++i) good = factor.size(i) == input.size(i);
  STD_TORCH_CHECK(good, op, ": factor: wanted shape (..., ", depth, ", q) for an input of shape ", shape(input),
                  ", given ", shape(factor));
  STD_TORCH_CHECK(wide || (factor.scalar_type() == ScalarType::Float && input.scalar_type() != ScalarType::Double), op,
                  ": factor: wanted float64, or float32 with an input that is not float64");
  Tensor out = result(input, input.size(transpose ? d - 1 : d - 2), factor.size(d - 1), wide);
  if (depth == 0) torch::stable::zero_(out);
  if (depth == 0 || out.numel() == 0) return out;
  const Tensor x = strided_well(input), f = strided_well(factor);
  for (int64_t b = 0; b < batch_of(out); ++b) {
    const View matrix = entry(x, x, b);
    multiply(transpose ? transposed(matrix) : matrix, entry(f, f, b), entry(out, out, b), wide);
  }
  return out;
}

Tensor gram(const Tensor& input, bool transpose, bool wide) {
  check_matrix("_gram", "input", input);
  wide = wide || input.scalar_type() == ScalarType::Double;
  const int64_t d = input.dim(), n = input.size(transpose ? d - 2 : d - 1);
  Tensor out = result(input, n, n, wide);
  if (input.numel() == 0) torch::stable::zero_(out);
  if (input.numel() == 0 || out.numel() == 0) return out;
  const Tensor x = strided_well(input);
  for (int64_t b = 0; b < batch_of(out); ++b) {
    const View matrix = entry(x, x, b);
    gram_of(transpose ? transposed(matrix) : matrix, const_cast<void*>(entry(out, out, b).data), wide);
  }
  return out;
}

}  // namespace sculpt::cpu

STABLE_TORCH_LIBRARY_IMPL(sculpt, CPU, m) {
  m.impl("_product", TORCH_BOX(&sculpt::cpu::product));
  m.impl("_gram", TORCH_BOX(&sculpt::cpu::gram));
}

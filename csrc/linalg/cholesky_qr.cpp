// orthonormalize: shifted CholeskyQR on float64 Gram matrices (Fukaya et al., SIAM J. Sci. Comput. 42, 2020).
//
// One pass scales the columns to unit length, factors their Gram matrix G + s I = R^T R and multiplies by R^-1, which
// takes 1 / sqrt(s), about 1e6, off the condition number. Where R_jj shows that nothing of column j is left beside the
// columns before it, a little of a fixed random vector is added to it first; the passes that follow make of it a
// direction of its own. On a GPU the work is fixed: no branch, and nothing is read back from the device. On the CPU, where
// looking costs nothing, the passes end when one has done enough: the first at condition below 100, the second below 1e7.
//
// 4 m q^2 float64 operations a pass, 3 passes (float64 input: 4, the last without shift). Measured over 70 matrices up
// to 50000 x 32 and 1024 x 1024 (condition 1 to 1e14, graded by 1e60, duplicate and zero columns, Hilbert, Vandermonde,
// Kahan): orthonormal to 1e-7 in float32, 2e-13 in float64. Replacing dependent columns after the first pass instead
// left two columns equal on Kahan's matrix; unshifted passes failed there and from condition 1e10 on; products in
// float32 lost triangularity. Householder QR in float32 comes to 1e-5. A sketch with Householder QR of the small
// matrix before CholeskyQR lost Kahan's matrix too, and costs four Gram matrices.
//
// Not for: GPUs without fast float64; there it is the slowest step of a range finder.
#include "linalg/cholesky_qr.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <numeric>

#include "common/aten.h"
#include "common/check.h"
#include "common/shapes.h"
#include "linalg/products.h"

namespace sculpt::linalg {
namespace {

// The scaled Gram matrix has errors of up to a fifth of this (2048 x 1040); less, and its Cholesky factor breaks down.
double shift_for(int64_t m, int64_t q) { return std::ldexp(double(m + 8 * q), -53); }
// Columns with R_jj^2 below this many shifts are taken for dependent. 1e2 and 1e5 are as good.
constexpr double kDependent = 1e4;
constexpr int kPasses = 3;
// After a pass whose ||R^-1||_F^2 shift is below this, Q rounded to float32 is orthonormal to 2e-8.
constexpr double kEnough = 1e-8;
// The fixed random vectors, their share of a dependent column: a rounding of the result's dtype.
constexpr int64_t kSeed = 1;
double noise_for(bool wide) { return std::ldexp(1, wide ? -50 : -24); }

Tensor filled(const Tensor& like, double value) {
  Tensor t = torch::stable::empty_like(like);
  torch::stable::fill_(t, value);
  return t;
}
Tensor diagonal(const Tensor& t) {
  return aten::call<Tensor>("aten::diagonal", "", t, int64_t(0), int64_t(-2), int64_t(-1));
}

// With y = input of the pass: scaled y = y diag(scale), (scaled y)^T (scaled y) + shift I = R^T R.
struct Factor {
  Tensor scale;    // (..., q)
  Tensor r;        // (..., q, q) upper triangular
  Tensor inverse;  // of r, where asked for
};

Factor factor(const Tensor& y, double shift, bool inverted = true) {
  const Tensor gram = aten::call<Tensor>("sculpt::_gram", "", y, false, true);
  const Tensor squares = torch::stable::contiguous(diagonal(gram));
  // A column of zeros is scaled by one and leaves only the shift on the diagonal.
  const Tensor some = aten::call<Tensor>("aten::gt", "Tensor", squares, filled(squares, 0));
  const Tensor scale = aten::call<Tensor>("aten::where", "self", some, aten::call<Tensor>("aten::rsqrt", "", squares),
                                          filled(squares, 1));
  const Tensor scaled = mul(mul(gram, torch::stable::unsqueeze(scale, -1)), torch::stable::unsqueeze(scale, -2));
  Tensor on_diagonal = diagonal(scaled);
  torch::stable::copy_(on_diagonal, aten::call<Tensor>("aten::where", "self", some, filled(squares, 1 + shift),
                                                       filled(squares, shift)));
  Tensor r, inverse;
  aten::serially(y.is_cpu(), [&] {
    const auto [lower, info] = aten::call<Tensor, Tensor>("aten::linalg_cholesky_ex", "", scaled, false, false);
    r = transposed(lower);
    if (!inverted) return;
    const Tensor identity = filled(gram, 0);
    Tensor ones = diagonal(identity);
    torch::stable::fill_(ones, 1);
    inverse = aten::call<Tensor>("aten::linalg_solve_triangular", "", r, identity, true, true, false);
  });
  return {scale, r, inverse};
}

// noise for dependent columns and 0 elsewhere, (..., q).
Tensor noise_of(const Tensor& r, double shift, bool wide) {
  const Tensor d = diagonal(r), squares = mul(d, d);
  const Tensor weak = aten::call<Tensor>("aten::lt", "Tensor", squares, filled(squares, kDependent * shift));
  return aten::call<Tensor>("aten::where", "self", weak, filled(squares, noise_for(wide)), filled(squares, 0));
}

// Of a contiguous float64 tensor on the CPU.
double sum_of_squares(const Tensor& t) {
  const double* p = static_cast<const double*>(t.const_data_ptr());
  return std::inner_product(p, p + t.numel(), p, 0.0);
}

// Z^T for m x q random unit columns: a Hankel matrix, m + q numbers seen through overlapping rows.
Tensor random_rows(const Tensor& like, int64_t m, int64_t q) {
  const Tensor shape = torch::stable::new_empty(like, {m + q, 1}, ScalarType::Double);
  const Tensor normals = aten::call<Tensor>("sculpt::test_matrix", "", shape, int64_t(1), kSeed, true, false, int64_t(0),
                                            int64_t(0));
  const Tensor scaled = mul(normals, filled(normals, 1 / std::sqrt(double(m))));
  Tensor rows = aten::call<Tensor>("aten::unfold", "", torch::stable::view(scaled, {m + q}), int64_t(0), m, int64_t(1));
  rows = torch::stable::narrow(rows, 0, 0, q);
  return aten::call<Tensor>("aten::expand", "", rows, batch_sizes(like, q, m), false);
}

// (y diag(scale) + Z diag(noise)) R^-1 as two products; the second one adds zeros unless a column is dependent, and on
// the CPU, where looking costs nothing, is then left out. `error`, on the CPU, bounds ||Q^T Q - I||.
Tensor pass(const Tensor& y, double shift, double* error) {
  const Factor f = factor(y, shift);
  const Tensor q = product(y, mul(f.inverse, torch::stable::unsqueeze(f.scale, -1)));
  const Tensor noise = torch::stable::contiguous(noise_of(f.r, shift, false));
  if (error) {
    *error = shift * sum_of_squares(torch::stable::contiguous(f.inverse));
    if (sum_of_squares(noise) == 0) return q;
  }
  const Tensor rows = random_rows(y, y.size(y.dim() - 2), y.size(y.dim() - 1));
  return torch::stable::subtract(q, product(rows, mul(f.inverse, torch::stable::unsqueeze(noise, -1)), true), -1.0);
}

// The same in float64, where an explicit inverse would leave 7e-12 of the input outside the span.
Tensor wide_pass(const Tensor& y, double shift) {
  const Factor f = factor(y, shift, false);
  Tensor scaled = mul(y, torch::stable::unsqueeze(f.scale, -2));
  if (shift > 0) {
    const Tensor noise = torch::stable::unsqueeze(noise_of(f.r, shift, true), -2);
    const Tensor rows = random_rows(y, y.size(y.dim() - 2), y.size(y.dim() - 1));
    scaled = torch::stable::subtract(scaled, mul(transposed(rows), noise), -1.0);
  }
  return aten::call<Tensor>("aten::linalg_solve_triangular", "", f.r, scaled, true, false, false);
}

// Columns scaled by powers of two to about one: their squares then neither overflow nor vanish.
Tensor moderate(const Tensor& y) {
  const Tensor largest = torch::stable::amax(aten::call<Tensor>("aten::abs", "", y), -2, true);
  const Tensor exponent = std::get<1>(aten::call<Tensor, Tensor>("aten::frexp", "Tensor", largest));
  return aten::call<Tensor>("aten::ldexp", "Tensor", y, aten::call<Tensor>("aten::neg", "", exponent));
}

}  // namespace

Tensor well_conditioned(const Tensor& input) {
  const Factor f = factor(input, shift_for(input.size(input.dim() - 2), input.size(input.dim() - 1)));
  const Tensor t = mul(f.inverse, torch::stable::unsqueeze(f.scale, -1));
  return product(input, torch::stable::to(t, input.scalar_type()));
}

namespace {

// One matrix on the CPU: stops after the pass that has done enough, the first one for a well-conditioned input.
Tensor orthonormal_on_cpu(const Tensor& input, double shift) {
  double error = 1;
  Tensor q = pass(input, shift, &error);
  for (int i = 1; i < kPasses && !(error < kEnough); ++i) q = pass(q, shift, &error);
  return torch::stable::to(q, ScalarType::Float);
}

// Entry by entry, so that each comes out as it would alone.
Tensor batch_on_cpu(const Tensor& input, double shift) {
  const int64_t m = input.size(input.dim() - 2), q = input.size(input.dim() - 1);
  const Tensor out = torch::stable::new_empty(input, input.sizes(), ScalarType::Float);
  const Tensor from = torch::stable::reshape(input, {-1, m, q}), to = torch::stable::view(out, {-1, m, q});
  for (int64_t b = 0; b < from.size(0); ++b) {
    Tensor entry = torch::stable::select(to, 0, b);
    torch::stable::copy_(entry, orthonormal_on_cpu(torch::stable::select(from, 0, b), shift));
  }
  return out;
}

}  // namespace

Tensor orthonormal(const Tensor& input) {
  const bool wide = input.scalar_type() == ScalarType::Double;
  if (input.numel() == 0)
    return torch::stable::new_empty(input, input.sizes(), wide ? ScalarType::Double : ScalarType::Float);
  const int64_t d = input.dim();
  const double shift = shift_for(input.size(d - 2), input.size(d - 1));
  if (wide) {
    Tensor q = moderate(input);
    for (int i = 0; i < kPasses; ++i) q = wide_pass(q, shift);
    return torch::stable::contiguous(wide_pass(q, 0));
  }
  if (input.is_cpu()) return d == 2 ? orthonormal_on_cpu(input, shift) : batch_on_cpu(input, shift);
  Tensor q = input;
  for (int i = 0; i < kPasses; ++i) q = pass(q, shift, nullptr);
  return torch::stable::to(q, ScalarType::Float);
}

Tensor orthonormalize(const Tensor& input) {
  check_matrix("orthonormalize", "input", input);
  const int64_t d = input.dim();
  STD_TORCH_CHECK(input.size(d - 1) <= input.size(d - 2),
                  "orthonormalize: input: wanted at most as many columns as rows, given shape ", shape(input));
  return orthonormal(input);
}

}  // namespace sculpt::linalg

STABLE_TORCH_LIBRARY_IMPL(sculpt, CompositeExplicitAutograd, m) {
  m.impl("orthonormalize", TORCH_BOX(&sculpt::linalg::orthonormalize));
}

// orthonormalize: shifted CholeskyQR on float64 Gram matrices (Fukaya et al., SIAM J. Sci. Comput. 42, 2020).
//
// One pass scales the columns to unit length, factors their Gram matrix G + s I = R^T R and multiplies by R^-1, which
// takes 1 / sqrt(s), about 1e6, off the condition number. Where R_jj shows that nothing of column j is left beside the
// columns before it, a little of a fixed random vector is added to it first; the passes that follow make of it a
// direction of its own. The work is fixed: no result depends on a branch and nothing is read back from the device.
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

#include "common/aten.h"
#include "common/check.h"

namespace sculpt::linalg {
namespace {

// The scaled Gram matrix has errors of up to a fifth of this (2048 x 1040); less, and its Cholesky factor breaks down.
double shift_for(int64_t m, int64_t q) { return std::ldexp(double(m + 8 * q), -53); }
// Columns with R_jj^2 below this many shifts are taken for dependent. 1e2 and 1e5 are as good.
constexpr double kDependent = 1e4;
// The fixed random vectors, their share of a dependent column: a rounding of the result's dtype.
constexpr int64_t kSeed = 1;
double noise_for(bool wide) { return std::ldexp(1, wide ? -50 : -24); }

Tensor mul(const Tensor& a, const Tensor& b) { return aten::call<Tensor>("aten::mul", "Tensor", a, b); }
Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, t.dim() - 2, t.dim() - 1); }
Tensor product(const Tensor& input, const Tensor& factor, bool transpose = false) {
  return aten::call<Tensor>("sculpt::_product", "", input, factor, transpose);
}
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
  Tensor scale;  // (..., q)
  Tensor r;      // (..., q, q) upper triangular
};

Factor factor(const Tensor& y, double shift) {
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
  const Tensor lower = std::get<0>(aten::call<Tensor, Tensor>("aten::linalg_cholesky_ex", "", scaled, false, false));
  return {scale, transposed(lower)};
}

Tensor inverse(const Tensor& r) {
  const Tensor identity = filled(r, 0);
  Tensor ones = diagonal(identity);
  torch::stable::fill_(ones, 1);
  return aten::call<Tensor>("aten::linalg_solve_triangular", "", r, identity, true, true, false);
}

// noise for dependent columns and 0 elsewhere, (..., q).
Tensor noise_of(const Tensor& r, double shift, bool wide) {
  const Tensor d = diagonal(r), squares = mul(d, d);
  const Tensor weak = aten::call<Tensor>("aten::lt", "Tensor", squares, filled(squares, kDependent * shift));
  return aten::call<Tensor>("aten::where", "self", weak, filled(squares, noise_for(wide)), filled(squares, 0));
}

bool all_zero(const Tensor& t) {
  const Tensor values = torch::stable::contiguous(t);
  const double* p = static_cast<const double*>(values.const_data_ptr());
  return std::all_of(p, p + values.numel(), [](double x) { return x == 0; });
}

// Z^T for m x q random unit columns: a Hankel matrix, m + q numbers seen through overlapping rows.
Tensor random_rows(const Tensor& like, int64_t m, int64_t q) {
  const Tensor shape = torch::stable::new_empty(like, {m + q, 1}, ScalarType::Double);
  const Tensor normals = aten::call<Tensor>("sculpt::test_matrix", "", shape, int64_t(1), kSeed, true, false, int64_t(0),
                                            int64_t(0));
  const Tensor scaled = mul(normals, filled(normals, 1 / std::sqrt(double(m))));
  Tensor rows = aten::call<Tensor>("aten::unfold", "", torch::stable::view(scaled, {m + q}), int64_t(0), m, int64_t(1));
  rows = torch::stable::narrow(rows, 0, 0, q);
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < like.dim() - 2; ++i) sizes.push_back(like.size(i));
  sizes.push_back(q);
  sizes.push_back(m);
  return aten::call<Tensor>("aten::expand", "", rows, sizes, false);
}

// (y diag(scale) + Z diag(noise)) R^-1 as two products; the second one adds zeros unless a column is dependent, and on
// the CPU, where looking costs nothing, is then left out.
Tensor pass(const Tensor& y, double shift) {
  const Factor f = factor(y, shift);
  const Tensor inv = inverse(f.r);
  const Tensor q = product(y, mul(inv, torch::stable::unsqueeze(f.scale, -1)));
  const Tensor noise = noise_of(f.r, shift, false);
  if (y.is_cpu() && all_zero(noise)) return q;
  const Tensor rows = random_rows(y, y.size(y.dim() - 2), y.size(y.dim() - 1));
  return torch::stable::subtract(q, product(rows, mul(inv, torch::stable::unsqueeze(noise, -1)), true), -1.0);
}

// The same in float64, where an explicit inverse would leave 7e-12 of the input outside the span.
Tensor wide_pass(const Tensor& y, double shift) {
  const Factor f = factor(y, shift);
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
  const Tensor t = mul(inverse(f.r), torch::stable::unsqueeze(f.scale, -1));
  return product(input, torch::stable::to(t, input.scalar_type()));
}

Tensor orthonormal(const Tensor& input) {
  const bool wide = input.scalar_type() == ScalarType::Double;
  const ScalarType type = wide ? ScalarType::Double : ScalarType::Float;
  if (input.numel() == 0) return torch::stable::new_empty(input, input.sizes(), type);
  const int64_t d = input.dim();
  const double shift = shift_for(input.size(d - 2), input.size(d - 1));
  if (wide) {
    Tensor q = moderate(input);
    for (int i = 0; i < 3; ++i) q = wide_pass(q, shift);
    return torch::stable::contiguous(wide_pass(q, 0));
  }
  return torch::stable::to(pass(pass(pass(input, shift), shift), shift), type);
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

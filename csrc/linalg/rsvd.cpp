// rsvd: the randomized range finder of Halko, Martinsson and Tropp (SIAM Review 53, 2011, algorithms 4.4 and 5.1),
// composed of products and Cholesky factors on every device.
//
// Reads the matrix 2 n_iter + 2 times, 2 m n q operations each (q = rank + oversample); between two products the thin
// factor is made well conditioned. Products in float32 of float32, bf16 and fp16 matrices alike, without a copy.
#include <torch/csrc/stable/library.h>

#include "common/aten.h"
#include "common/check.h"
#include "common/jacobi.h"
#include "linalg/cholesky_qr.h"
#include "linalg/products.h"

namespace sculpt::linalg {
namespace {

Tensor columns(Tensor t, int64_t count) { return torch::stable::narrow(t, -1, 0, count); }

// The n x q test matrix, its first columns replaced by those of `start`.
Tensor test_matrix(const Tensor& input, int64_t q, int64_t seed, bool transpose, const Optional& start) {
  const int64_t given = start ? std::min(q, start->size(start->dim() - 1)) : 0;
  Tensor omega = aten::call<Tensor>("sculpt::test_matrix", "", input, q - given, seed, transpose, false, int64_t(0), given);
  if (!given) return omega;
  return aten::call<Tensor>("aten::cat", "", std::vector<Tensor>{columns(*start, given), omega}, int64_t(-1));
}

// The entry of largest magnitude of every column of u becomes positive.
void fix_signs(Tensor& u, Tensor& v) {
  const Tensor size = aten::call<Tensor>("aten::abs", "", u);
  const Tensor at = aten::call<Tensor>("aten::argmax", "", size, std::optional<int64_t>(-2), true);
  const Tensor sign = aten::call<Tensor>("aten::sgn", "", aten::call<Tensor>("aten::gather", "", u, int64_t(-2), at, false));
  u = mul(u, sign);
  v = mul(v, sign);
}

// The triangular factor P^T image, summed in the precision of the products.
Tensor core(const Tensor& p, const Tensor& image) {
  return torch::stable::contiguous(transposed(product(image, p, true)));
}

// All triplets of the small factor, V not transposed. On a GPU by Jacobi rotations: the library takes a batch's
// matrices one after the other and waits for the device between them, 336 ms for 224 of 80 x 80 on an H200, the kernel 2.3.
std::tuple<Tensor, Tensor, Tensor> small_svd(const Tensor& small) {
  const bool fits = small.scalar_type() == ScalarType::Float && small.size(small.dim() - 1) <= kJacobiMaxSize;
  if (fits && !small.is_cpu())
    return aten::call<Tensor, Tensor, Tensor>("sculpt::_jacobi_svd", "", small);
  Tensor a, s, bt;
  aten::serially(small.is_cpu(), [&] {
    std::tie(a, s, bt) = aten::call<Tensor, Tensor, Tensor>("aten::linalg_svd", "", small, false,
                                                            std::optional<std::string>());
  });
  return {a, s, transposed(bt)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> rsvd(const Tensor& input, int64_t rank, Optional start, int64_t oversample,
                                        int64_t n_iter, int64_t seed) {
  const char* op = "rsvd";
  check_matrix(op, "input", input);
  const int64_t d = input.dim(), m = input.size(d - 2), n = input.size(d - 1), thin = std::min(m, n);
  STD_TORCH_CHECK(rank >= 1 && rank <= thin, op, ": rank: wanted 1 to min(m, n) = ", thin, ", given ", rank);
  STD_TORCH_CHECK(oversample >= 0, op, ": oversample: wanted 0 or more, given ", oversample);
  STD_TORCH_CHECK(n_iter >= 0, op, ": n_iter: wanted 0 or more, given ", n_iter);
  if (start) {
    check_thin(op, "start", *start, input, n, -1);
    STD_TORCH_CHECK(start->dim() == d, op, ": start: wanted as many dimensions as input");
  }
  const int64_t q = std::min(rank + oversample, thin);

  // From here on the matrix X is tall: input, or its transpose.
  const bool flip = m < n;
  Tensor basis;  // of X's range, tall x q
  if (q < thin) {
    Tensor factor;
    if (flip && start) {  // the start lives on the long side here: one product more
      Tensor image = product(input, columns(*start, std::min(q, start->size(d - 1))), false);
      factor = test_matrix(input, q, seed, true, image);
    } else {
      factor = test_matrix(input, q, seed, flip, start);
    }
    basis = product(input, factor, flip);
    for (int64_t i = 0; i < n_iter; ++i) {
      const Tensor back = well_conditioned(product(input, well_conditioned(basis), !flip));
      basis = product(input, back, flip);
    }
    basis = orthonormal(basis);
  }
  // X ~ basis core^T P^T with P core = X^T basis. Where the sketch would be as wide as X: X = P core, without an error.
  const bool whole = q == thin;
  const Tensor tall = flip ? transposed(input) : input;
  const Tensor image = whole ? tall : product(input, basis, !flip), p = orthonormal(image);
  const auto [a, s, right] = small_svd(core(p, image));
  const Tensor b = columns(right, rank);
  Tensor short_side = product(p, columns(a, rank), false);
  Tensor long_side = whole ? b : product(basis, b, false);
  if (whole) std::swap(short_side, long_side);
  Tensor u = flip ? short_side : long_side, v = flip ? long_side : short_side;
  fix_signs(u, v);
  return {torch::stable::contiguous(u), torch::stable::contiguous(columns(s, rank)), torch::stable::contiguous(v)};
}

}  // namespace sculpt::linalg

STABLE_TORCH_LIBRARY_IMPL(sculpt, CompositeExplicitAutograd, m) { m.impl("rsvd", TORCH_BOX(&sculpt::linalg::rsvd)); }

// The projection ops of every device that has no kernels of its own, in library products: GPUs in a program without Python.
// `import sculpt_ops` puts the dispatch between Triton, CUDA C++ and library products in their place (sculpt_ops/ops/cuda.py).
//
// A single matrix with bases of its own dtype takes one read and one write besides its thin products
// (project_products.cpp); batches, metrics, `restore_` and 16-bit matrices with float32 bases are the plain expressions
// of sculpt_ops/reference.py, the last through a float32 copy.
#include <torch/csrc/stable/library.h>

#include "common/project_ops.h"
#include "linalg/products.h"
#include "linalg/project_products.h"

namespace sculpt::linalg {
namespace {

using torch::stable::matmul;
using torch::stable::subtract;

// L M (L^T x - image), or turned (x R - image) M R^T.
Tensor inside(const Tensor& x, const Tensor& basis, const Optional& metric, const Optional& image, bool turned) {
  Tensor coefficients = turned ? matmul(x, basis) : matmul(transposed(basis), x);
  if (image) coefficients = subtract(coefficients, *image);
  if (metric) coefficients = turned ? matmul(coefficients, *metric) : matmul(*metric, coefficients);
  return turned ? matmul(coefficients, transposed(basis)) : matmul(basis, coefficients);
}

Tensor add(const Tensor& a, const Tensor& b) { return subtract(a, b, -1.0); }

Tensor plain(Tensor x, const Sides& a) {
  if (a.block) {
    const Tensor seen = matmul(transposed(*a.left), x);
    Tensor core = matmul(a.left_metric ? matmul(*a.left_metric, seen) : seen, *a.right);
    if (a.core) core = subtract(core, *a.core);
    if (a.right_metric) core = matmul(core, *a.right_metric);
    return subtract(x, matmul(matmul(*a.left, core), transposed(*a.right)));
  }
  const auto side = [&](const Optional& basis, const Optional& metric, const Optional& image, bool keep, bool turned) {
    if (!basis) return;
    if (!keep)
      x = subtract(x, inside(x, *basis, metric, image, turned));
    else if (a.reference)
      x = add(*a.reference, inside(subtract(x, *a.reference), *basis, metric, {}, turned));
    else
      x = inside(x, *basis, metric, {}, turned);
  };
  side(a.left, a.left_metric, a.left_image, a.keep_left, false);
  side(a.right, a.right_metric, a.right_image, a.keep_right, true);
  return x;
}

constexpr Optional Sides::*kThin[] = {&Sides::left,       &Sides::right,       &Sides::left_metric, &Sides::right_metric,
                                      &Sides::left_image, &Sides::right_image, &Sides::core,        &Sides::reference};

// One matrix with nothing but bases, of its dtype.
bool takes_products(const Tensor& in, const Sides& a) {
  bool good = in.dim() == 2;
  for (const auto member : kThin) {
    const Optional& t = a.*member;
    const bool basis = member == &Sides::left || member == &Sides::right;
    good = good && (!t || (basis && t->scalar_type() == in.scalar_type()));
  }
  return good;
}

void execute(const Tensor& in, Tensor out, const Sides& given) {
  if (in.numel() == 0) return;
  if (!given.left && !given.right) {
    if (in.get() != out.get()) torch::stable::copy_(out, in);
    return;
  }
  if (takes_products(in, given)) {
    const Tensor none = torch::stable::new_empty(in, {0});
    const int64_t form =
        (given.keep_left ? kKeepLeft : 0) + (given.keep_right ? kKeepRight : 0) + (given.block ? kBlock : 0);
    return foreach_project_products_({in}, {given.left.value_or(none)}, {given.right.value_or(none)}, {out}, {form});
  }
  ScalarType type = in.scalar_type();
  for (const auto member : kThin)
    if (is_half(type) && given.*member && (given.*member)->scalar_type() == ScalarType::Float) type = ScalarType::Float;
  Sides a = given;
  for (const auto member : kThin)
    if (Optional& t = a.*member) t = torch::stable::to(*t, type);
  torch::stable::copy_(out, plain(torch::stable::to(in, type), a));
}

}  // namespace
}  // namespace sculpt::linalg

STABLE_TORCH_LIBRARY_IMPL(sculpt, CompositeExplicitAutograd, m) {
  sculpt::ProjectOps<sculpt::linalg::execute>::implement(m);
}

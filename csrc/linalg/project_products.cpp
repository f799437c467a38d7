// `_foreach_project_products_`, private: the projections of a list of single matrices in library products, on every
// device, in one call. Both sides of LLaMA-2 7B's 224 matrices take 22 ms on an H200; asked for one by one in Python
// they took 31.
//
// Callers have checked the lists. Nothing but aten's calls on the current stream: a CUDA graph can capture it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <map>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/heuristics.h"
#include "linalg/project_products.h"

// `addmm.out` of every device with its factors, Scalars, which the dispatcher's stable form cannot pass. torch calls it
// deprecated and has no other: weak, so that where it is gone this op fails and not the loading of the library.
extern "C" AOTITorchError aoti_torch_addmm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat1,
                                               AtenTensorHandle mat2, float beta, float alpha) __attribute__((weak));

namespace sculpt::linalg {
namespace {

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
// out = beta source + alpha a b; out may be source.
void addmm(const Tensor& out, const Tensor& source, const Tensor& a, const Tensor& b, float beta, float alpha) {
  STD_TORCH_CHECK(aoti_torch_addmm_out, "_foreach_project_products_: given a torch without aoti_torch_addmm_out");
  TORCH_ERROR_CODE_CHECK(aoti_torch_addmm_out(out.get(), source.get(), a.get(), b.get(), beta, alpha));
}
#pragma GCC diagnostic pop

void copy(const Tensor& to, const Tensor& from) { TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(to.get(), from.get(), 0)); }

// out = a b, as torch's own `mm.out` asks for it.
void product(const Tensor& a, const Tensor& b, const Tensor& out) { addmm(out, out, a, b, 0, 1); }

// out = source - a b, one read and one write of a matrix.
void subtract(const Tensor& source, const Tensor& a, const Tensor& b, const Tensor& out) {
  addmm(out, source, a, b, 1, -1);
}

// Memory of `t` as rows x columns from its element `first` on; not by the dispatcher, which takes longer than all else.
Tensor view(const Tensor& t, int64_t rows, int64_t columns, int64_t pitch, int64_t step, int64_t first = 0) {
  const int64_t sizes[] = {rows, columns}, strides[] = {pitch, step};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, first, &handle));
  return Tensor(handle);
}

Tensor across(const Tensor& t) { return view(t, t.size(1), t.size(0), t.stride(1), t.stride(0)); }

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    case ScalarType::Half:
      return Type::kFloat16;
    case ScalarType::Double:
      return Type::kFloat64;
    default:
      return Type::kFloat32;
  }
}

// Projections one after the other, which share the memory of their thin factors.
class Products {
 public:
  // A null basis: its side is left alone. `out` may be `grad`.
  void project(const Tensor& grad, const Tensor* left, const Tensor* right, const Tensor& out, int64_t form) {
    if (form) return through_thin(grad, left, right, out, form);
    if (left && right) {
      const auto pays = grad.is_cpu() ? stacked : stacked_on_gpu;
      if (pays(grad.size(0), grad.size(1), left->size(1), right->size(1), type_of(grad)))
        return at_once(grad, *left, *right, out);
    }
    const Tensor* source = &grad;
    if (left) {
      const Tensor wide = of_left(*source, *left);
      subtract(*source, *left, wide, out);
      source = &out;
    }
    if (right) {
      const Tensor tall = of_right(*source, *right);
      subtract(*source, tall, across(*right), out);
    }
  }

 private:
  enum Place { kTall, kFlat, kCore };

  // Contiguous memory, the same at every call for a place, type and device, larger where that is needed.
  Tensor room(Place place, const Tensor& like, int64_t rows, int64_t columns) {
    Tensor& held = rooms_[{place, like.scalar_type(), like.get_device_index()}];
    const int64_t wanted = std::max<int64_t>(rows * columns, 1);
    if (!held.defined() || held.numel() < wanted) held = torch::stable::new_empty(like, {wanted});
    return view(held, rows, columns, columns, 1);
  }

  Tensor of_left(const Tensor& grad, const Tensor& left) {
    Tensor wide = room(kFlat, grad, left.size(1), grad.size(1));
    product(across(left), grad, wide);
    return wide;
  }

  Tensor of_right(const Tensor& grad, const Tensor& right) {
    Tensor tall = room(kTall, grad, grad.size(0), right.size(1));
    product(grad, right, tall);
    return tall;
  }

  // x (I - R R^T), or x R R^T, in the place of x.
  void right_of(const Tensor& x, const Tensor& right, bool keep) {
    const Tensor core = room(kCore, x, x.size(0), right.size(1));
    product(x, right, core);
    keep ? product(core, across(right), x) : subtract(x, core, across(right), x);
  }

  // (I - L L^T) x, or L L^T x, in the place of x.
  void left_of(const Tensor& x, const Tensor& left, bool keep) {
    const Tensor core = room(kCore, x, left.size(1), x.size(1));
    product(across(left), x, core);
    keep ? product(left, core, x) : subtract(x, left, core, x);
  }

  // Both sides removed: G - [L, B - L (L^T B)] [L^T G; R^T] with B = G R.
  //
  // Reads G for each thin product, the second time from L2 as far as G fits (the 33 MB of a 4096 x 4096 in bf16 do in
  // an H100's 50 MB), and reads and writes it once: 4 m n elements instead of the 6 m n of one side after the other,
  // for 4 min(m, n) r s operations more.
  void at_once(const Tensor& grad, const Tensor& left, const Tensor& right, const Tensor& out) {
    const int64_t m = grad.size(0), n = grad.size(1), r = left.size(1), s = right.size(1);
    const Tensor tall = room(kTall, grad, m, r + s), flat = room(kFlat, grad, r + s, n);
    const Tensor wide = view(flat, r, n, n, 1), thin = view(tall, m, s, r + s, 1, r);
    product(across(left), grad, wide);
    product(grad, right, thin);
    // One of the thin factors is cleared of what both contain: the shorter one.
    m <= n ? left_of(thin, left, false) : right_of(wide, right, false);
    copy(view(tall, m, r, r + s, 1), left);
    copy(view(flat, s, n, n, 1, r * n), across(right));
    subtract(grad, tall, flat, out);
  }

  // A kept side goes first, so that the other one is applied to its thin factor and not to the matrix; so does one side
  // of the block form.
  void through_thin(const Tensor& grad, const Tensor* left, const Tensor* right, const Tensor& out, int64_t form) {
    const bool block = form & kBlock, both = block || form == (kKeepLeft | kKeepRight);
    const bool from_left =
        both ? left_first(grad.size(0), grad.size(1), left->size(1), right->size(1)) : form & kKeepLeft;
    Tensor tall, wide;
    if (from_left) {
      tall = *left;
      wide = of_left(grad, *left);
      if (right) right_of(wide, *right, both);
    } else {
      tall = of_right(grad, *right);
      wide = across(*right);
      if (left) left_of(tall, *left, both);
    }
    block ? subtract(grad, tall, wide, out) : product(tall, wide, out);
  }

  std::map<std::tuple<Place, ScalarType, int32_t>, Tensor> rooms_;
};

}  // namespace

void foreach_project_products_(std::vector<Tensor> grads, std::vector<Tensor> lefts, std::vector<Tensor> rights,
                               std::vector<Tensor> outs, std::vector<int64_t> forms) {
  Products products;
  const auto given = [](const Tensor& basis) { return basis.dim() == 1 ? nullptr : &basis; };
  for (size_t i = 0; i < grads.size(); ++i)
    products.project(grads[i], given(lefts[i]), given(rights[i]), outs[i], forms[i]);
}

}  // namespace sculpt::linalg

STABLE_TORCH_LIBRARY_IMPL(sculpt, CompositeImplicitAutograd, m) {
  m.impl("_foreach_project_products_", TORCH_BOX(&sculpt::linalg::foreach_project_products_));
}

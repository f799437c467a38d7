// The projection ops on the CPU: orientation, batches, threads; the arithmetic is in panel.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/project_ops.h"
#include "common/shapes.h"
#include "cpu/run.h"
#include "cpu/views.h"

namespace sculpt::cpu {
namespace {

void run(const OneSided& s) {
  if (s.m == 0 || s.n == 0) return;
  // Nothing is removed: the identity, to the bit, and no pass over the matrix when it is in place.
  if (s.basis.cols == 0 && !s.keep && s.in == s.out) return;
  const Kernels& k = kernels();
  const double work = 4.0 * double(s.m) * double(s.n) * double(s.basis.cols);
  const int64_t threads = threads_for(work);
  const Plan plan = k.plan(s, threads);
  run_panels(
      plan, threads, [&](void* shared, int64_t task) { k.pack(s, plan, shared, task); },
      [&](const void* shared, void* scratch, int64_t index) { k.panel(s, plan, shared, scratch, index); });
}

// Everything one call needs of one matrix (one batch entry), in either orientation.
struct Problem {
  View in, out, left, right, left_metric, right_metric, left_image, right_image, core, reference;
  bool keep_left, keep_right, block;
};

// P_L W P_R is (P_R^T W^T P_L^T)^T: the sides change places and commute.
Problem transposed(const Problem& p) {
  return {transposed(p.in), transposed(p.out), p.right, p.left, transposed(p.right_metric), transposed(p.left_metric),
          transposed(p.right_image), transposed(p.left_image), transposed(p.core), transposed(p.reference),
          p.keep_right, p.keep_left, p.block};
}

OneSided one_side(const Problem& p, Side side) {
  OneSided s;
  s.side = side;
  s.keep = side == Side::left ? p.keep_left : p.keep_right;
  s.type = p.in.type;
  s.m = p.in.rows;
  s.n = p.in.cols;
  s.in = p.in.data;
  s.in_stride = p.in.row_stride;
  s.out = const_cast<void*>(p.out.data);
  s.out_stride = p.out.row_stride;
  s.basis = side == Side::left ? p.left : p.right;
  s.image = side == Side::left ? p.left_image : p.right_image;
  s.metric = side == Side::left ? p.left_metric : p.right_metric;
  if (s.keep) {
    s.reference = p.reference.data;
    s.reference_stride = p.reference.row_stride;
    s.image = View();
  }
  return s;
}

// out = in - L (M_L L^T in R M_R - core) R^T, through the r x n coefficients M_L L^T in.
void run_block(const Problem& p) {
  OneSided s = one_side(p, Side::left);
  s.keep = false;
  s.reference = nullptr;
  s.image = View();
  const int64_t r = p.left.cols;
  const Type type = s.type == Type::f64 ? Type::f64 : Type::f32;
  s.coefficients = coefficient_arena.reserve(r * s.n * (type == Type::f64 ? 8 : 4) + 64);
  s.phase = Phase::gather;
  run(s);

  OneSided c;
  c.side = Side::right;
  c.keep = true;
  c.type = type;
  c.m = r;
  c.n = s.n;
  c.in = c.out = s.coefficients;
  c.in_stride = c.out_stride = s.n;
  c.basis = p.right;
  c.image = p.core;
  c.metric = p.right_metric;
  run(c);

  s.phase = Phase::apply;
  run(s);
  coefficient_arena.trim();
}

// Unit column stride on every side from here on.
void run_oriented(Problem p) {
  if (p.block) return run_block(p);
  if (p.left.data) {
    run(one_side(p, Side::left));
    p.in = p.out;
  }
  if (p.right.data) run(one_side(p, Side::right));
}

// Two sides of a 16-bit matrix, one after the other, one of them with a basis or a metric in float32: rounded in between
// as well, the result was up to 100 times as far off as the plain expression, which is computed in float32.
bool rounds_between(const Tensor& in, const Sides& a) {
  const auto single = [](const Optional& t) { return t && t->scalar_type() == ScalarType::Float; };
  return in.element_size() == 2 && a.left && a.right && !a.block &&
         (single(a.left) || single(a.right) || a.left_metric || a.right_metric);
}

// A metric of a float64 matrix may be float32; the kernels read it in their own type.
Sides with_wide_metrics(Sides a, const Tensor& in) {
  if (in.scalar_type() != ScalarType::Double) return a;
  for (Optional* t : {&a.left_metric, &a.right_metric})
    if (*t && (*t)->scalar_type() == ScalarType::Float) *t = contiguous_copy(**t, ScalarType::Double);
  return a;
}

Sides in_float32(Sides a) {
  for (Optional* t : {&a.left, &a.right, &a.left_image, &a.right_image, &a.core, &a.reference})
    if (*t) *t = contiguous_copy(**t, ScalarType::Float);
  return a;
}

// in and out may be one tensor.
void execute(const Tensor& in, Tensor out, const Sides& given) {
  if (in.numel() == 0) return;
  const Sides a = with_wide_metrics(given, in);
  if (!a.left && !a.right) {
    if (in.get() != out.get()) torch::stable::copy_(out, in);
    return;
  }
  if (rounds_between(in, a)) {
    const Tensor work = contiguous_copy(in, ScalarType::Float);
    execute(work, work, in_float32(a));
    torch::stable::copy_(out, work);
    return;
  }
  const int64_t batch = batch_of(in);
  for (int64_t b = 0; b < batch; ++b) {
    const auto of = [&](const Optional& t) { return entry(t, in, b); };
    Problem p{of(in), entry(out, in, b), of(a.left), of(a.right), of(a.left_metric), of(a.right_metric),
              of(a.left_image), of(a.right_image), of(a.core), of(a.reference), a.keep_left, a.keep_right, a.block};
    if (rows_contiguous(p.in) && rows_contiguous(p.out) && rows_contiguous(p.reference)) {
      run_oriented(p);
    } else if (cols_contiguous(p.in) && cols_contiguous(p.out) && cols_contiguous(p.reference)) {
      run_oriented(transposed(p));
    } else {
      // Mixed or doubly strided layouts: once through contiguous copies. Nothing has been written yet at b == 0,
      // and every later entry has the same layout.
      Sides copies = a;
      if (a.reference) copies.reference = contiguous_copy(*a.reference);
      Tensor work = contiguous_copy(in);
      execute(work, work, copies);
      torch::stable::copy_(out, work);
      return;
    }
  }
}

}  // namespace
}  // namespace sculpt::cpu

STABLE_TORCH_LIBRARY_IMPL(sculpt, CPU, m) { sculpt::ProjectOps<sculpt::cpu::execute>::implement(m); }

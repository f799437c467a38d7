// The projection ops on the CPU: orientation, batches, threads; the arithmetic is in panel.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/check.h"
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

struct Arguments {
  Optional left, right, left_metric, right_metric, left_image, right_image, core, reference;
  bool keep_left = false, keep_right = false, block = false;
};

// Two sides of a 16-bit matrix, one after the other, one of them with a basis or a metric in float32: rounded in between
// as well, the result was up to 100 times as far off as the plain expression, which is computed in float32.
bool rounds_between(const Tensor& in, const Arguments& a) {
  const auto single = [](const Optional& t) { return t && t->scalar_type() == ScalarType::Float; };
  return in.element_size() == 2 && a.left && a.right && !a.block &&
         (single(a.left) || single(a.right) || a.left_metric || a.right_metric);
}

// A metric of a float64 matrix may be float32; the kernels read it in their own type.
Arguments with_wide_metrics(Arguments a, const Tensor& in) {
  if (in.scalar_type() != ScalarType::Double) return a;
  for (Optional* t : {&a.left_metric, &a.right_metric})
    if (*t && (*t)->scalar_type() == ScalarType::Float) *t = contiguous_copy(**t, ScalarType::Double);
  return a;
}

Arguments in_float32(Arguments a) {
  for (Optional* t : {&a.left, &a.right, &a.left_image, &a.right_image, &a.core, &a.reference})
    if (*t) *t = contiguous_copy(**t, ScalarType::Float);
  return a;
}

// in and out may be one tensor.
void execute(const Tensor& in, Tensor out, const Arguments& given) {
  if (in.numel() == 0) return;
  const Arguments a = with_wide_metrics(given, in);
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
      Arguments copies = a;
      if (a.reference) copies.reference = contiguous_copy(*a.reference);
      Tensor work = contiguous_copy(in);
      execute(work, work, copies);
      torch::stable::copy_(out, work);
      return;
    }
  }
}

void check_project(const char* op, const Tensor& grad, const Optional& left, const Optional& right,
                   const Optional& left_metric, const Optional& right_metric, bool keep_left, bool keep_right,
                   bool block) {
  check_matrix(op, "grad", grad);
  if (left) check_basis(op, "left", *left, grad, grad.size(grad.dim() - 2));
  if (right) check_basis(op, "right", *right, grad, grad.size(grad.dim() - 1));
  STD_TORCH_CHECK(!block || (left && right), op, ": block: wanted both left and right, given ",
                  left ? "no right" : right ? "no left" : "neither");
  STD_TORCH_CHECK(!block || !(keep_left || keep_right), op, ": block: wanted no keep_left and no keep_right with it");
  STD_TORCH_CHECK(!keep_left || left, op, ": keep_left: wanted a left basis with it, given left=None");
  STD_TORCH_CHECK(!keep_right || right, op, ": keep_right: wanted a right basis with it, given right=None");
  if (left_metric) check_metric(op, "left_metric", *left_metric, "left", left, grad);
  if (right_metric) check_metric(op, "right_metric", *right_metric, "right", right, grad);
}

void check_in_place(const char* op, const Tensor& grad, const Optional& left, const Optional& right,
                    const Optional& left_metric, const Optional& right_metric) {
  check_written(op, "grad", grad);
  check_apart(op, "grad", grad, "left", left);
  check_apart(op, "grad", grad, "right", right);
  check_apart(op, "grad", grad, "left_metric", left_metric);
  check_apart(op, "grad", grad, "right_metric", right_metric);
}

}  // namespace

Tensor project(const Tensor& grad, Optional left, Optional right, Optional left_metric, Optional right_metric,
               bool keep_left, bool keep_right, bool block) {
  check_project("project", grad, left, right, left_metric, right_metric, keep_left, keep_right, block);
  Tensor out = torch::stable::empty_like(grad);
  execute(grad, out, {left, right, left_metric, right_metric, {}, {}, {}, {}, keep_left, keep_right, block});
  return out;
}

void project_(Tensor grad, Optional left, Optional right, Optional left_metric, Optional right_metric, bool keep_left,
              bool keep_right, bool block) {
  check_project("project_", grad, left, right, left_metric, right_metric, keep_left, keep_right, block);
  check_in_place("project_", grad, left, right, left_metric, right_metric);
  execute(grad, grad, {left, right, left_metric, right_metric, {}, {}, {}, {}, keep_left, keep_right, block});
}

void foreach_project_(std::vector<Tensor> grads, std::vector<Optional> lefts, std::vector<Optional> rights,
                      std::optional<std::vector<Optional>> given_left_metrics,
                      std::optional<std::vector<Optional>> given_right_metrics, std::vector<bool> keep_lefts,
                      std::vector<bool> keep_rights, bool block) {
  const char* op = "foreach_project_";
  std::vector<Optional> left_metrics = given_left_metrics.value_or(std::vector<Optional>());
  std::vector<Optional> right_metrics = given_right_metrics.value_or(std::vector<Optional>());
  const size_t count = grads.size();
  const auto same = [&](const char* name, size_t given, bool may_be_empty) {
    STD_TORCH_CHECK(given == count || (may_be_empty && given == 0), op, ": ", name, ": wanted ", count,
                    " entries, one for each of grads, given ", given);
  };
  same("lefts", lefts.size(), false);
  same("rights", rights.size(), false);
  same("keep_lefts", keep_lefts.size(), true);
  same("keep_rights", keep_rights.size(), true);
  same("left_metrics", left_metrics.size(), true);
  same("right_metrics", right_metrics.size(), true);
  const auto flag = [](const std::vector<bool>& flags, size_t i) { return !flags.empty() && flags[i]; };
  left_metrics.resize(count);
  right_metrics.resize(count);

  std::vector<std::pair<Extent, size_t>> written;
  for (size_t i = 0; i < count; ++i) {
    check_project(op, grads[i], lefts[i], rights[i], left_metrics[i], right_metrics[i], flag(keep_lefts, i),
                  flag(keep_rights, i), block);
    check_in_place(op, grads[i], lefts[i], rights[i], left_metrics[i], right_metrics[i]);
    if (grads[i].numel()) written.emplace_back(Extent(grads[i]), i);
  }
  std::sort(written.begin(), written.end(), [](const auto& a, const auto& b) { return a.first.begin < b.first.begin; });
  for (size_t i = 0; i < written.size(); ++i)
    for (size_t j = i + 1; j < written.size() && written[j].first.begin < written[i].first.end; ++j)
      STD_TORCH_CHECK(!share_memory(grads[written[i].second], grads[written[j].second]), op,
                      ": grads: wanted entries with memory of their own, given entries ", written[i].second, " and ",
                      written[j].second, " that share memory");
  // A basis of one entry inside the matrix of another would be read after it was overwritten. Column slices may lie
  // within the span of an entry that begins long before them.
  std::vector<uintptr_t> reach;
  for (const auto& [extent, i] : written) reach.push_back(reach.empty() ? extent.end : std::max(reach.back(), extent.end));
  const std::pair<const char*, const std::vector<Optional>*> read[] = {
      {"lefts", &lefts}, {"rights", &rights}, {"left_metrics", &left_metrics}, {"right_metrics", &right_metrics}};
  for (const auto& [name, tensors] : read)
    for (size_t i = 0; i < count; ++i) {
      const Optional& tensor = (*tensors)[i];
      if (!tensor || tensor->numel() == 0) continue;
      const Extent extent(*tensor);
      const auto after = std::lower_bound(written.begin(), written.end(), extent.end,
                                          [](const auto& w, uintptr_t end) { return w.first.begin < end; });
      for (size_t at = after - written.begin(); at > 0 && reach[at - 1] > extent.begin; --at)
        STD_TORCH_CHECK(!share_memory(grads[written[at - 1].second], *tensor), op, ": ", name,
                        ": wanted memory of its own, given entry ", i, " that shares memory with entry ",
                        written[at - 1].second, " of grads");
    }
  for (size_t i = 0; i < count; ++i)
    execute(grads[i], grads[i],
            {lefts[i], rights[i], left_metrics[i], right_metrics[i], {}, {}, {}, {}, flag(keep_lefts, i),
             flag(keep_rights, i), block});
}

void restore_(Tensor weight, Optional left, Optional left_image, Optional right, Optional right_image, Optional core,
              Optional reference, bool keep_left, bool keep_right, bool block) {
  const char* op = "restore_";
  check_matrix(op, "weight", weight);
  const int64_t m = weight.size(weight.dim() - 2), n = weight.size(weight.dim() - 1);
  if (left) check_basis(op, "left", *left, weight, m);
  if (right) check_basis(op, "right", *right, weight, n);
  STD_TORCH_CHECK(!block || (left && right && core), op, ": block: wanted left, right and core with it");
  STD_TORCH_CHECK(!block || !(keep_left || keep_right), op, ": block: wanted no keep_left and no keep_right with it");
  STD_TORCH_CHECK(!keep_left || left, op, ": keep_left: wanted a left basis with it, given left=None");
  STD_TORCH_CHECK(!keep_right || right, op, ": keep_right: wanted a right basis with it, given right=None");
  if (!block) {
    STD_TORCH_CHECK(!(keep_left || keep_right) || reference, op,
                    ": reference: wanted the start weight with keep_left or keep_right, given None");
    STD_TORCH_CHECK(!left || keep_left || left_image, op, ": left_image: wanted left^T W0, given None");
    STD_TORCH_CHECK(!right || keep_right || right_image, op, ": right_image: wanted W0 right, given None");
  }
  if (left && left_image) check_thin(op, "left_image", *left_image, weight, left->size(left->dim() - 1), n);
  if (right && right_image) check_thin(op, "right_image", *right_image, weight, m, right->size(right->dim() - 1));
  if (core && block)
    check_thin(op, "core", *core, weight, left->size(left->dim() - 1), right->size(right->dim() - 1));
  if (reference) check_thin(op, "reference", *reference, weight, m, n);
  STD_TORCH_CHECK(!reference || reference->scalar_type() == weight.scalar_type(), op,
                  ": reference: wanted the dtype of weight");
  check_written(op, "weight", weight);
  check_apart(op, "weight", weight, "left", left);
  check_apart(op, "weight", weight, "left_image", left_image);
  check_apart(op, "weight", weight, "right", right);
  check_apart(op, "weight", weight, "right_image", right_image);
  check_apart(op, "weight", weight, "core", core);
  check_apart(op, "weight", weight, "reference", reference);
  execute(weight, weight, {left, right, {}, {}, left_image, right_image, core, reference, keep_left, keep_right, block});
}

}  // namespace sculpt::cpu

STABLE_TORCH_LIBRARY_IMPL(sculpt, CPU, m) {
  m.impl("project", TORCH_BOX(&sculpt::cpu::project));
  m.impl("project_", TORCH_BOX(&sculpt::cpu::project_));
  m.impl("foreach_project_", TORCH_BOX(&sculpt::cpu::foreach_project_));
  m.impl("restore_", TORCH_BOX(&sculpt::cpu::restore_));
}

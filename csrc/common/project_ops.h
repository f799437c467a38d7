// The projection ops but for their arithmetic: what they accept, checked before anything is written, on every device.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "common/check.h"

namespace sculpt {

// Of one matrix. From left_image to reference: what `restore_` puts back.
struct Sides {
  Optional left, right, left_metric, right_metric, left_image, right_image, core, reference;
  bool keep_left = false, keep_right = false, block = false;
};

inline void check_sides(const char* op, const char* name, const Tensor& matrix, const Sides& p) {
  check_matrix(op, name, matrix);
  if (p.left) check_basis(op, "left", *p.left, matrix, matrix.size(matrix.dim() - 2));
  if (p.right) check_basis(op, "right", *p.right, matrix, matrix.size(matrix.dim() - 1));
  STD_TORCH_CHECK(!p.block || (p.left && p.right), op, ": block: wanted both left and right, given ",
                  p.left ? "no right" : p.right ? "no left" : "neither");
  STD_TORCH_CHECK(!p.block || !(p.keep_left || p.keep_right), op,
                  ": block: wanted no keep_left and no keep_right with it");
  STD_TORCH_CHECK(!p.keep_left || p.left, op, ": keep_left: wanted a left basis with it, given left=None");
  STD_TORCH_CHECK(!p.keep_right || p.right, op, ": keep_right: wanted a right basis with it, given right=None");
  if (p.left_metric) check_metric(op, "left_metric", *p.left_metric, "left", p.left, matrix);
  if (p.right_metric) check_metric(op, "right_metric", *p.right_metric, "right", p.right, matrix);
}

inline void check_in_place(const char* op, const char* name, const Tensor& matrix, const Sides& p) {
  check_written(op, name, matrix);
  check_apart(op, name, matrix, "left", p.left);
  check_apart(op, name, matrix, "right", p.right);
  check_apart(op, name, matrix, "left_metric", p.left_metric);
  check_apart(op, name, matrix, "right_metric", p.right_metric);
}

inline void check_start(const char* op, const Tensor& weight, const Sides& p) {
  const int64_t m = weight.size(weight.dim() - 2), n = weight.size(weight.dim() - 1);
  const int64_t r = p.left ? p.left->size(p.left->dim() - 1) : 0, s = p.right ? p.right->size(p.right->dim() - 1) : 0;
  STD_TORCH_CHECK(!p.block || p.core, op, ": core: wanted left^T W0 right with block, given None");
  if (!p.block) {
    STD_TORCH_CHECK(!(p.keep_left || p.keep_right) || p.reference, op,
                    ": reference: wanted the start weight with keep_left or keep_right, given None");
    STD_TORCH_CHECK(!p.left || p.keep_left || p.left_image, op, ": left_image: wanted left^T W0, given None");
    STD_TORCH_CHECK(!p.right || p.keep_right || p.right_image, op, ": right_image: wanted W0 right, given None");
  }
  if (p.left && p.left_image) check_thin(op, "left_image", *p.left_image, weight, r, n);
  if (p.right && p.right_image) check_thin(op, "right_image", *p.right_image, weight, m, s);
  if (p.core && p.block) check_thin(op, "core", *p.core, weight, r, s);
  if (p.reference) check_thin(op, "reference", *p.reference, weight, m, n);
  STD_TORCH_CHECK(!p.reference || p.reference->scalar_type() == weight.scalar_type(), op,
                  ": reference: wanted the dtype of weight");
  check_apart(op, "weight", weight, "left_image", p.left_image);
  check_apart(op, "weight", weight, "right_image", p.right_image);
  check_apart(op, "weight", weight, "core", p.core);
  check_apart(op, "weight", weight, "reference", p.reference);
}

// No matrix of a list may have memory of another, or of what another is projected by, which would be read after it was
// overwritten.
inline void check_entries_apart(const char* op, const std::vector<Tensor>& grads, const std::vector<Sides>& entries) {
  const size_t count = grads.size();
  std::vector<std::pair<Extent, size_t>> written;
  for (size_t i = 0; i < count; ++i)
    if (grads[i].numel()) written.emplace_back(Extent(grads[i]), i);
  std::sort(written.begin(), written.end(), [](const auto& a, const auto& b) { return a.first.begin < b.first.begin; });
  for (size_t i = 0; i < written.size(); ++i)
    for (size_t j = i + 1; j < written.size() && written[j].first.begin < written[i].first.end; ++j)
      STD_TORCH_CHECK(!share_memory(grads[written[i].second], grads[written[j].second]), op,
                      ": grads: wanted entries with memory of their own, given entries ", written[i].second, " and ",
                      written[j].second, " that share memory");
  // Column slices may lie within the span of an entry that begins long before them.
  std::vector<uintptr_t> reach;
  for (const auto& [extent, i] : written) reach.push_back(reach.empty() ? extent.end : std::max(reach.back(), extent.end));
  const std::pair<const char*, Optional Sides::*> read[] = {{"lefts", &Sides::left},
                                                            {"rights", &Sides::right},
                                                            {"left_metrics", &Sides::left_metric},
                                                            {"right_metrics", &Sides::right_metric}};
  for (const auto& [name, member] : read)
    for (size_t i = 0; i < count; ++i) {
      const Optional& tensor = entries[i].*member;
      if (!tensor || tensor->numel() == 0) continue;
      const Extent extent(*tensor);
      const auto after = std::lower_bound(written.begin(), written.end(), extent.end,
                                          [](const auto& w, uintptr_t end) { return w.first.begin < end; });
      for (size_t at = after - written.begin(); at > 0 && reach[at - 1] > extent.begin; --at)
        STD_TORCH_CHECK(!share_memory(grads[written[at - 1].second], *tensor), op, ": ", name,
                        ": wanted memory of its own, given entry ", i, " that shares memory with entry ",
                        written[at - 1].second, " of grads");
    }
}

// The ops of a device whose arithmetic is `execute(in, out, sides)`: out, which may be in, becomes the projection of in, or
// what `restore_` makes of it.
template <void (*execute)(const Tensor&, Tensor, const Sides&)>
struct ProjectOps {
  static Tensor project(const Tensor& grad, Optional left, Optional right, Optional left_metric, Optional right_metric,
                        bool keep_left, bool keep_right, bool block) {
    const Sides p{left, right, left_metric, right_metric, {}, {}, {}, {}, keep_left, keep_right, block};
    check_sides("project", "grad", grad, p);
    const Tensor out = torch::stable::empty_like(grad);
    execute(grad, out, p);
    return out;
  }

  static void project_(Tensor grad, Optional left, Optional right, Optional left_metric, Optional right_metric,
                       bool keep_left, bool keep_right, bool block) {
    const Sides p{left, right, left_metric, right_metric, {}, {}, {}, {}, keep_left, keep_right, block};
    check_sides("project_", "grad", grad, p);
    check_in_place("project_", "grad", grad, p);
    execute(grad, grad, p);
  }

  static void foreach_project_(std::vector<Tensor> grads, std::vector<Optional> lefts, std::vector<Optional> rights,
                               std::optional<std::vector<Optional>> left_metrics,
                               std::optional<std::vector<Optional>> right_metrics, std::vector<bool> keep_lefts,
                               std::vector<bool> keep_rights, bool block) {
    const char* op = "foreach_project_";
    const size_t count = grads.size();
    const auto padded = [&](const char* name, auto list, bool may_be_empty) {
      STD_TORCH_CHECK(list.size() == count || (may_be_empty && list.empty()), op, ": ", name, ": wanted ", count,
                      " entries, one for each of grads, given ", list.size());
      list.resize(count);
      return list;
    };
    lefts = padded("lefts", std::move(lefts), false);
    rights = padded("rights", std::move(rights), false);
    keep_lefts = padded("keep_lefts", std::move(keep_lefts), true);
    keep_rights = padded("keep_rights", std::move(keep_rights), true);
    const auto weights_left = padded("left_metrics", left_metrics.value_or(std::vector<Optional>()), true);
    const auto weights_right = padded("right_metrics", right_metrics.value_or(std::vector<Optional>()), true);
    std::vector<Sides> entries;
    for (size_t i = 0; i < count; ++i) {
      entries.push_back({lefts[i], rights[i], weights_left[i], weights_right[i], {}, {}, {}, {}, keep_lefts[i],
                         keep_rights[i], block});
      check_sides(op, "grad", grads[i], entries[i]);
      check_in_place(op, "grad", grads[i], entries[i]);
    }
    check_entries_apart(op, grads, entries);
    for (size_t i = 0; i < count; ++i) execute(grads[i], grads[i], entries[i]);
  }

  static void restore_(Tensor weight, Optional left, Optional left_image, Optional right, Optional right_image,
                       Optional core, Optional reference, bool keep_left, bool keep_right, bool block) {
    const Sides p{left, right, {}, {}, left_image, right_image, core, reference, keep_left, keep_right, block};
    check_sides("restore_", "weight", weight, p);
    check_in_place("restore_", "weight", weight, p);
    check_start("restore_", weight, p);
    execute(weight, weight, p);
  }

  template <class Library>
  static void implement(Library& library) {
    library.impl("project", TORCH_BOX(&ProjectOps::project));
    library.impl("project_", TORCH_BOX(&ProjectOps::project_));
    library.impl("foreach_project_", TORCH_BOX(&ProjectOps::foreach_project_));
    library.impl("restore_", TORCH_BOX(&ProjectOps::restore_));
  }
};

}  // namespace sculpt

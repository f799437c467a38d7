// What `_adam_` accepts, on every device.
#pragma once
#include "common/check.h"

namespace sculpt {

using Tensors = std::vector<Tensor>;
using Optionals = std::vector<std::optional<Tensor>>;

inline void check_adam(const char* op, const Tensors& steps, const Tensors& grads, const Tensors& firsts,
                       const Tensors& seconds, const Tensors& counts, const Optionals& weights, const Optionals& lows,
                       const Optionals& starts, const Tensor& lr) {
  const auto same = [&](const char* name, size_t given) {
    STD_TORCH_CHECK(given == grads.size(), op, ": ", name, ": wanted ", grads.size(),
                    " entries, one for each of grads, given ", given);
  };
  same("steps", steps.size()), same("firsts", firsts.size()), same("seconds", seconds.size());
  same("counts", counts.size()), same("weights", weights.size()), same("lows", lows.size());
  same("starts", starts.size());
  STD_TORCH_CHECK(
      lr.numel() == 1 && (lr.scalar_type() == ScalarType::Float || lr.scalar_type() == ScalarType::Double), op,
      ": lr: wanted one number of dtype float32 or float64, given shape ", shape(lr), " or another dtype");
  for (size_t i = 0; i < grads.size(); ++i) {
    const Tensor& grad = grads[i];
    const auto elements = [&](const char* name, const Tensor& t) {
      STD_TORCH_CHECK(t.sizes().equals(grad.sizes()), op, ": ", name, ": wanted the shape ", shape(grad),
                      " of entry ", i, " of grads, given ", shape(t));
      STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, ": wanted contiguous memory, given strides in entry ", i);
      STD_TORCH_CHECK(t.is_cpu() == grad.is_cpu(), op, ": ", name, ": wanted the device of grads");
    };
    const auto narrow = [&](const char* name, const Tensor& t) {
      elements(name, t);
      STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16, op, ": ", name,
                      ": wanted dtype float32 or bfloat16, given another");
    };
    narrow("grads", grad), narrow("steps", steps[i]), narrow("firsts", firsts[i]), narrow("seconds", seconds[i]);
    STD_TORCH_CHECK(firsts[i].scalar_type() == seconds[i].scalar_type(), op,
                    ": seconds: wanted the dtype of firsts, given another in entry ", i);
    STD_TORCH_CHECK(counts[i].numel() == 1 && counts[i].scalar_type() == ScalarType::Float, op,
                    ": counts: wanted one float32 number each, given shape ", shape(counts[i]),
                    " or another dtype in entry ", i);
    STD_TORCH_CHECK(counts[i].is_cpu() || !grad.is_cpu(), op, ": counts: wanted the device of grads, or the CPU");
    STD_TORCH_CHECK(lr.is_cpu() || !grad.is_cpu(), op, ": lr: wanted the device of grads, or the CPU");
    STD_TORCH_CHECK(weights[i] || (!lows[i] && !starts[i]), op,
                    ": weights: wanted one where lows or starts has one, given none in entry ", i);
    if (weights[i]) narrow("weights", *weights[i]);
    if (lows[i]) {
      elements("lows", *lows[i]);
      STD_TORCH_CHECK(lows[i]->scalar_type() == ScalarType::Short &&
                          weights[i]->scalar_type() == ScalarType::BFloat16,
                      op, ": lows: wanted int16 beside bfloat16 weights, given others in entry ", i);
    }
    if (starts[i]) {
      elements("starts", *starts[i]);
      STD_TORCH_CHECK(starts[i]->scalar_type() == weights[i]->scalar_type(), op,
                      ": starts: wanted the dtype of weights, given another in entry ", i);
    }
  }
  // Everything that is written, against everything: two entries of one element would be stepped twice.
  Uses uses;
  const auto use = [&](const char* name, const Tensor& t, bool written) { uses.add(name, t, written); };
  for (size_t i = 0; i < grads.size(); ++i) {
    use("grads", grads[i], false), use("steps", steps[i], true), use("firsts", firsts[i], true);
    use("seconds", seconds[i], true), use("counts", counts[i], true);
    if (weights[i]) use("weights", *weights[i], false);
    if (lows[i]) use("lows", *lows[i], false);
    if (starts[i]) use("starts", *starts[i], false);
  }
  uses.check(op);
}

}  // namespace sculpt

// AdamW's elementwise work on the CPU, before the step is projected: one pass over memory for a list of tensors.
//
// Reads gradient, both moments and what decays, writes moments and step: 28 bytes an element in float32. Operation by
// operation it moves 52 (zeros for torch's fused AdamW to add to, its pass, the scaled weight, and its subtraction).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/adam_checks.h"
#include "cpu/clones.h"
#include "cpu/views.h"

// The same to the bit in all copies only if no product and sum are fused.
#include "cpu/unfused.h"
#include "common/adam.h"
#include "common/rounding.h"

namespace sculpt::cpu {
namespace {

constexpr int64_t kChunk = 1 << 14;  // elements a piece of work, about 10 us
constexpr int64_t kBlock = 512;      // elements that are made float32 at a time, on the stack

inline float widened(uint16_t x) { return float_of(uint32_t(x) << 16); }

SCULPT_CLONES void widen_all(const uint16_t* __restrict__ x, float* __restrict__ out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = widened(x[i]);
}

SCULPT_CLONES void join_all(const uint16_t* __restrict__ high, const int16_t* __restrict__ low, float* __restrict__ out,
                            int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = join(high[i], low[i]);
}

SCULPT_CLONES void narrow_all(const float* __restrict__ x, uint16_t* __restrict__ out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = nearest(x[i]);
}

SCULPT_CLONES void subtract_all(const float* __restrict__ x, float* __restrict__ out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] -= x[i];
}

SCULPT_CLONES void step_all(const float* __restrict__ grad, float* __restrict__ first, float* __restrict__ second,
                            float* __restrict__ out, int64_t n, AdamStep step) {
  for (int64_t i = 0; i < n; ++i) {
    float a = first[i], b = second[i];
    out[i] = adam_direction(grad[i], a, b, step);
    first[i] = a;
    second[i] = b;
  }
}

SCULPT_CLONES void decay_all(const float* __restrict__ weight, float* __restrict__ out, int64_t n, float decay) {
  for (int64_t i = 0; i < n; ++i) out[i] -= decay * weight[i];
}

// `n` elements of `t` from `at` on as float32: where they lie, or in `room`.
const float* read(const Tensor& t, int64_t at, int64_t n, float* room) {
  if (t.scalar_type() == ScalarType::Float) return static_cast<const float*>(t.const_data_ptr()) + at;
  widen_all(static_cast<const uint16_t*>(t.const_data_ptr()) + at, room, n);
  return room;
}

// Written numbers where they lie, or for bfloat16 float32 ones that are stored there; `read`: what lies there is wanted.
class Written {
 public:
  Written(const Tensor& t, int64_t at, int64_t n, bool read = true) : n_(n) {
    if (t.scalar_type() == ScalarType::Float) {
      values_ = static_cast<float*>(t.mutable_data_ptr()) + at;
      return;
    }
    narrow_ = static_cast<uint16_t*>(t.mutable_data_ptr()) + at;
    if (read) widen_all(narrow_, room_, n);
    values_ = room_;
  }
  float* values() { return values_; }
  void store() const {
    if (narrow_) narrow_all(room_, narrow_, n_);
  }

 private:
  int64_t n_;
  float* values_;
  uint16_t* narrow_ = nullptr;
  float room_[kBlock];
};

struct Entry {
  const Tensor &grad, &first, &second, &out;
  const Optional &weight, &low, &start;
  AdamStep step;

  void run(int64_t begin, int64_t end) const {
    float room[kBlock], other[kBlock];
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t n = std::min(kBlock, end - at);
      Written a(first, at, n), b(second, at, n), to(out, at, n, false);
      step_all(read(grad, at, n, room), a.values(), b.values(), to.values(), n, step);
      if (weight && step.decay != 0.0f) decay_all(decaying(at, n, room, other), to.values(), n, step.decay);
      a.store(), b.store(), to.store();
    }
  }

  const float* decaying(int64_t at, int64_t n, float* room, float* other) const {
    const float* value = room;
    if (low)
      join_all(static_cast<const uint16_t*>(weight->const_data_ptr()) + at,
               static_cast<const int16_t*>(low->const_data_ptr()) + at, room, n);
    else
      value = read(*weight, at, n, room);
    if (!start) return value;
    if (value != room) std::memcpy(room, value, n * sizeof(float));
    subtract_all(read(*start, at, n, other), room, n);
    return room;
  }
};

}  // namespace

void adam_(Tensors steps, Tensors grads, Tensors firsts, Tensors seconds, Tensors counts, Optionals weights,
           Optionals lows, Optionals starts, Tensor lr, double beta1, double beta2, double eps, double weight_decay,
           bool maximize) {
  check_adam("_adam_", steps, grads, firsts, seconds, counts, weights, lows, starts, lr);
  const void* at = lr.const_data_ptr();
  const double rate = lr.scalar_type() == ScalarType::Double ? *static_cast<const double*>(at)
                                                             : double(*static_cast<const float*>(at));
  std::vector<Entry> entries;
  // Of each entry the first piece of work, and the end.
  std::vector<int64_t> first_chunk{0};
  for (size_t i = 0; i < grads.size(); ++i) {
    float& count = *static_cast<float*>(counts[i].mutable_data_ptr());
    count += 1.0f;
    entries.push_back({grads[i], firsts[i], seconds[i], steps[i], weights[i], lows[i], starts[i],
                       AdamStep::of(rate, beta1, beta2, eps, weight_decay, maximize, count)});
    first_chunk.push_back(first_chunk.back() + (grads[i].numel() + kChunk - 1) / kChunk);
  }
  torch::stable::parallel_for(0, first_chunk.back(), 1, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(first_chunk.begin(), first_chunk.end(), begin) - first_chunk.begin() - 1;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (chunk >= first_chunk[i + 1]) ++i;
      const int64_t at = (chunk - first_chunk[i]) * kChunk;
      entries[i].run(at, std::min(at + kChunk, grads[i].numel()));
    }
  });
}

}  // namespace sculpt::cpu

STABLE_TORCH_LIBRARY_IMPL(sculpt, CPU, m) { m.impl("_adam_", TORCH_BOX(&sculpt::cpu::adam_)); }

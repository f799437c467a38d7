// Master weights in halves and stochastic rounding on the CPU: one pass over memory each.
#include "common/rounding.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/clones.h"
#include "cpu/views.h"

namespace sculpt::cpu {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements, about 10 us, for which a second thread is worth waking
constexpr int kBlock = 64;           // counters drawn at a time, eight elements each

SCULPT_CLONES void join_all(const uint16_t* __restrict__ high, const int16_t* __restrict__ low, float* __restrict__ out,
                            int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = join(high[i], low[i]);
}

SCULPT_CLONES void split_all(const float* __restrict__ value, uint16_t* __restrict__ high, int16_t* __restrict__ low,
                             int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const Halves halves = split(value[i]);
    high[i] = halves.high;
    low[i] = halves.low;
  }
}

SCULPT_CLONES void add_split_all(uint16_t* __restrict__ high, int16_t* __restrict__ low, const float* __restrict__ step,
                                 int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const Halves halves = split(join(high[i], low[i]) + step[i]);
    high[i] = halves.high;
    low[i] = halves.low;
  }
}

SCULPT_CLONES void draw(int64_t group, Key key, uint16_t* noise) {
  uint32_t words[4][kBlock], joined[4 * kBlock];
  for (int i = 0; i < kBlock; ++i) {
    const Words x = rounding_words(group + i, key);
    words[0][i] = x.a;
    words[1][i] = x.b;
    words[2][i] = x.c;
    words[3][i] = x.d;
  }
  for (int i = 0; i < kBlock; ++i)
    for (int w = 0; w < 4; ++w) joined[4 * i + w] = words[w][i];
  for (int i = 0; i < 4 * kBlock; ++i) {
    noise[2 * i] = uint16_t(joined[i]);
    noise[2 * i + 1] = uint16_t(joined[i] >> 16);
  }
}

SCULPT_CLONES void round_all(const float* __restrict__ value, const uint16_t* __restrict__ noise,
                             uint16_t* __restrict__ out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = round_stochastic(value[i], noise[i]);
}

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
const uint16_t* highs(const Tensor& t) { return static_cast<const uint16_t*>(t.const_data_ptr()); }
uint16_t* highs(Tensor& t) { return static_cast<uint16_t*>(t.mutable_data_ptr()); }
const int16_t* lows(const Tensor& t) { return static_cast<const int16_t*>(t.const_data_ptr()); }
int16_t* lows(Tensor& t) { return static_cast<int16_t*>(t.mutable_data_ptr()); }

Tensor row_major(const Tensor& t) { return t.is_contiguous() ? t : contiguous_copy(t); }

Tensor row_major_like(const Tensor& t) { return torch::stable::empty(t.sizes(), t.scalar_type()); }

// Whether one loop over memory serves both: no gaps in `written`, every element of it once, and `t` laid out alike.
bool in_step(const Tensor& written, const Tensor& t) {
  const Extent extent(written);
  if (int64_t(extent.end - extent.begin) != written.numel() * int64_t(written.element_size())) return false;
  for (int64_t i = 0; i < t.dim(); ++i)
    if (t.size(i) > 1 && t.stride(i) != written.stride(i)) return false;
  return true;
}

void check_halves(const char* op, const Tensor& high, const Tensor& low) {
  check_elements(op, "high", high, ScalarType::BFloat16, "bfloat16", "high", high);
  check_elements(op, "low", low, ScalarType::Short, "int16", "high", high);
}

void check_halves_written(const char* op, const Tensor& high, const Tensor& low, const char* name, const Tensor& t) {
  check_written(op, "high", high);
  check_written(op, "low", low);
  check_apart(op, "high", high, "low", low);
  check_apart(op, "high", high, name, t);
  check_apart(op, "low", low, name, t);
}

}  // namespace

Tensor join_halves(const Tensor& high, const Tensor& low) {
  check_halves("_join", high, low);
  const Tensor h = row_major(high), l = row_major(low);
  Tensor out = torch::stable::empty(high.sizes(), ScalarType::Float);
  float* to = floats(out);
  torch::stable::parallel_for(0, out.numel(), kGrain, [&](int64_t begin, int64_t end) {
    join_all(highs(h) + begin, lows(l) + begin, to + begin, end - begin);
  });
  return out;
}

void split_(const Tensor& value, Tensor high, Tensor low) {
  check_halves("_split_", high, low);
  check_elements("_split_", "value", value, ScalarType::Float, "float32", "high", high);
  check_halves_written("_split_", high, low, "value", value);
  if (!in_step(high, low) || !in_step(high, value)) {
    Tensor h = row_major_like(high), l = row_major_like(low);
    split_(row_major(value), h, l);
    torch::stable::copy_(high, h);
    torch::stable::copy_(low, l);
    return;
  }
  uint16_t* h = highs(high);
  int16_t* l = lows(low);
  torch::stable::parallel_for(0, value.numel(), kGrain, [&](int64_t begin, int64_t end) {
    split_all(floats(value) + begin, h + begin, l + begin, end - begin);
  });
}

void add_split_(Tensor high, Tensor low, const Tensor& step) {
  check_halves("_add_split_", high, low);
  check_elements("_add_split_", "step", step, ScalarType::Float, "float32", "high", high);
  check_halves_written("_add_split_", high, low, "step", step);
  if (!in_step(high, low) || !in_step(high, step)) {
    Tensor h = contiguous_copy(high), l = contiguous_copy(low);
    add_split_(h, l, row_major(step));
    torch::stable::copy_(high, h);
    torch::stable::copy_(low, l);
    return;
  }
  uint16_t* h = highs(high);
  int16_t* l = lows(low);
  torch::stable::parallel_for(0, step.numel(), kGrain, [&](int64_t begin, int64_t end) {
    add_split_all(h + begin, l + begin, floats(step) + begin, end - begin);
  });
}

void round_stochastic_(Tensor out, const Tensor& value, int64_t seed, int64_t offset) {
  const char* op = "_round_stochastic_";
  check_elements(op, "out", out, ScalarType::BFloat16, "bfloat16", "out", out);
  check_elements(op, "value", value, ScalarType::Float, "float32", "out", out);
  STD_TORCH_CHECK(offset >= 0 && offset <= int64_t(1) << 62, op, ": offset: wanted 0 to 2^62, given ", offset);
  check_written(op, "out", out);
  check_apart(op, "out", out, "value", value);
  if (!out.is_contiguous()) {
    Tensor o = row_major_like(out);
    round_stochastic_(o, value, seed, offset);
    torch::stable::copy_(out, o);
    return;
  }
  const int64_t n = out.numel();
  if (n == 0) return;
  const Tensor v = row_major(value);
  uint16_t* to = highs(out);
  const Key key = Key::of(seed);
  // In groups of the whole sequence, so that a shard's first and last may be used in part.
  torch::stable::parallel_for(offset / 8, (offset + n + 7) / 8, kGrain / 8, [&](int64_t begin, int64_t end) {
    uint16_t noise[8 * kBlock];
    for (int64_t group = begin; group < end; group += kBlock) {
      draw(group, key, noise);
      const int64_t first = std::max(8 * group, offset);
      const int64_t count = std::min(8 * std::min(group + kBlock, end), offset + n) - first;
      round_all(floats(v) + (first - offset), noise + (first - 8 * group), to + (first - offset), count);
    }
  });
}

}  // namespace sculpt::cpu

STABLE_TORCH_LIBRARY_IMPL(sculpt, CPU, m) {
  m.impl("_join", TORCH_BOX(&sculpt::cpu::join_halves));
  m.impl("_split_", TORCH_BOX(&sculpt::cpu::split_));
  m.impl("_add_split_", TORCH_BOX(&sculpt::cpu::add_split_));
  m.impl("_round_stochastic_", TORCH_BOX(&sculpt::cpu::round_stochastic_));
}

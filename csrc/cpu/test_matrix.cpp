// The test matrix of the randomized range finder on the CPU.
//
// 2.5 ns a number on one core of an AMD Zen 5, most of it the ten rounds of Philox: 4096 x 144 takes a twentieth of the
// product with it. So it is drawn once and stored; a product that drew its own numbers would do so once per panel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/shapes.h"
#include "cpu/clones.h"
#include "cpu/views.h"

// The normals are the same to the bit everywhere only if no product and sum are fused.
#include "cpu/unfused.h"
#include "common/bits.h"
#include "common/philox.h"

namespace sculpt::cpu {
namespace {

constexpr int kBlock = 64;        // counters drawn at a time, four numbers each
constexpr int64_t kGrain = 1024;  // counters, about 5 us, for which a second thread is worth waking

struct Draw {
  Key key;
  bool rademacher;
  Type rounding;  // bf16 and f16: to values of that type
};

// To nearest even, at `dropped` low bits of the significand.
inline float round_significand(float x, int dropped) {
  const uint32_t u = bits_of(x);
  return float_of((u + (1u << (dropped - 1)) - 1 + (u >> dropped & 1)) & ~((1u << dropped) - 1));
}
inline float round_bf16(float x) { return round_significand(x, 16); }
// Below 2^-14 float16 is denormal, a multiple of 2^-24: the spacing of floats between 1/2 and 1.
inline float round_f16(float x) {
  const float normal = round_significand(x, 13), denormal = (x + 0.75f) - 0.75f;
  return float_of(bits_of(x) & 0x7fffffffu) < 0x1p-14f ? denormal : normal;
}

struct Counters {
  uint32_t row[kBlock], group[kBlock], batch[kBlock];
};

SCULPT_CLONES void draw(const Counters& at, Draw how, float* out) {
  float z[4][kBlock];
  if (how.rademacher) {
    for (int i = 0; i < kBlock; ++i) {
      const Words x = philox({at.row[i], at.group[i], at.batch[i], 0}, how.key);
      z[0][i] = rademacher(x.a);
      z[1][i] = rademacher(x.b);
      z[2][i] = rademacher(x.c);
      z[3][i] = rademacher(x.d);
    }
  } else {
    for (int i = 0; i < kBlock; ++i) {
      const Words x = philox({at.row[i], at.group[i], at.batch[i], 0}, how.key);
      normals(x.a, x.b, z[0][i], z[1][i]);
      normals(x.c, x.d, z[2][i], z[3][i]);
    }
  }
  for (int i = 0; i < kBlock; ++i)
    for (int w = 0; w < 4; ++w) out[4 * i + w] = z[w][i];
  if (how.rounding == Type::bf16)
    for (int i = 0; i < 4 * kBlock; ++i) out[i] = round_bf16(out[i]);
  if (how.rounding == Type::f16)
    for (int i = 0; i < 4 * kBlock; ++i) out[i] = round_f16(out[i]);
}

#if !defined(__clang__)
#pragma GCC pop_options
#endif

// Counters of a rows x (4 groups) grid a batch entry, in row-major order.
struct Position {
  int64_t batch, row, group;
  void advance(int64_t rows, int64_t groups) {
    if (++group < groups) return;
    group = 0;
    if (++row < rows) return;
    row = 0;
    ++batch;
  }
};

// (batch, rows, q) row-major; `row` and `column` are those of its first entry in the whole test matrix.
template <class T>
void fill(T* out, int64_t batch, int64_t rows, int64_t q, int64_t row, int64_t column, Draw how) {
  const int64_t first = column / 4, groups = (column + q + 3) / 4 - first;
  torch::stable::parallel_for(0, batch * rows * groups, kGrain, [&](int64_t begin, int64_t end) {
    Position draws{begin / groups / rows, begin / groups % rows, begin % groups}, writes = draws;
    Counters at;
    float z[4 * kBlock];
    for (int64_t t = begin; t < end; t += kBlock) {
      for (int i = 0; i < kBlock; ++i, draws.advance(rows, groups)) {
        at.row[i] = uint32_t(row + draws.row);
        at.group[i] = uint32_t(first + draws.group);
        at.batch[i] = uint32_t(draws.batch);
      }
      draw(at, how, z);
      const int64_t count = std::min<int64_t>(kBlock, end - t);
      for (int64_t i = 0; i < count; ++i, writes.advance(rows, groups)) {
        const int64_t j = 4 * (first + writes.group) - column;  // less than 0 where the block starts inside a group
        T* line = out + (writes.batch * rows + writes.row) * q;
        for (int64_t w = std::max<int64_t>(0, -j); w < std::min<int64_t>(4, q - j); ++w) line[j + w] = T(z[4 * i + w]);
      }
    }
  });
}

}  // namespace

Tensor test_matrix(const Tensor& input, int64_t q, int64_t seed, bool transpose, bool rademacher, int64_t row,
                   int64_t column) {
  check_sketch("test_matrix", input, q, transpose, row, column);
  const int64_t d = input.dim(), rows = input.size(transpose ? d - 2 : d - 1);
  const int64_t batch = batch_of(input);
  const bool wide = input.scalar_type() == ScalarType::Double;
  Tensor out = torch::stable::empty(batch_sizes(input, rows, q), wide ? ScalarType::Double : ScalarType::Float);
  if (out.numel() == 0) return out;
  const Draw how{Key::of(seed), rademacher, type_of(input)};
  void* data = out.mutable_data_ptr();
  wide ? fill(static_cast<double*>(data), batch, rows, q, row, column, how)
       : fill(static_cast<float*>(data), batch, rows, q, row, column, how);
  return out;
}

}  // namespace sculpt::cpu

STABLE_TORCH_LIBRARY_IMPL(sculpt, CPU, m) { m.impl("test_matrix", TORCH_BOX(&sculpt::cpu::test_matrix)); }

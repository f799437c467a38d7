// SVD of small square matrices by one-sided Jacobi rotations on the CPU, one matrix a thread: step by step what the CUDA
// kernel does, so that its algorithm is tested without a GPU. LAPACK is faster here, rsvd on the CPU uses it.
//
// (4/3 + 4/3) q^3 operations for the pivoted factor and its Q, then 5 to 9 sweeps of 3 to 11 q^3.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "common/check.h"
#include "common/shapes.h"
#include "cpu/clones.h"

// The same to the bit in all copies only if no product and sum are fused.
#include "cpu/unfused.h"
#include "common/jacobi.h"
#include "common/jacobi_checks.h"

namespace sculpt::cpu {
namespace {

// Columns are padded with zeros to a multiple of what a warp has lanes; sums are those of a warp.
constexpr int kLanes = 32;

float across(float* sums) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

SCULPT_CLONES void dot_lanes(const float* __restrict__ x, const float* __restrict__ y, int n, float* __restrict__ sums) {
  for (int at = 0; at < n; at += kLanes)
    for (int i = 0; i < kLanes; ++i) sums[i] += x[at + i] * y[at + i];
}

float dot(const float* x, const float* y, int n) {
  float sums[kLanes] = {};
  dot_lanes(x, y, n, sums);
  return across(sums);
}

SCULPT_CLONES void turn_all(float* __restrict__ x, float* __restrict__ y, int n, JacobiRotation turn) {
  for (int i = 0; i < n; ++i) jacobi_turn(x[i], y[i], turn);
}

SCULPT_CLONES void subtract(float* __restrict__ y, float factor, const float* __restrict__ x, int n) {
  for (int i = 0; i < n; ++i) y[i] -= factor * x[i];
}

// Column after column, `pitch` apart.
struct Work {
  int q, pitch;
  std::vector<float> left, right;  // the matrix, then R^T, then Y; Q, then Q W
  std::vector<float> reflector, taus, values;
  std::vector<int> pivots, order;

  explicit Work(int size)
      : q(size), pitch((size + kLanes - 1) / kLanes * kLanes), left(size_t(q) * pitch), right(left.size()),
        reflector(pitch), taus(q), values(q), pivots(q), order(q) {}

  float* a(int column) { return left.data() + size_t(column) * pitch; }
  float* b(int column) { return right.data() + size_t(column) * pitch; }

  // 1 at row k and the reflector below it, as it is kept in column k.
  const float* reflector_of(int k) {
    std::copy_n(a(k), pitch, reflector.data());
    std::fill_n(reflector.data(), k, 0.0f);
    reflector[k] = 1.0f;
    return reflector.data();
  }

  void reflect(float* column, const float* v, float tau) {
    subtract(column, tau * dot(v, column, pitch), v, pitch);
  }

  void load(const float* from, int exponent) {
    std::fill(left.begin(), left.end(), 0.0f);
    for (int j = 0; j < q; ++j)
      for (int i = 0; i < q; ++i) a(j)[i] = std::ldexp(from[size_t(i) * q + j], -exponent);
    std::iota(pivots.begin(), pivots.end(), 0);
  }

  // R in the upper triangle, reflectors below. Where nothing is left, R's other rows are zero and Q's reflectors none.
  void factor() {
    std::fill(taus.begin(), taus.end(), 0.0f);
    for (int k = 0; k < q; ++k) {
      int pivot = k;
      float square = -1.0f;
      for (int j = k; j < q; ++j) {
        std::copy_n(a(j), pitch, reflector.data());
        std::fill_n(reflector.data(), k, 0.0f);
        const float sum = dot(reflector.data(), reflector.data(), pitch);
        if (sum > square) pivot = j, square = sum;
      }
      if (square < kJacobiZero) {
        for (int j = k; j < q; ++j) std::fill(a(j) + k, a(j) + q, 0.0f);
        return;
      }
      std::swap_ranges(a(k), a(k) + q, a(pivot));
      std::swap(pivots[k], pivots[pivot]);
      const JacobiReflector h = jacobi_reflector(a(k)[k], square);
      taus[k] = h.tau;
      for (int i = k + 1; i < q; ++i) a(k)[i] *= h.inverse;
      a(k)[k] = h.value;
      const float* v = reflector_of(k);
      for (int j = k + 1; j < q; ++j) reflect(a(j), v, h.tau);
    }
  }

  void form_q() {
    std::fill(right.begin(), right.end(), 0.0f);
    for (int j = 0; j < q; ++j) b(j)[j] = 1.0f;
    for (int k = q - 1; k >= 0; --k) {
      const float* v = reflector_of(k);
      for (int j = k; j < q; ++j) reflect(b(j), v, taus[k]);
    }
  }

  void transpose() {
    for (int j = 0; j < q; ++j)
      for (int k = 0; k < j; ++k) a(k)[j] = a(j)[k], a(j)[k] = 0.0f;
  }

  void rotate() {
    const float tolerance = jacobi_tolerance(q);
    bool turned = true;
    for (int sweep = 0; turned && sweep < kJacobiSweeps; ++sweep) {
      turned = false;
      for (int round = 0; round < jacobi_rounds(q); ++round)
        for (int k = 0; k < jacobi_pairs(q); ++k) {
          const JacobiPair pair = jacobi_pair(q, round, k);
          if (pair.high >= q) continue;
          float *x = a(pair.low), *y = a(pair.high);
          const JacobiRotation turn = jacobi_rotation(dot(x, x, pitch), dot(y, y, pitch), dot(x, y, pitch), tolerance);
          if (!turn.turns) continue;
          turned = true;
          turn_all(x, y, pitch, turn);
          turn_all(b(pair.low), b(pair.high), pitch, turn);
        }
    }
  }

  // Unit columns. A rotation that is not quite one stretches both factors alike: the ratio of the norms is free of it.
  int normalize() {
    for (int j = 0; j < q; ++j) {
      const float square = dot(a(j), a(j), pitch), size = std::sqrt(dot(b(j), b(j), pitch)), root = std::sqrt(square);
      const bool some = square >= kJacobiZero;
      values[j] = some ? root / size : 0.0f;
      for (int i = 0; i < q; ++i) b(j)[i] /= size, a(j)[i] = some ? a(j)[i] / root : 0.0f;
    }
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int i, int j) { return values[i] > values[j]; });
    return int(std::count_if(values.begin(), values.end(), [](float x) { return x > 0.0f; }));
  }

  // Columns of zeros become orthogonal to all others: the unit vector that has least in common with those, without its
  // part in them, taken off twice. At least (q - column) / q of its square is left.
  void complete(int first) {
    for (int column = first; column < q; ++column) {
      int best = 0;
      float least = std::numeric_limits<float>::max();
      for (int i = 0; i < q; ++i) {
        float sum = 0.0f;
        for (int t = 0; t < column; ++t) sum += a(order[t])[i] * a(order[t])[i];
        if (sum < least) least = sum, best = i;
      }
      float* x = a(order[column]);
      x[best] = 1.0f;
      for (int twice = 0; twice < 2; ++twice) {
        for (int t = 0; t < column; ++t) taus[t] = dot(a(order[t]), x, pitch);
        for (int t = 0; t < column; ++t) subtract(x, taus[t], a(order[t]), pitch);
      }
      const float size = std::sqrt(dot(x, x, pitch));
      for (int i = 0; i < q; ++i) x[i] /= size;
    }
  }

  void run(const float* from, float* u, float* s, float* v) {
    float largest = 0.0f;
    bool finite = true;
    for (int64_t i = 0; i < int64_t(q) * q; ++i) {
      finite = finite && std::isfinite(from[i]);
      largest = std::max(largest, std::fabs(from[i]));
    }
    if (!finite) {
      const float nan = std::numeric_limits<float>::quiet_NaN();
      std::fill_n(u, int64_t(q) * q, nan), std::fill_n(s, q, nan), std::fill_n(v, int64_t(q) * q, nan);
      return;
    }
    const int exponent = jacobi_exponent(largest);
    load(from, exponent);
    factor();
    form_q();
    transpose();
    rotate();
    complete(normalize());
    for (int r = 0; r < q; ++r) {
      const float *x = a(order[r]), *y = b(order[r]);
      s[r] = std::ldexp(values[order[r]], exponent);
      for (int i = 0; i < q; ++i) u[size_t(i) * q + r] = y[i], v[size_t(pivots[i]) * q + r] = x[i];
    }
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> jacobi_svd(const Tensor& input) {
  check_jacobi("_jacobi_svd", input);
  const int q = static_cast<int>(input.size(input.dim() - 1));
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < input.dim() - 1; ++i) sizes.push_back(input.size(i));
  const Tensor from = torch::stable::contiguous(input);
  const Tensor u = torch::stable::empty(input.sizes(), ScalarType::Float);
  const Tensor s = torch::stable::empty(sizes, ScalarType::Float);
  const Tensor v = torch::stable::empty(input.sizes(), ScalarType::Float);
  if (input.numel() == 0) return {u, s, v};
  const auto at = [](const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
  const float* in = static_cast<const float*>(from.const_data_ptr());
  torch::stable::parallel_for(0, batch_of(input), 1, [&](int64_t begin, int64_t end) {
    Work work(q);
    for (int64_t i = begin; i < end; ++i)
      work.run(in + i * q * q, at(u) + i * q * q, at(s) + i * q, at(v) + i * q * q);
  });
  return {u, s, v};
}

}  // namespace sculpt::cpu

STABLE_TORCH_LIBRARY_IMPL(sculpt, CPU, m) { m.impl("_jacobi_svd", TORCH_BOX(&sculpt::cpu::jacobi_svd)); }

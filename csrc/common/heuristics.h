// Which variant projects a matrix on a GPU: pure functions of sizes, types and the device. `sculpt_ops/ops/heuristics.py`
// calls them through the host module.
//
// Every threshold is calculated from published figures (an H100's 3.0 TB/s and 790 TFLOP/s in bf16), none is measured:
// no kernel here has run on a GPU. They lie below the calculated crossovers, so that a wrong estimate costs a missed gain
// and not a loss. A results file of `bench/gpu_check.sh` is what may replace them.
#pragma once
#include <algorithm>
#include <cstdint>

namespace sculpt {

enum class Variant { kCublas, kTriton, kCuda };

enum class Type { kBFloat16, kFloat16, kFloat32, kFloat64 };

// `batch` matrices m x n, all of them projected in one call; r or s is 0 for a side that is left alone.
struct Work {
  int64_t m, n, r, s, batch;
  Type type, basis;
};

// `capability` is 10 major + minor; an AMD GPU has `hip` set.
struct Gpu {
  int capability;
  bool hip;
  int64_t multiprocessors, l2_bytes;
};

// Which variants the build and the installation have beside library products.
struct Compiled {
  bool triton, cuda;
};

// No CUDA C++ kernel has passed its tests on a GPU: none is chosen, SCULPT_BACKEND=cuda alone reaches them.
constexpr bool kCudaProven = false;

// Calculated crossovers of one side: r 175 in a matrix's own type, 105 with a float32 operand. The next power of two below
// them; two sides read the matrix once for both thin products, and r + s has the same bounds.
constexpr int64_t kMaxRank = 128;
constexpr int64_t kMaxRankFloat32 = 64;
// A float16 matrix has its second product in float32 altogether: coefficients would overflow.
constexpr int64_t kMaxRankFloat16 = 32;
// Kernels of one matrix spill 56 to 240 bytes of registers in some variants at ranks that are no multiple of this.
constexpr int64_t kRankUnit = 16;
// A panel is at least this wide; with fewer panels than multiprocessors a part of the GPU is idle.
constexpr int64_t kPanel = 32;
// A one-sided panel is read twice, the second time from L2 as far as the panels in flight fit 60 % of it. Below this share
// the calculated gain on mm + addmm_ (3 / (3 - share) - 1, so 9 %) is within what our kernels may lose to the library's.
constexpr double kL2Share = 0.6;
constexpr double kLeastFit = 0.25;
// bf16 `tl.dot` needs tensor cores of Ampere.
constexpr int kLeastCapability = 80;

// Operations an H100 does in the time it moves one byte: 790 TFLOP/s (float32: 67, without tensor cores) at 3.0 TB/s.
constexpr double kOpsPerByteHalf = 263.0;
constexpr double kOpsPerByteFloat32 = 22.0;

inline int64_t size_of(Type type) { return type == Type::kFloat64 ? 8 : type == Type::kFloat32 ? 4 : 2; }

inline bool is_half(Type type) { return type == Type::kBFloat16 || type == Type::kFloat16; }

inline int64_t max_triton_rank(Type type, Type basis, bool hip) {
  const bool wide = type == Type::kFloat32 || basis == Type::kFloat32;
  const int64_t rank = type == Type::kFloat16 ? kMaxRankFloat16 : wide ? kMaxRankFloat32 : kMaxRank;
  return hip ? rank / 2 : rank;  // its tiles go through registers to shared memory
}

// Share of a matrix's one-sided second read that L2 answers: panels of kPanel in flight on every multiprocessor.
inline double l2_fit(const Work& work, const Gpu& gpu) {
  const int64_t length = work.r ? work.m : work.n, extent = (work.r ? work.n : work.m) * work.batch;
  const int64_t panels = std::min<int64_t>((extent + kPanel - 1) / kPanel, gpu.multiprocessors);
  const double in_flight = double(panels) * double(length) * kPanel * double(size_of(work.type));
  return in_flight == 0 ? 1.0 : std::min(1.0, kL2Share * double(gpu.l2_bytes) / in_flight);
}

inline Variant choose(const Work& work, const Gpu& gpu, const Compiled& compiled) {
  const int64_t ranks = work.r + work.s;
  if (work.type == Type::kFloat64 || ranks == 0) return Variant::kCublas;
  if (compiled.cuda && kCudaProven) return Variant::kCuda;
  if (!compiled.triton || (!gpu.hip && gpu.capability < kLeastCapability)) return Variant::kCublas;
  if (ranks > max_triton_rank(work.type, work.basis, gpu.hip)) return Variant::kCublas;
  if (work.r % kRankUnit || work.s % kRankUnit) return Variant::kCublas;
  const int64_t across = std::min(work.r ? work.n : work.m, work.s ? work.m : work.n);
  if (across * work.batch < kPanel * gpu.multiprocessors) return Variant::kCublas;
  const bool one_side = !work.r || !work.s;
  return one_side && l2_fit(work, gpu) < kLeastFit ? Variant::kCublas : Variant::kTriton;
}

// Whether two sides go faster in library products as G - [L, G R - L core] [L^T G; R^T], one read for each thin product and
// one read and write, than one side after the other. That saves a read and a write and costs 4 min(m, n) r s operations.
// Time of a product: the larger of its operations and its bytes, in bytes moved; intermediates are left out.
inline bool stacked(int64_t m, int64_t n, int64_t r, int64_t s, Type type) {
  const double ops = is_half(type) ? kOpsPerByteHalf : kOpsPerByteFloat32;
  const double matrix = double(m) * double(n), bytes = matrix * double(size_of(type));
  const auto time = [&](double rank, double passes) { return std::max(2 * matrix * rank / ops, passes * bytes); };
  const double thin = time(double(r), 1) + time(double(s), 1);
  const double apart = thin + time(double(r), 2) + time(double(s), 2);
  const double extra = 4 * double(std::min(m, n)) * double(r) * double(s) / ops;
  return thin + extra + time(double(r + s), 2) < apart;
}

}  // namespace sculpt

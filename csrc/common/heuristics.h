// Which variant projects a matrix on a GPU: pure functions of sizes, types and the device. `sculpt_ops/ops/heuristics.py`
// calls them through the host module.
//
// What is chosen beside library products was measured faster on an H100 and an H200
// (bench/results/nvidia-h100-80gb-hbm3-2026-11-27.json, nvidia-h200-2026-11-27.json; docs/kernels.md has the rows). Other
// GPUs were not measured: they take library products for single matrices.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/side_panels.h"

namespace sculpt {

enum class Variant { kCublas, kTriton, kCuda };

enum class Type { kBFloat16, kFloat16, kFloat32, kFloat64 };

// `batch` matrices m x n, all of them projected in one call; r or s is 0 for a side that is left alone. `block`: of both
// sides, what is in both at once.
struct Work {
  int64_t m, n, r, s, batch;
  Type type, basis;
  bool block = false;
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

// The CUDA C++ projections passed their tests on an H100 and on an H200 (tests/cuda/side_checks.py, both_checks.py). On the
// capability that they passed on they are chosen where they are faster than library products.
constexpr int kCudaCapability = 90;
// One side, whose kernel reads and writes the matrix once: up to this rank, where it fits, it takes 0.47 to 0.75 of the
// library's time with bfloat16 bases and 0.62 to 0.97 with float32 ones (an H100). At 128 0.86 to 1.2 (an H200: 1.1 to 1.3).
// Two sides go one after the other: 0.79 to 0.88 at 64, 0.88 with float32 bases (on an H200 1.06, but two launches for seven
// and no Python between them).
constexpr int64_t kCudaRank = 64;
// Single matrices of at least so many bytes: at 64 4096 x 1024 took 1.07 of the library's time on the right, 576 x 576 1.15 (an
// H100). Up to a rank of 32 smaller ones too (an H200): 0.83 to 1.00 from 1536 x 576 on, 1.02 to 1.08 for 576 x 576, and
// with float32 bases, which the library has in four launches, 0.61 to 0.93 of any size.
constexpr int64_t kCudaBytes = int64_t(1) << 24;
constexpr int64_t kCudaSmallRank = 32, kCudaSmallBytes = int64_t(1) << 20;
// Two sides with float32 bases of larger ranks than this, of single matrices of more bytes than this, go to the library,
// which reads them once for both: at 32 CUDA C++ took 1.05 (an H100) and 1.09 to 1.34 (an H200) of its time.
constexpr int64_t kCudaBothFloat32Rank = 16, kCudaBothFloat32Bytes = int64_t(1) << 25;
// Lists of at least so many matrices, of any size, one launch for all of a length: two sides up to the rank of one.
constexpr int64_t kCudaList = 8;
// Block, r + s, of matrices of kCudaBytes and more: 0.84 to 0.93 of the library's time at 32, with float32 bases as well. At
// 64 0.84 to 0.95 on an H100, but 0.97 to 1.17 on an H200; 1.3 to 1.6 at 128.
constexpr int64_t kCudaRanksBlock = 32;

// Triton's grouped kernels are chosen for lists of small matrices, where library products take as long to launch as to
// run: T5-Large's, of up to 8 MB, in 0.6 and 0.3 of its time, while LLaMA-2 7B's take 1.3 to 3 times as long. At least this
// many matrices, whose panels of 32 fill the GPU, each of at most this part of L2 (10 MB of an H200's 60). Where CUDA C++ can
// run it takes them, in 0.6 to 0.97 of Triton's time (both GPUs), but for blocks, which it has no lists of.
constexpr int64_t kLeastGroup = 8;
constexpr int64_t kPanel = 32;
constexpr int64_t kL2Part = 6;
// Up to these ranks (r + s) the grouped kernels do not spill registers, and bytes are their limit.
constexpr int64_t kMaxRank = 128;
constexpr int64_t kMaxRankFloat32 = 64;
// A float16 matrix has its second product in float32 altogether: coefficients would overflow.
constexpr int64_t kMaxRankFloat16 = 32;
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

// Whether one side's kernel is faster than the library at this rank, length and extent; 0: there is no such side.
inline bool side_pays(int64_t length, int64_t extent, int64_t r, BasisForm form, int64_t multiprocessors) {
  return r == 0 || (r <= kCudaRank && side_panels(length, extent, r, form, multiprocessors).fits);
}

// Whether CUDA C++ is faster than library products.
inline bool cuda_pays(const Work& work, const Gpu& gpu) {
  if (gpu.hip || gpu.capability != kCudaCapability || work.type != Type::kBFloat16) return false;
  const bool wide = work.basis == Type::kFloat32, list = work.batch >= kCudaList;
  const int64_t bytes = work.m * work.n * size_of(work.type), rank = std::max(work.r, work.s);
  if (work.block) return bytes >= kCudaBytes && work.r + work.s <= kCudaRanksBlock;
  if (work.n % 8) return false;
  if (!list && bytes < (rank > kCudaSmallRank ? kCudaBytes : wide ? 0 : kCudaSmallBytes)) return false;
  if (!list && wide && work.r && work.s && rank > kCudaBothFloat32Rank && bytes > kCudaBothFloat32Bytes) return false;
  const BasisForm form = wide ? BasisForm::kFloat32 : BasisForm::kBFloat16;
  return side_pays(work.m, work.n, work.r, form, gpu.multiprocessors) &&
         side_pays(work.n, work.m, work.s, form, gpu.multiprocessors);
}

// Whether it is a list of small matrices for Triton's grouped kernels.
inline bool triton_pays(const Work& work, const Gpu& gpu) {
  if (!gpu.hip && gpu.capability < kLeastCapability) return false;
  const int64_t across = std::min(work.r ? work.n : work.m, work.s ? work.m : work.n);
  return work.batch >= kLeastGroup && work.m * work.n * size_of(work.type) <= gpu.l2_bytes / kL2Part &&
         (across + kPanel - 1) / kPanel * work.batch >= gpu.multiprocessors &&
         work.r + work.s <= max_triton_rank(work.type, work.basis, gpu.hip);
}

inline Variant choose(const Work& work, const Gpu& gpu, const Compiled& compiled) {
  if (work.type == Type::kFloat64 || work.r + work.s == 0) return Variant::kCublas;
  const bool triton = compiled.triton && triton_pays(work, gpu), cuda = compiled.cuda && cuda_pays(work, gpu);
  if (cuda && !(triton && work.block)) return Variant::kCuda;
  return triton ? Variant::kTriton : Variant::kCublas;
}

// A matrix of this many bytes is in L2 when the second side reads it: apart, its sides cost no more memory traffic than
// at once, and above this r + s they were faster (6 % at 256 on an H200, 4096 x 4096).
constexpr int64_t kStackedInL2 = int64_t(1) << 25;
constexpr int64_t kStackedInL2Ranks = 128;

// Whether two sides go faster in library products as G - [L, G R - L core] [L^T G; R^T], one read for each thin product and
// one read and write, than one side after the other. That saves a read and a write and costs 4 min(m, n) r s operations.
// Time of a product: the larger of its operations and its bytes, in bytes moved; intermediates are left out.
inline bool stacked(int64_t m, int64_t n, int64_t r, int64_t s, Type type) {
  const double ops = is_half(type) ? kOpsPerByteHalf : kOpsPerByteFloat32;
  const double matrix = double(m) * double(n), bytes = matrix * double(size_of(type));
  if (bytes <= double(kStackedInL2) && r + s > kStackedInL2Ranks) return false;
  const auto time = [&](double rank, double passes) { return std::max(2 * matrix * rank / ops, passes * bytes); };
  const double thin = time(double(r), 1) + time(double(s), 1);
  const double apart = thin + time(double(r), 2) + time(double(s), 2);
  const double extra = 4 * double(std::min(m, n)) * double(r) * double(s) / ops;
  return thin + extra + time(double(r + s), 2) < apart;
}

// The same where library products are launched: below so many bytes launches are the limit, and apart there are fewer. At
// 64, 1024 x 8192 took 45 us at once and 39 apart on an H100, 1024 x 1024 25 and 15.
constexpr int64_t kStackedLeast = int64_t(1) << 25;

inline bool stacked_on_gpu(int64_t m, int64_t n, int64_t r, int64_t s, Type type) {
  return m * n * size_of(type) >= kStackedLeast && stacked(m, n, r, s, type);
}

// Whether L^T G, with the right side applied to it, takes fewer operations than G R with the left side applied, or a few
// more: the library's products of the first kind are faster (5 % of the whole on an H200, 4096 x 11008).
inline bool left_first(int64_t m, int64_t n, int64_t r, int64_t s) {
  return double(n * r) * double(m + s) <= 1.1 * double(m * s) * double(n + r);
}

}  // namespace sculpt

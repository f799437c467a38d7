// The boundary between the ops and the panel kernels: plain structs and a table of functions per instruction set.
// No torch header may be included by the files behind this boundary: an inline function of torch compiled there for
// AVX-512 could be the copy that the linker keeps for the whole library.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sculpt::cpu {

enum class Type : int { f32, f64, bf16, f16 };
enum class Side : int { left, right };

// whole: coefficients and update in one go. gather: coefficients only, written to `coefficients`.
// apply: update from `coefficients`. Only the left side has the two halves (the block form needs them).
enum class Phase : int { whole, gather, apply };

struct View {
  const void* data = nullptr;  // nullptr: absent
  int64_t rows = 0, cols = 0, row_stride = 0, col_stride = 0;
  Type type = Type::f32;
};

// One side of one m x n matrix with unit column stride, strides in elements.
// left, remove:  out = in - L (L^T in - image);  left, keep:  out = reference + L (L^T (in - reference))
// right, remove: out = in - (in R - image) R^T;  right, keep: out = reference + ((in - reference) R - image) R^T
// With a metric M the coefficients are M L^T in, or in R M.
struct OneSided {
  Side side = Side::left;
  Phase phase = Phase::whole;
  bool keep = false;
  Type type = Type::f32;
  int64_t m = 0, n = 0;
  const void* in = nullptr;
  void* out = nullptr;
  const void* reference = nullptr;
  int64_t in_stride = 0, out_stride = 0, reference_stride = 0;
  View basis;                     // m x r (left) or n x r (right)
  View image;                     // r x n (left) or m x r (right)
  View metric;                    // r x r, f64 if type is f64 and f32 otherwise; not with an image
  void* coefficients = nullptr;   // r x n, contiguous, f64 if type is f64 and f32 otherwise
};

// out = a b, accumulated in f64 if `wide` and in f32 otherwise, and stored so. The operand with fewer elements is packed
// once and shared by all panels of the other: columns of b (`share_a`, where b needs unit column stride) or rows of a.
struct Matmul {
  View a, b;  // M x K, K x N
  View out;   // any strides, f64 if wide and f32 otherwise
  bool wide = false;
  bool share_a = false;
  bool symmetric = false;  // M == N: only one triangle is written, the lower one with share_a, else the upper one
};

struct Plan {
  int64_t width = 0;       // columns (left, share_a) or rows of a panel
  int64_t panels = 0;
  int64_t pack_tasks = 0;  // independent pieces of the shared packing
  int64_t shared_bytes = 0;   // the packed basis, read by every thread
  int64_t scratch_bytes = 0;  // one panel, one thread
};

struct Kernels {
  const char* name;
  Plan (*plan)(const OneSided&, int64_t threads);
  void (*pack)(const OneSided&, const Plan&, void* shared, int64_t task);
  void (*panel)(const OneSided&, const Plan&, const void* shared, void* scratch, int64_t index);
  Plan (*plan_matmul)(const Matmul&, int64_t threads);
  void (*pack_matmul)(const Matmul&, const Plan&, void* shared, int64_t task);
  void (*panel_matmul)(const Matmul&, const Plan&, const void* shared, void* scratch, int64_t index);
};

extern const Kernels kGeneric;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512, kAvx512Bf16;
#endif

// The best table for this machine, or the one that SCULPT_CPU names (generic, avx2, avx512, avx512bf16).
const Kernels& kernels();

}  // namespace sculpt::cpu

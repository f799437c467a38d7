// One-sided projection of a matrix, panel by panel, for one instruction set.
//
// A panel of columns (left) or rows (right) is packed once, both thin products run from that copy while it is in the
// core's own cache, and the result is written: one read and one write of the matrix from memory, where two library
// products read it twice and write it once. 4 m n r operations either way. Bytes: 2 m n for the matrix, plus
// (m + n) r of packed basis a panel from the shared cache.
//
// All four thin products run through one register tile: kRows x (kVecs vectors), A broadcast element by element from
// rows that are contiguous along k, B packed in blocks of kVecs vectors.
//
// Not for: machines with AMX tiles, where the library's bf16 product is several times faster at large r.
//
// Included by panel_*.cpp, which define SCULPT_ISA, SCULPT_VECTOR_BYTES, SCULPT_ROWS and optionally SCULPT_F16C,
// SCULPT_BF16_DOT, after their `#pragma GCC target`.
#define SCULPT_INLINE inline __attribute__((always_inline))

namespace sculpt::cpu::SCULPT_ISA {

#include "cpu/vector.h"

// 8 x 3 accumulators of 32 AVX-512 registers, 4 x 3 of 16 elsewhere: both keep two multipliers busy through a
// latency of 4, and ranks of 16, 64, 256, 1024 fill the rows without padding.
constexpr int64_t kRows = SCULPT_ROWS;
constexpr int kVecs = 3;
template <class Dot>
constexpr int64_t kCols = kVecs * kLanes<typename Dot::Acc>;
// Steps of k between visits to the accumulators in memory: 48 KB of B at most, and A stays in the first-level cache.
constexpr int64_t kBlockK = 256;
// A packed panel should leave room in a 1 MB second-level cache for the basis that streams past it.
constexpr int64_t kPanelBytes = 768 << 10;

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
template <class Dot>
inline int64_t steps(int64_t k) {
  return (k + Dot::kPair - 1) / Dot::kPair;
}
// Row pitch of an A operand: an odd number of cache lines, or rows of a power-of-two matrix would share cache sets.
template <class A>
inline int64_t pitch(int64_t k) {
  int64_t lines = (k * int64_t(sizeof(A)) + 63) / 64;
  return (lines | 1) * 64 / int64_t(sizeof(A));
}

template <class Dot, int NV>
SCULPT_INLINE void tile(int64_t count, const typename Dot::A* a, int64_t lda, const typename Dot::B* b,
                        Vec<typename Dot::Acc> (&acc)[kRows][NV]) {
  using B = typename Dot::B;
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < NV; ++v) acc[i][v] = Vec<typename Dot::Acc>{};
  for (int64_t p = 0; p < count; ++p) {
    Vec<B> row[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) row[v] = load<Vec<B>>(b + v * kLanes<B>);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) Dot::step(acc[i][v], a + i * lda, row[v]);
    }
    a += Dot::kPair;
    b += NV * kLanes<B>;
  }
}

// Tiles of A[M x K] B[K x N] over the steps [p0, p1) of k, each handed to the epilogue. `chunk` rows of A are used
// against all of B before the next. Rows before i0 and columns before j0 (a whole tile's) are left out.
template <class Dot, class Epilogue>
void product(const typename Dot::A* a, int64_t lda, int64_t M, const typename Dot::B* b, int64_t N, int64_t count,
             int64_t p0, int64_t p1, int64_t chunk, const Epilogue& epilogue, int64_t i0 = 0, int64_t j0 = 0) {
  using Acc = typename Dot::Acc;
  constexpr int64_t L = kLanes<Acc>;
  for (int64_t c0 = i0; c0 < M; c0 += chunk) {
    int64_t c1 = min64(M, c0 + chunk);
    for (int64_t j = j0; j < N; j += kCols<Dot>) {
      int64_t cols = min64(N - j, kCols<Dot>);
      int64_t vectors = (cols + L - 1) / L;
      const typename Dot::B* block = b + j * count + p0 * vectors * L;
      for (int64_t i = c0; i < c1; i += kRows) {
        int64_t rows = min64(c1 - i, kRows);
        const typename Dot::A* first = a + i * lda + p0 * Dot::kPair;
        if (vectors == 3) {
          Vec<Acc> acc[kRows][3];
          tile<Dot, 3>(p1 - p0, first, lda, block, acc);
          epilogue(i, j, rows, cols, acc);
        } else if (vectors == 2) {
          Vec<Acc> acc[kRows][2];
          tile<Dot, 2>(p1 - p0, first, lda, block, acc);
          epilogue(i, j, rows, cols, acc);
        } else {
          Vec<Acc> acc[kRows][1];
          tile<Dot, 1>(p1 - p0, first, lda, block, acc);
          epilogue(i, j, rows, cols, acc);
        }
      }
    }
  }
}

// Adds a tile to an fp32/fp64 buffer. Left: blocks of kCols columns, `rows` rows each, which is the layout of a B
// operand. Right: plain rows of length `ld`, which is the layout of an A operand.
template <class Dot>
struct Accumulate {
  using Acc = typename Dot::Acc;
  Acc* to;
  int64_t block_rows, ld;  // ld 0: blocked
  bool first;

  template <int NV>
  SCULPT_INLINE void operator()(int64_t i, int64_t j, int64_t rows, int64_t, Vec<Acc> (&acc)[kRows][NV]) const {
    constexpr int64_t L = kLanes<Acc>;
    int64_t row = ld ? ld : NV * L;
    Acc* p = ld ? to + i * ld + j : to + j * block_rows + i * row;
    for (int64_t q = 0; q < rows; ++q, p += row)
      for (int v = 0; v < NV; ++v) store(p + v * L, first ? acc[q][v] : load<Vec<Acc>>(p + v * L) + acc[q][v]);
  }
};

// Writes `in - tile`, or `tile` (+ reference) where the basis spans the space to keep, rounding once.
template <class T, class Acc>
struct Update {
  const T* in;
  T* out;
  const T* reference;
  int64_t in_stride, out_stride, reference_stride;
  bool keep;

  SCULPT_INLINE Vec<Acc> result(const T* p, const T* ref, Vec<Acc> acc) const {
    if (!keep) return load_as<Acc>(p) - acc;
    return ref ? load_as<Acc>(ref) + acc : acc;
  }
  template <int NV>
  SCULPT_INLINE void operator()(int64_t i, int64_t j, int64_t rows, int64_t cols, Vec<Acc> (&acc)[kRows][NV]) const {
    constexpr int64_t L = kLanes<Acc>;
    const T* p = in + i * in_stride + j;
    const T* ref = reference ? reference + i * reference_stride + j : nullptr;
    T* to = out + i * out_stride + j;
    if (cols == NV * L && !ref) {
#pragma GCC unroll 8
      for (int64_t q = 0; q < kRows; ++q) {
        if (q >= rows) break;
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v)
          store_as<Acc>(to + q * out_stride + v * L,
                        keep ? acc[q][v] : load_as<Acc>(p + q * in_stride + v * L) - acc[q][v]);
      }
      return;
    }
    for (int64_t q = 0; q < rows; ++q, p += in_stride, to += out_stride, ref += ref ? reference_stride : 0) {
      for (int v = 0; v < NV; ++v) {
        int64_t valid = min64(cols - v * L, L);
        T source[L] = {}, base[L] = {}, rounded[L];
        __builtin_memcpy(source, p + v * L, valid * sizeof(T));
        if (ref) __builtin_memcpy(base, ref + v * L, valid * sizeof(T));
        store_as<Acc>(rounded, result(source, ref ? base : nullptr, acc[q][v]));
        __builtin_memcpy(to + v * L, rounded, valid * sizeof(T));
      }
    }
  }
};

#include "cpu/pack.h"
#include "cpu/sides.h"
#include "cpu/matmul.h"

}  // namespace sculpt::cpu::SCULPT_ISA

// Packing into the operands of the register tile. Included by panel.h.

// One stage of an L x L transpose in registers: exchanges the halves of size S between two rows.
template <int S, int high, class V, int... lane>
SCULPT_INLINE V exchange(V a, V b, Lanes<lane...>) {
  constexpr int L = sizeof...(lane);
#if defined(__clang__)
  return __builtin_shufflevector(a, b, ((lane & S) ? (high ? lane + L : lane + L - S) : (high ? lane + S : lane))...);
#else
  using Index = typename VecOf<Signed<sizeof(a[0])>>::type;
  return __builtin_shuffle(a, b, Index{((lane & S) ? (high ? lane + L : lane + L - S) : (high ? lane + S : lane))...});
#endif
}
template <int S, class V, int L>
SCULPT_INLINE void transpose_from(V (&v)[L]) {
  if constexpr (S < L) {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      if (i & S) continue;
      V a = v[i], b = v[i + S];
      v[i] = exchange<S, 0>(a, b, typename FirstLanes<L>::type{});
      v[i + S] = exchange<S, 1>(a, b, typename FirstLanes<L>::type{});
    }
    transpose_from<2 * S>(v);
  }
}

// A full vector of the B operand: elements of one row of a source, or of two rows as pairs.
template <class Dot, class S>
SCULPT_INLINE Vec<typename Dot::B> pair_vector(const S* from, int64_t next_row) {
  if constexpr (Dot::kPair == 1) {
    return load_as<typename Dot::Acc>(from);
  } else {
    return widen(from) | (widen(from + next_row) << 16);
  }
}

// A operand: `rows` rows of `cols` elements, contiguous along k at pitch lda, zero up to whole pairs.
template <class Dot, class S>
void pack_a(const S* src, int64_t row_stride, int64_t col_stride, int64_t rows, int64_t cols, typename Dot::A* dst,
            int64_t lda) {
  using A = typename Dot::A;
  const int64_t padded = steps<Dot>(cols) * Dot::kPair;
  if (col_stride == 1) {
    constexpr int64_t L = kLanes<typename Dot::Acc>;
    for (int64_t i = 0; i < rows; ++i) {
      const S* from = src + i * row_stride;
      A* to = dst + i * lda;
      int64_t k = 0;
      if constexpr (__is_same(A, typename Dot::Acc)) {
        for (; k + L <= cols; k += L) store(to + k, load_as<A>(from + k));
      }
      for (; k < cols; ++k) to[k] = element<A>(from[k]);
      for (; k < padded; ++k) to[k] = A{};
    }
    return;
  }
  // A transposed source: square blocks through registers, the rest pair by pair along k.
  constexpr int L = kLanes<typename Dot::Acc>;
  for (int64_t i0 = 0; i0 < rows; i0 += L) {
    const int64_t count = min64(rows - i0, L);
    int64_t k = 0;
    if (row_stride == 1 && count == L) {
      for (; k + L * Dot::kPair <= cols; k += L * Dot::kPair) {
        Vec<typename Dot::B> v[L];
        for (int q = 0; q < L; ++q) v[q] = pair_vector<Dot>(src + (k + q * Dot::kPair) * col_stride + i0, col_stride);
        transpose_from<1>(v);
        for (int q = 0; q < L; ++q) store(dst + (i0 + q) * lda + k, v[q]);
      }
    }
    for (; k + Dot::kPair <= cols; k += Dot::kPair) {
      const S* from = src + k * col_stride + i0 * row_stride;
      A* to = dst + i0 * lda + k;
      for (int64_t i = 0; i < count; ++i) {
        A pair[Dot::kPair];
        for (int64_t h = 0; h < Dot::kPair; ++h) pair[h] = element<A>(from[i * row_stride + h * col_stride]);
        __builtin_memcpy(to + i * lda, pair, sizeof(pair));
      }
    }
    for (; k < padded; ++k)
      for (int64_t i = i0; i < i0 + count; ++i)
        dst[i * lda + k] = k < cols ? element<A>(src[i * row_stride + k * col_stride]) : A{};
  }
}

// One vector of matrix row `from`, `valid` elements of it, less the reference.
template <class Acc, class T>
SCULPT_INLINE Vec<Acc> matrix_vector(const T* from, const T* ref, int64_t valid) {
  constexpr int64_t L = kLanes<Acc>;
  if (valid == L) {
    Vec<Acc> v = load_as<Acc>(from);
    return ref ? v - load_as<Acc>(ref) : v;
  }
  T source[L] = {}, base[L] = {};
  __builtin_memcpy(source, from, valid * sizeof(T));
  if (ref) __builtin_memcpy(base, ref, valid * sizeof(T));
  return load_as<Acc>(source) - load_as<Acc>(base);
}

#if defined(SCULPT_BF16_DOT)
SCULPT_INLINE Vec<uint32_t> bf16_vector(const Bf16* from, int64_t valid) {
  constexpr int64_t L = kLanes<float>;
  if (valid == L) return widen(from);
  Bf16 source[L] = {};
  __builtin_memcpy(source, from, valid * sizeof(Bf16));
  return widen(source);
}
#endif

// B operand from a panel of the matrix: depth rows, cols columns, unit column stride. Row by row, so that memory is
// read in long runs.
template <class Dot, class T>
void pack_panel(const T* in, int64_t stride, const T* ref, int64_t ref_stride, int64_t depth, int64_t cols,
                typename Dot::B* dst) {
  using Acc = typename Dot::Acc;
  constexpr int64_t L = kLanes<Acc>;
  const int64_t count = steps<Dot>(depth);
  for (int64_t p = 0; p < count; ++p) {
    const T* row = in + p * Dot::kPair * stride;
    const T* base = ref ? ref + p * Dot::kPair * ref_stride : nullptr;
    for (int64_t j = 0; j < cols; j += kCols<Dot>) {
      int64_t block = min64(cols - j, kCols<Dot>), vectors = (block + L - 1) / L;
      typename Dot::B* to = dst + j * count + p * vectors * L;
      for (int64_t v = 0; v < vectors; ++v) {
        int64_t at = j + v * L, valid = min64(cols - at, L);
        if constexpr (Dot::kPair == 1) {
          store(to + v * L, matrix_vector<Acc>(row + at, base ? base + at : nullptr, valid));
        } else {
          // Three pairs of rows ahead: at eight pairs a matrix that lies in the shared cache took 10 % longer, without
          // it one that does not took 15 % longer. One of two vectors starts a cache line.
          if (v % 2 == 0) {
            __builtin_prefetch(row + 6 * stride + at);
            __builtin_prefetch(row + 7 * stride + at);
          }
          Vec<uint32_t> low = bf16_vector(row + at, valid);
          bool odd = p * 2 + 1 >= depth;
          store(to + v * L, odd ? low : low | (bf16_vector(row + stride + at, valid) << 16));
        }
      }
    }
  }
}

// B operand, one block of `cols` columns: step p at dst + p * width. Any strides; for the basis.
template <class Dot, class S>
void pack_b(const S* src, int64_t k_stride, int64_t j_stride, int64_t depth, int64_t cols, typename Dot::B* dst) {
  using A = typename Dot::A;
  if (j_stride == 1) return pack_panel<Dot, S>(src, k_stride, nullptr, 0, depth, cols, dst);
  const int64_t width = round_up(cols, kLanes<typename Dot::Acc>), count = steps<Dot>(depth);
  // 64 steps at a time: the block written stays in the first-level cache while its columns are filled.
  constexpr int L = kLanes<typename Dot::Acc>;
  for (int64_t p0 = 0; p0 < count; p0 += 64) {
    const int64_t p1 = min64(count, p0 + 64);
    int64_t squares = 0;
    if (k_stride == 1 && p0 + 64 <= depth / Dot::kPair) {
      for (; squares + L <= cols; squares += L) {
        for (int64_t p = p0; p < p1; p += L) {
          Vec<typename Dot::B> v[L];
          for (int q = 0; q < L; ++q) {
            const S* from = src + (squares + q) * j_stride + p * Dot::kPair;
            if constexpr (Dot::kPair == 1) {
              v[q] = load_as<typename Dot::Acc>(from);
            } else {
              v[q] = load<Vec<uint32_t>>(from);
            }
          }
          transpose_from<1>(v);
          for (int q = 0; q < L; ++q) store(dst + (p + q) * width + squares, v[q]);
        }
      }
    }
    for (int64_t j = squares; j < width; ++j) {
      const S* from = src + j * j_stride;
      const int64_t whole = j < cols ? min64(p1, depth / Dot::kPair) : p0;
      int64_t p = p0;
      for (; p < whole; ++p) {
        A pair[Dot::kPair];
        for (int64_t h = 0; h < Dot::kPair; ++h) pair[h] = element<A>(from[(p * Dot::kPair + h) * k_stride]);
        __builtin_memcpy(dst + p * width + j, pair, sizeof(pair));
      }
      for (; p < p1; ++p) {
        A pair[Dot::kPair] = {};
        if (j < cols && p * Dot::kPair < depth) pair[0] = element<A>(from[p * Dot::kPair * k_stride]);
        __builtin_memcpy(dst + p * width + j, pair, sizeof(pair));
      }
    }
  }
}

// Rows of an accumulator, rounded to the elements of the next product's A operand.
template <class A, class Acc>
void round_rows(const Acc* src, int64_t rows, int64_t cols, int64_t ld, A* dst, int64_t lda) {
  constexpr int64_t L = kLanes<Acc>;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < cols; k += L) store_as<Acc>(dst + i * lda + k, load<Vec<Acc>>(src + i * ld + k));
}

// A scalar of a view of any type, for the small thin tensors only.
SCULPT_INLINE double at(const View& view, int64_t i, int64_t j) {
  int64_t k = i * view.row_stride + j * view.col_stride;
  switch (view.type) {
    case Type::f64: return static_cast<const double*>(view.data)[k];
    case Type::f32: return static_cast<const float*>(view.data)[k];
    case Type::bf16: return from_bf16(static_cast<const Bf16*>(view.data)[k]);
    default: return from_f16(static_cast<const F16*>(view.data)[k]);
  }
}

// Packing into the operands of the register tile. Included by panel.h.

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
  // A transposed source, 16 rows at a time, so that each line of it is read once; pairs along k are stored together.
  for (int64_t i0 = 0; i0 < rows; i0 += 16) {
    const int64_t count = min64(rows - i0, 16);
    int64_t k = 0;
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
  if (valid == L) return __builtin_convertvector(load<HalfVec>(from), Vec<uint32_t>);
  Bf16 source[L] = {};
  __builtin_memcpy(source, from, valid * sizeof(Bf16));
  return __builtin_convertvector(load<HalfVec>(source), Vec<uint32_t>);
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
          __builtin_prefetch(row + 16 * stride + at);
          __builtin_prefetch(row + 17 * stride + at);
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
  // 64 steps at a time: the block written stays in the first-level cache while its columns are filled one by one.
  for (int64_t p0 = 0; p0 < count; p0 += 64) {
    const int64_t p1 = min64(count, p0 + 64);
    for (int64_t j = 0; j < width; ++j) {
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

// Rows of an accumulator become the elements of the next product's operand (a no-op type by type for fp32/fp64).
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

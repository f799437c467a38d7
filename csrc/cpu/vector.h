// Vectors of SCULPT_VECTOR_BYTES, conversions to and from the 16-bit types, and the two ways to multiply.
// Included by panel.h only, inside the instruction set's own namespace. GCC and clang vector extensions, so that
// one source serves SSE2, AVX2, AVX-512 and NEON.

constexpr int kBytes = SCULPT_VECTOR_BYTES;

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int64_t kLanes = kBytes / sizeof(T);

// Compile-time lists of lanes for shuffles, and the integer of a lane's size.
template <int... lane>
struct Lanes {};
template <int n, int... lane>
struct FirstLanes : FirstLanes<n - 1, n - 1, lane...> {};
template <int... lane>
struct FirstLanes<0, lane...> {
  using type = Lanes<lane...>;
};
template <int bytes>
struct SignedOf {
  using type = int64_t;
};
template <>
struct SignedOf<4> {
  using type = int32_t;
};
template <int bytes>
using Signed = typename SignedOf<bytes>::type;

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
typedef uint16_t HalfVec __attribute__((vector_size(kBytes / 2)));
typedef float HalfFloats __attribute__((vector_size(kBytes / 2)));

template <class V, class T>
SCULPT_INLINE V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T>
SCULPT_INLINE void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// Half a vector of 16-bit elements, zero-extended. Spelt as intrinsics: GCC 12 makes two halves and an insert of
// __builtin_convertvector, 10 % of the time at rank 16.
SCULPT_INLINE Vec<uint32_t> widen(const Bf16* p) {
#if defined(SCULPT_F16C) && SCULPT_VECTOR_BYTES == 64
  return (Vec<uint32_t>)_mm512_cvtepu16_epi32(load<__m256i>(p));
#elif defined(SCULPT_F16C)
  return (Vec<uint32_t>)_mm256_cvtepu16_epi32(load<__m128i>(p));
#else
  return __builtin_convertvector(load<HalfVec>(p), Vec<uint32_t>);
#endif
}

SCULPT_INLINE float from_bf16(Bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

// Round to nearest even in integers, for processors without vcvtneps2bf16.
SCULPT_INLINE Vec<uint32_t> bf16_bits(Vec<float> f) {
  Vec<uint32_t> u = (Vec<uint32_t>)f;
  Vec<uint32_t> rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  Vec<uint32_t> quiet = (u >> 16) | 0x40u;
  return f != f ? quiet : rounded;
}
SCULPT_INLINE Bf16 to_bf16(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  uint32_t r = f != f ? (u >> 16) | 0x40u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return Bf16{uint16_t(r)};
}

#if defined(SCULPT_F16C)
SCULPT_INLINE float from_f16(F16 x) { return _cvtsh_ss(x.bits); }
SCULPT_INLINE F16 to_f16(float f) { return F16{uint16_t(_cvtss_sh(f, 0))}; }
#else
SCULPT_INLINE float from_f16(F16 x) { return c10::detail::fp16_ieee_to_fp32_value(x.bits); }
SCULPT_INLINE F16 to_f16(float f) { return F16{c10::detail::fp16_ieee_from_fp32_value(f)}; }
#endif

SCULPT_INLINE float value(float x) { return x; }
SCULPT_INLINE double value(double x) { return x; }
SCULPT_INLINE float value(Bf16 x) { return from_bf16(x); }
SCULPT_INLINE float value(F16 x) { return from_f16(x); }

// A vector of Acc read from, or rounded to, the storage type.
template <class Acc, class T>
SCULPT_INLINE Vec<Acc> load_as(const T* p) {
  if constexpr (sizeof(T) == sizeof(Acc)) {
    return load<Vec<Acc>>(p);
  } else if constexpr (__is_same(Acc, double) && __is_same(T, float)) {
    return __builtin_convertvector(load<HalfFloats>(p), Vec<double>);
  } else if constexpr (__is_same(Acc, double)) {
    Vec<double> v;
    for (int i = 0; i < kLanes<double>; ++i) v[i] = value(p[i]);
    return v;
  } else if constexpr (__is_same(T, Bf16)) {
    return (Vec<float>)(widen(p) << 16);
  } else {
#if defined(SCULPT_F16C) && SCULPT_VECTOR_BYTES == 64
    return (Vec<float>)_mm512_cvtph_ps(load<__m256i>(p));
#elif defined(SCULPT_F16C)
    return (Vec<float>)_mm256_cvtph_ps(load<__m128i>(p));
#else
    Vec<float> v;
    for (int i = 0; i < kLanes<float>; ++i) v[i] = from_f16(p[i]);
    return v;
#endif
  }
}
template <class Acc, class T>
SCULPT_INLINE void store_as(T* p, Vec<Acc> v) {
  if constexpr (sizeof(T) == sizeof(Acc)) {
    store(p, v);
  } else if constexpr (__is_same(T, Bf16)) {
#if defined(SCULPT_BF16_DOT)
    // Flushes denormals (below 1.2e-38) to zero, as the dot product itself does.
    store(p, _mm512_cvtneps_pbh((__m512)v));
#else
    store(p, __builtin_convertvector(bf16_bits(v), HalfVec));
#endif
  } else {
#if defined(SCULPT_F16C) && SCULPT_VECTOR_BYTES == 64
    store(p, _mm512_cvtps_ph((__m512)v, 0));
#elif defined(SCULPT_F16C)
    store(p, _mm256_cvtps_ph((__m256)v, 0));
#else
    for (int i = 0; i < kLanes<float>; ++i) p[i] = to_f16(v[i]);
#endif
  }
}

// acc += a * b, one product a lane.
template <class T>
struct Fma {
  using Acc = T;
  using A = T;
  using B = T;
  static constexpr int64_t kPair = 1;
  static SCULPT_INLINE void step(Vec<T>& acc, const T* a, Vec<T> b) { acc += *a * b; }
};

#if defined(SCULPT_BF16_DOT)
// acc += a0 * b0 + a1 * b1, two bf16 products a lane accumulated in fp32: vdpbf16ps. A is read as pairs along k.
struct DotBf16 {
  using Acc = float;
  using A = Bf16;
  using B = uint32_t;
  static constexpr int64_t kPair = 2;
  static SCULPT_INLINE void step(Vec<float>& acc, const Bf16* a, Vec<uint32_t> b) {
    uint32_t pair;
    __builtin_memcpy(&pair, a, 4);
    acc = (Vec<float>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(int(pair)), (__m512bh)b);
  }
};
#endif

// Conversion of one stored element to the A operand's element.
template <class A, class S>
SCULPT_INLINE A element(S x) {
  if constexpr (__is_same(A, Bf16) && __is_same(S, Bf16)) {
    return x;
  } else if constexpr (__is_same(A, Bf16)) {
    return to_bf16(float(value(x)));
  } else {
    return A(value(x));
  }
}

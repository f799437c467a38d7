// The two sides, and the table of functions that the ops call. Included by panel.h.

// Buffers follow one another on cache-line boundaries.
template <class T>
int64_t span(int64_t count) {
  return round_up(count * int64_t(sizeof(T)), 64);
}
template <class T>
T* take(char*& p, int64_t count) {
  T* result = reinterpret_cast<T*>(p);
  p += span<T>(count);
  return result;
}

// Sizes of everything one call packs, for one kind of product. `left`: A1 = L^T (r x m), A2 = L (m x r).
// `right`: B1 = R (n x r), B2 = R^T (r x n).
template <class Dot>
struct Sizes {
  using A = typename Dot::A;
  using Acc = typename Dot::Acc;
  int64_t m, n, r;
  int64_t lda1, lda2, cols_b1, cols_b2;

  explicit Sizes(const OneSided& s) : m(s.m), n(s.n), r(s.basis.cols) {
    lda1 = pitch<A>(steps<Dot>(s.side == Side::left ? m : n) * Dot::kPair);
    lda2 = pitch<A>(round_up(r, kCols<Dot>));
    cols_b1 = round_up(r, kLanes<Acc>);
    cols_b2 = round_up(n, kLanes<Acc>);
  }
  int64_t rows(int64_t count) const { return round_up(count, kRows); }
  // A packed metric: r x r, of the left side an A operand, of the right side a B operand. It comes last in the shared
  // memory, as the coefficients that it makes come last in the scratch memory.
  int64_t metric_bytes(Side side) const { return span<Acc>(side == Side::left ? rows(r) * lda2 : r * cols_b1); }
};

template <class Dot>
void measure(const OneSided& s, int64_t threads, Plan& plan) {
  using A = typename Dot::A;
  using B = typename Dot::B;
  using Acc = typename Dot::Acc;
  const bool left = s.side == Side::left;
  const int64_t depth = left ? s.m : s.n, extent = left ? s.n : s.m;
  const int64_t unit = left ? kCols<Dot> : kRows;
  // Wide enough that the packed basis, read once a panel, is paid for by 4 blocks of columns or 64 rows of work; half
  // of that at small rank, where the basis is small and the panel should rather fit the second-level cache.
  const int64_t least = (left ? 4 * kCols<Dot> : 64) / (s.basis.cols <= 64 ? 2 : 1);
  int64_t width = kPanelBytes / max64(1, depth * int64_t(sizeof(B)) / Dot::kPair);
  width = max64(width / unit * unit, least);
  // The panel count near extent / width whose busiest thread has the least to do (threads take equal runs of panels):
  // with blocks of 48 as the grain, 1024 columns went 576 to 448 to two threads, and 12 % of the time with them. Wider
  // panels are tried too, up to 1 MB; not at the smallest ranks, where leaving the second-level cache costs 10 %.
  const int64_t grain = left ? kLanes<Acc> : kRows, wanted = max64(1, (extent + width - 1) / width);
  const int64_t fewest = s.basis.cols > 32 ? max64(1, wanted * 2 / 3) : wanted;
  int64_t busiest = 0;
  for (int64_t count = fewest; count < wanted + 2 * threads; ++count) {
    const int64_t candidate = round_up(max64(1, (extent + count - 1) / count), grain);
    if (candidate < unit && count > 1 && extent >= unit) break;
    const int64_t bytes = candidate * depth * int64_t(sizeof(B)) / Dot::kPair;
    if (candidate > round_up(width, grain) && bytes > 4 * kPanelBytes / 3) continue;
    const int64_t panels = (extent + candidate - 1) / candidate;
    const int64_t load = min64(extent, (panels + threads - 1) / threads * candidate);
    if (!busiest || load <= busiest) {
      busiest = load;
      plan.width = candidate;
      plan.panels = panels;
    }
  }

  Sizes<Dot> z(s);
  if (left) {
    plan.pack_tasks = 2 * ((max64(z.m, z.r) + 255) / 256);
    plan.shared_bytes = span<A>(z.rows(z.r) * z.lda1) + span<A>(z.rows(z.m) * z.lda2);
    plan.scratch_bytes = span<B>(steps<Dot>(z.m) * plan.width) +
                         span<Acc>(steps<Dot>(z.r) * Dot::kPair * plan.width) + span<B>(steps<Dot>(z.r) * plan.width);
  } else {
    plan.pack_tasks = (z.r + kCols<Dot> - 1) / kCols<Dot> + (z.n + kCols<Dot> - 1) / kCols<Dot>;
    plan.shared_bytes = span<B>(steps<Dot>(z.n) * z.cols_b1) + span<B>(steps<Dot>(z.r) * z.cols_b2);
    plan.scratch_bytes = span<A>(z.rows(plan.width) * z.lda1) + span<Acc>(z.rows(plan.width) * z.lda2) +
                         span<A>(z.rows(plan.width) * z.lda2);
  }
  if (!s.metric.data) return;
  plan.pack_tasks += 1;
  plan.shared_bytes += z.metric_bytes(s.side);
  plan.scratch_bytes += left ? span<Acc>(z.r * plan.width) : span<Acc>(z.rows(plan.width) * z.lda2);
}

template <class Dot>
void pack_metric(const OneSided& s, const Sizes<Dot>& z, typename Dot::Acc* to) {
  using Acc = typename Dot::Acc;
  const Acc* x = static_cast<const Acc*>(s.metric.data);
  const int64_t rs = s.metric.row_stride, cs = s.metric.col_stride;
  if (s.side == Side::left) {
    pack_a<Dot>(x, rs, cs, z.r, z.r, to, z.lda2);
    __builtin_memset(to + z.r * z.lda2, 0, (z.rows(z.r) - z.r) * z.lda2 * sizeof(Acc));
    return;
  }
  for (int64_t j = 0; j < z.r; j += kCols<Dot>)
    pack_b<Dot>(x + j * cs, rs, cs, z.r, min64(z.r - j, kCols<Dot>), to + j * z.r);
}

template <class Dot, class S>
void pack_basis(const OneSided& s, const Plan& plan, char* shared, int64_t task) {
  using A = typename Dot::A;
  using B = typename Dot::B;
  Sizes<Dot> z(s);
  if constexpr (Dot::kPair == 1) {
    if (s.metric.data && task == plan.pack_tasks - 1) {
      char* last = shared + plan.shared_bytes - z.metric_bytes(s.side);
      return pack_metric<Dot>(s, z, reinterpret_cast<typename Dot::Acc*>(last));
    }
  }
  const S* x = static_cast<const S*>(s.basis.data);
  const int64_t rs = s.basis.row_stride, cs = s.basis.col_stride;
  if (s.side == Side::left) {
    A* a1 = take<A>(shared, z.rows(z.r) * z.lda1);
    A* a2 = take<A>(shared, z.rows(z.m) * z.lda2);
    const bool second = task % 2;
    const int64_t begin = task / 2 * 256, total = second ? z.m : z.r, end = min64(begin + 256, total);
    if (begin >= total) return;
    if (second && s.phase != Phase::gather)
      pack_a<Dot>(x + begin * rs, rs, cs, end - begin, z.r, a2 + begin * z.lda2, z.lda2);
    if (!second && s.phase != Phase::apply)
      pack_a<Dot>(x + begin * cs, cs, rs, end - begin, z.m, a1 + begin * z.lda1, z.lda1);
    if (end == total) {  // rows up to a whole tile: their results are dropped, but they must be readable numbers
      A* to = (second ? a2 : a1) + total * (second ? z.lda2 : z.lda1);
      __builtin_memset(to, 0, (z.rows(total) - total) * (second ? z.lda2 : z.lda1) * sizeof(A));
    }
    return;
  }
  B* b1 = take<B>(shared, steps<Dot>(z.n) * z.cols_b1);
  B* b2 = take<B>(shared, steps<Dot>(z.r) * z.cols_b2);
  const int64_t first = (z.r + kCols<Dot> - 1) / kCols<Dot>;
  if (task < first) {
    int64_t j = task * kCols<Dot>;
    pack_b<Dot>(x + j * cs, rs, cs, z.n, min64(z.r - j, kCols<Dot>), b1 + j * steps<Dot>(z.n));
  } else {
    int64_t j = (task - first) * kCols<Dot>;
    pack_b<Dot>(x + j * rs, cs, rs, z.r, min64(z.n - j, kCols<Dot>), b2 + j * steps<Dot>(z.r));
  }
}

template <class Dot, class T>
Update<T, typename Dot::Acc> update_at(const OneSided& s, int64_t i, int64_t j) {
  const T* ref = static_cast<const T*>(s.reference);
  return {static_cast<const T*>(s.in) + i * s.in_stride + j, static_cast<T*>(s.out) + i * s.out_stride + j,
          ref ? ref + i * s.reference_stride + j : nullptr, s.in_stride, s.out_stride, s.reference_stride, s.keep};
}

template <class Dot, class T>
void left_panel(const OneSided& s, const Plan& plan, char* shared, char* scratch, int64_t index) {
  using A = typename Dot::A;
  using B = typename Dot::B;
  using Acc = typename Dot::Acc;
  constexpr int64_t L = kLanes<Acc>;
  Sizes<Dot> z(s);
  const A* a1 = take<A>(shared, z.rows(z.r) * z.lda1);
  const A* a2 = take<A>(shared, z.rows(z.m) * z.lda2);
  [[maybe_unused]] const char* metric = shared;
  B* panel = take<B>(scratch, steps<Dot>(z.m) * plan.width);
  const int64_t deep = steps<Dot>(z.r) * Dot::kPair;
  Acc* coefficients = take<Acc>(scratch, deep * plan.width);
  B* packed = take<B>(scratch, steps<Dot>(z.r) * plan.width);
  const int64_t j0 = index * plan.width, cols = min64(plan.width, z.n - j0);
  const Update<T, Acc> update = update_at<Dot, T>(s, 0, j0);

  if (s.phase != Phase::apply) {
    pack_panel<Dot, T>(update.in, s.in_stride, update.reference, s.reference_stride, z.m, cols, panel);
    const int64_t count = steps<Dot>(z.m);
    if (count == 0) __builtin_memset(coefficients, 0, deep * plan.width * sizeof(Acc));
    for (int64_t p = 0; p < count; p += kBlockK)
      product<Dot>(a1, z.lda1, z.r, panel, cols, count, p, min64(count, p + kBlockK), 32 * kRows,
                   Accumulate<Dot>{coefficients, deep, 0, p == 0});
    if constexpr (Dot::kPair == 1) {
      if (s.metric.data) {
        Acc* found = coefficients;
        coefficients = take<Acc>(scratch, deep * plan.width);
        product<Dot>(reinterpret_cast<const A*>(metric), z.lda2, z.r, found, cols, z.r, 0, z.r, z.rows(z.r),
                     Accumulate<Dot>{coefficients, deep, 0, true});
      }
    }
  }
  // Row i of columns block j is at coefficients + j * deep + i * width of the block.
  for (int64_t j = 0; j < cols; j += kCols<Dot>) {
    const int64_t block = min64(cols - j, kCols<Dot>), width = round_up(block, L);
    Acc* c = coefficients + j * deep;
    Acc* stored = static_cast<Acc*>(s.coefficients) + j0 + j;
    for (int64_t i = 0; i < z.r; ++i) {
      if (s.phase == Phase::apply) {
        for (int64_t q = 0; q < width; ++q) c[i * width + q] = q < block ? stored[i * z.n + q] : Acc{};
      } else if (s.phase == Phase::gather) {
        for (int64_t q = 0; q < block; ++q) stored[i * z.n + q] = c[i * width + q];
      } else if (s.image.data) {
        for (int64_t q = 0; q < block; ++q) c[i * width + q] -= Acc(at(s.image, i, j0 + j + q));
      }
    }
    if constexpr (Dot::kPair == 2) {
      if (z.r % 2) __builtin_memset(c + z.r * width, 0, width * sizeof(Acc));
      for (int64_t p = 0; p < steps<Dot>(z.r); ++p)
        for (int64_t q = 0; q < width; q += L) {
          Vec<uint32_t> low = bf16_bits(load<Vec<Acc>>(c + 2 * p * width + q));
          Vec<uint32_t> high = bf16_bits(load<Vec<Acc>>(c + (2 * p + 1) * width + q));
          store(packed + j * steps<Dot>(z.r) + p * width + q, low | (high << 16));
        }
    }
  }
  if (s.phase == Phase::gather) return;
  const B* b = packed;
  if constexpr (Dot::kPair == 1) b = coefficients;
  // A chunk of the basis that stays in the second-level cache while every block of columns uses it.
  const int64_t chunk = max64(kRows, (192 << 10) / max64(1, z.lda2 * int64_t(sizeof(A))) / kRows * kRows);
  product<Dot>(a2, z.lda2, z.m, b, cols, steps<Dot>(z.r), 0, steps<Dot>(z.r), chunk, update);
}

template <class Dot, class T>
void right_panel(const OneSided& s, const Plan& plan, char* shared, char* scratch, int64_t index) {
  using A = typename Dot::A;
  using B = typename Dot::B;
  using Acc = typename Dot::Acc;
  Sizes<Dot> z(s);
  const B* b1 = take<B>(shared, steps<Dot>(z.n) * z.cols_b1);
  const B* b2 = take<B>(shared, steps<Dot>(z.r) * z.cols_b2);
  [[maybe_unused]] const char* metric = shared;
  A* panel = take<A>(scratch, z.rows(plan.width) * z.lda1);
  Acc* coefficients = take<Acc>(scratch, z.rows(plan.width) * z.lda2);
  A* rounded = take<A>(scratch, z.rows(plan.width) * z.lda2);
  const int64_t i0 = index * plan.width, rows = min64(plan.width, z.m - i0), padded = z.rows(rows);
  const Update<T, Acc> update = update_at<Dot, T>(s, i0, 0);

  pack_a<Dot>(update.in, s.in_stride, 1, rows, z.n, panel, z.lda1);
  if constexpr (Dot::kPair == 1) {
    if (update.reference)
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t k = 0; k < z.n; ++k) panel[i * z.lda1 + k] -= A(value(update.reference[i * s.reference_stride + k]));
  }
  __builtin_memset(panel + rows * z.lda1, 0, (padded - rows) * z.lda1 * sizeof(A));
  const int64_t count = steps<Dot>(z.n);
  if (count == 0) __builtin_memset(coefficients, 0, padded * z.lda2 * sizeof(Acc));
  for (int64_t p = 0; p < count; p += kBlockK)
    product<Dot>(panel, z.lda1, padded, b1, z.r, count, p, min64(count, p + kBlockK), padded,
                 Accumulate<Dot>{coefficients, 0, z.lda2, p == 0});
  if constexpr (Dot::kPair == 1) {
    if (s.metric.data) {
      Acc* found = coefficients;
      coefficients = take<Acc>(scratch, z.rows(plan.width) * z.lda2);
      product<Dot>(found, z.lda2, padded, reinterpret_cast<const B*>(metric), z.r, z.r, 0, z.r, padded,
                   Accumulate<Dot>{coefficients, 0, z.lda2, true});
    }
  }
  if (s.image.data)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = 0; k < z.r; ++k) coefficients[i * z.lda2 + k] -= Acc(at(s.image, i0 + i, k));
  const A* a = rounded;
  if constexpr (Dot::kPair == 1) {
    a = coefficients;
  } else {
    round_rows<A, Acc>(coefficients, padded, round_up(z.r, kLanes<Acc>), z.lda2, rounded, z.lda2);
    if (z.r % 2)
      for (int64_t i = 0; i < padded; ++i) rounded[i * z.lda2 + z.r] = A{};
  }
  product<Dot>(a, z.lda2, rows, b2, z.n, steps<Dot>(z.r), 0, steps<Dot>(z.r), padded, update);
}

// Which product: bf16 x bf16 on the dot instruction where there is one; fp64 in fp64; everything else in fp32. What a
// restore subtracts is subtracted in fp32: rounding the difference to bf16 left errors of 4e-3. So is what a metric
// makes, whose purpose is the digits that bf16 coefficients do not have (6e-4 of the protected part).
inline bool dot_bf16(const OneSided& s) {
#if defined(SCULPT_BF16_DOT)
  return s.type == Type::bf16 && s.basis.type == Type::bf16 && !s.reference && !s.image.data && !s.metric.data &&
         s.phase == Phase::whole;
#else
  (void)s;
  return false;
#endif
}

Plan plan_one_sided(const OneSided& s, int64_t threads) {
  Plan plan;
  if (s.type == Type::f64) measure<Fma<double>>(s, threads, plan);
#if defined(SCULPT_BF16_DOT)
  else if (dot_bf16(s)) measure<DotBf16>(s, threads, plan);
#endif
  else measure<Fma<float>>(s, threads, plan);
  return plan;
}

void pack_one_sided(const OneSided& s, const Plan& plan, void* shared, int64_t task) {
  char* to = static_cast<char*>(shared);
  if (s.type == Type::f64) return pack_basis<Fma<double>, double>(s, plan, to, task);
#if defined(SCULPT_BF16_DOT)
  if (dot_bf16(s)) return pack_basis<DotBf16, Bf16>(s, plan, to, task);
#endif
  switch (s.basis.type) {
    case Type::bf16: return pack_basis<Fma<float>, Bf16>(s, plan, to, task);
    case Type::f16: return pack_basis<Fma<float>, F16>(s, plan, to, task);
    default: return pack_basis<Fma<float>, float>(s, plan, to, task);
  }
}

template <class Dot, class T>
void panel_of(const OneSided& s, const Plan& plan, const void* shared, void* scratch, int64_t index) {
  char* packed = static_cast<char*>(const_cast<void*>(shared));
  char* own = static_cast<char*>(scratch);
  if (s.side == Side::left) return left_panel<Dot, T>(s, plan, packed, own, index);
  right_panel<Dot, T>(s, plan, packed, own, index);
}

void panel_one_sided(const OneSided& s, const Plan& plan, const void* shared, void* scratch, int64_t index) {
#if defined(SCULPT_BF16_DOT)
  if (dot_bf16(s)) return panel_of<DotBf16, Bf16>(s, plan, shared, scratch, index);
#endif
  switch (s.type) {
    case Type::f64: return panel_of<Fma<double>, double>(s, plan, shared, scratch, index);
    case Type::f32: return panel_of<Fma<float>, float>(s, plan, shared, scratch, index);
    case Type::bf16: return panel_of<Fma<float>, Bf16>(s, plan, shared, scratch, index);
    case Type::f16: return panel_of<Fma<float>, F16>(s, plan, shared, scratch, index);
  }
}

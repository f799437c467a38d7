// General products, panel by panel: the thin products of a range finder (a matrix times some hundred columns) and Gram
// matrices. 2 M N K operations, half of that where the result is symmetric. The matrix is read once, in its own dtype;
// the shared operand is packed once (a copy of its size, in the dtype of the sum).
//
// Why not the library: at 4096 x 4096 times 144 columns in fp32 it reached 190 GF/s on an AMD EPYC (2 threads), these
// tiles 370 (bench/results/decompose-cpu-2026-11-23.json, the floors of six products).
//
// Included by panel.h.

// Steps of k packed at a time: a panel of 192 columns is then 768 KB of fp32, whatever the depth.
constexpr int64_t kChunkK = 1024;
// Rows of the shared A that meet a panel before the next rows do: 256 KB in the second-level cache.
constexpr int64_t kSharedRows = 32 * kRows;

template <class Dot>
struct MatmulSizes {
  using Acc = typename Dot::Acc;
  int64_t M, N, K, chunk, lda, unit;

  explicit MatmulSizes(const Matmul& p) : M(p.a.rows), N(p.b.cols), K(p.a.cols) {
    chunk = min64(K, kChunkK);
    lda = pitch<Acc>(p.share_a ? K : chunk);
    unit = p.share_a ? kLanes<Acc> : kRows;
  }
  // The shared B lies chunk after chunk of k, block after block of columns.
  int64_t padded_cols() const { return round_up(N, kLanes<Acc>); }
};

template <class Dot>
Plan measure_matmul(const Matmul& p, int64_t threads) {
  using Acc = typename Dot::Acc;
  MatmulSizes<Dot> z(p);
  Plan plan;
  const int64_t extent = p.share_a ? z.N : z.M;
  const int64_t widest = kPanelBytes / (kChunkK * int64_t(sizeof(Acc))) / z.unit * z.unit;
  // As many panels for every thread; twice as many at least where a triangle makes them unequal.
  const int64_t grain = p.symmetric ? 4 * threads : threads;
  plan.panels = round_up(max64(1, (extent + widest - 1) / widest), grain);
  plan.width = round_up(max64(1, (extent + plan.panels - 1) / plan.panels), z.unit);
  plan.panels = (extent + plan.width - 1) / plan.width;
  if (p.share_a) {
    plan.pack_tasks = (z.M + 63) / 64;
    plan.shared_bytes = span<Acc>(round_up(z.M, kRows) * z.lda);
    plan.scratch_bytes = span<Acc>(z.chunk * plan.width) + span<Acc>(z.M * plan.width);
  } else {
    plan.pack_tasks = (z.N + kCols<Dot> - 1) / kCols<Dot>;
    plan.shared_bytes = span<Acc>(z.K * z.padded_cols());
    plan.scratch_bytes = span<Acc>(plan.width * z.lda) + span<Acc>(plan.width * z.padded_cols());
  }
  return plan;
}

template <class Dot, class S>
void pack_shared(const Matmul& p, void* shared, int64_t task) {
  using Acc = typename Dot::Acc;
  MatmulSizes<Dot> z(p);
  Acc* to = static_cast<Acc*>(shared);
  if (p.share_a) {
    const int64_t begin = task * 64, end = min64(begin + 64, z.M);
    const S* a = static_cast<const S*>(p.a.data);
    pack_a<Dot>(a + begin * p.a.row_stride, p.a.row_stride, p.a.col_stride, end - begin, z.K, to + begin * z.lda, z.lda);
    if (end == z.M) __builtin_memset(to + end * z.lda, 0, (round_up(end, kRows) - end) * z.lda * sizeof(Acc));
    return;
  }
  const int64_t j = task * kCols<Dot>;
  const S* b = static_cast<const S*>(p.b.data) + j * p.b.col_stride;
  for (int64_t k = 0; k < z.K; k += z.chunk) {
    const int64_t depth = min64(z.K - k, z.chunk);
    pack_b<Dot>(b + k * p.b.row_stride, p.b.row_stride, p.b.col_stride, depth, min64(z.N - j, kCols<Dot>),
                to + k * z.padded_cols() + j * depth);
  }
}

// Both triangles take equal runs of panels to the threads: the longest and the shortest panel in turn.
inline int64_t balanced(int64_t index, int64_t count) { return index % 2 ? count - 1 - index / 2 : index / 2; }

template <class Dot, class S>
void columns_panel(const Matmul& p, const Plan& plan, const void* shared, char* scratch, int64_t index) {
  using Acc = typename Dot::Acc;
  MatmulSizes<Dot> z(p);
  const Acc* a = static_cast<const Acc*>(shared);
  Acc* panel = take<Acc>(scratch, z.chunk * plan.width);
  Acc* sums = take<Acc>(scratch, z.M * plan.width);
  const int64_t j0 = index * plan.width, cols = min64(plan.width, z.N - j0);
  const int64_t i0 = p.symmetric ? j0 / kRows * kRows : 0;
  const S* b = static_cast<const S*>(p.b.data) + j0;
  for (int64_t k = 0; k < z.K; k += z.chunk) {
    const int64_t depth = min64(z.K - k, z.chunk);
    pack_panel<Dot, S>(b + k * p.b.row_stride, p.b.row_stride, nullptr, 0, depth, cols, panel);
    for (int64_t s = 0; s < depth; s += kBlockK)
      product<Dot>(a + k, z.lda, z.M, panel, cols, depth, s, min64(depth, s + kBlockK), kSharedRows,
                   Accumulate<Dot>{sums, z.M, 0, k + s == 0}, i0);
  }
  Acc* out = static_cast<Acc*>(const_cast<void*>(p.out.data)) + j0 * p.out.col_stride;
  for (int64_t j = 0; j < cols; j += kCols<Dot>) {
    const int64_t block = min64(cols - j, kCols<Dot>), width = round_up(block, kLanes<Acc>);
    const Acc* from = sums + j * z.M;
    Acc* to = out + j * p.out.col_stride;
    if (p.out.col_stride == 1) {
      for (int64_t i = i0; i < z.M; ++i)
        __builtin_memcpy(to + i * p.out.row_stride, from + i * width, block * sizeof(Acc));
    } else {
      // 16 rows at a time: the lines written to are then filled while they are in the first-level cache.
      for (int64_t i = i0; i < z.M; i += 16)
        for (int64_t q = 0; q < block; ++q)
          for (int64_t u = i; u < min64(i + 16, z.M); ++u)
            to[u * p.out.row_stride + q * p.out.col_stride] = from[u * width + q];
    }
  }
}

template <class Dot, class S>
void rows_panel(const Matmul& p, const Plan& plan, const void* shared, char* scratch, int64_t index) {
  using Acc = typename Dot::Acc;
  MatmulSizes<Dot> z(p);
  const Acc* b = static_cast<const Acc*>(shared);
  Acc* panel = take<Acc>(scratch, plan.width * z.lda);
  const int64_t ld = z.padded_cols();
  Acc* sums = take<Acc>(scratch, plan.width * ld);
  const int64_t i0 = index * plan.width, rows = min64(plan.width, z.M - i0), padded = round_up(rows, kRows);
  const int64_t j0 = p.symmetric ? i0 / kCols<Dot> * kCols<Dot> : 0;
  const S* a = static_cast<const S*>(p.a.data) + i0 * p.a.row_stride;
  for (int64_t k = 0; k < z.K; k += z.chunk) {
    const int64_t depth = min64(z.K - k, z.chunk);
    pack_a<Dot>(a + k * p.a.col_stride, p.a.row_stride, p.a.col_stride, rows, depth, panel, z.lda);
    __builtin_memset(panel + rows * z.lda, 0, (padded - rows) * z.lda * sizeof(Acc));
    for (int64_t s = 0; s < depth; s += kBlockK)
      product<Dot>(panel, z.lda, padded, b + k * ld, z.N, depth, s, min64(depth, s + kBlockK), padded,
                   Accumulate<Dot>{sums, 0, ld, k + s == 0}, 0, j0);
  }
  Acc* out = static_cast<Acc*>(const_cast<void*>(p.out.data)) + i0 * p.out.row_stride;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = j0; j < z.N; ++j) out[i * p.out.row_stride + j * p.out.col_stride] = sums[i * ld + j];
}

Plan plan_matmul(const Matmul& p, int64_t threads) {
  return p.wide ? measure_matmul<Fma<double>>(p, threads) : measure_matmul<Fma<float>>(p, threads);
}

void pack_matmul(const Matmul& p, const Plan&, void* shared, int64_t task) {
  const auto in = [&](auto dot) {
    using Dot = decltype(dot);
    switch (p.share_a ? p.a.type : p.b.type) {
      case Type::f64:
        if constexpr (__is_same(typename Dot::Acc, double)) pack_shared<Dot, double>(p, shared, task);
        return;
      case Type::f32: return pack_shared<Dot, float>(p, shared, task);
      case Type::bf16: return pack_shared<Dot, Bf16>(p, shared, task);
      case Type::f16: return pack_shared<Dot, F16>(p, shared, task);
    }
  };
  return p.wide ? in(Fma<double>()) : in(Fma<float>());
}

void panel_matmul(const Matmul& p, const Plan& plan, const void* shared, void* scratch, int64_t index) {
  char* own = static_cast<char*>(scratch);
  if (p.symmetric) index = balanced(index, plan.panels);
  const auto of = [&](auto dot, auto element) {
    using Dot = decltype(dot);
    using S = decltype(element);
    p.share_a ? columns_panel<Dot, S>(p, plan, shared, own, index) : rows_panel<Dot, S>(p, plan, shared, own, index);
  };
  const auto in = [&](auto dot) {
    switch (p.share_a ? p.b.type : p.a.type) {
      case Type::f64:
        if constexpr (__is_same(typename decltype(dot)::Acc, double)) of(dot, double());
        return;
      case Type::f32: return of(dot, float());
      case Type::bf16: return of(dot, Bf16());
      case Type::f16: return of(dot, F16());
    }
  };
  return p.wide ? in(Fma<double>()) : in(Fma<float>());
}

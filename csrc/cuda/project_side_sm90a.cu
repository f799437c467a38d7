// Projection of one side in one pass, for Hopper: G -= U (Uᵀ G) or G -= (G U) Uᵀ, or what is subtracted there itself, G
// bfloat16 (m x n), U (m x r) or (n x r); of one matrix, or of a list of them in one launch.
//
// Moves: G read once and written once, 4 m n bytes; U once per cluster. Computes 4 m n r operations on tensor cores; with
// a float32 U, kept as two bfloat16 parts, 10 m n r; with a metric, G -= U M (Uᵀ G), 8 m n r.
//
// A cluster of blocks takes panels of some columns (right: rows), one after the other. Each block holds some of a panel's
// length, in tiles of 64, and the rows of U that go with it, in shared memory, and has warps for each step:
//   load      boxes of the panel to a slot of shared memory,
//   multiply  this block's part of Uᵀ G (of (G U)ᵀ), which goes from registers to the blocks that own its ranks,
//   add       the parts of the ranks that this block owns, in the order of the blocks; the sum goes to all, as one bfloat16
//             factor, or with a float32 basis or a metric as two (to 2^-16),
//   correct   the panel where it lies, with U from registers as far as it has room there,
//   store     its boxes; the slot is free again.
// Several panels are under way, each in another step, so that what the blocks wait for each other costs latency only.
// Nothing depends on how many clusters run: results are the same to the bit every time.
//
// It passed its tests on an H100 and an H200 (docs/kernels.md). LLaMA-2 7B's shapes take 1.1 to 1.4 times the floor on an H100
// at rank 16 and 1.2 to 1.6 times at 64 with a bfloat16 basis, on an H200 1.2 to 1.6 and 1.4 to 1.9; cuBLAS 2.1 to 2.5. With a
// metric it has not run on a GPU, and dispatch does not choose it.
//
// With a float16 G and U the same, coefficients above 65504 becoming infinite as in the plain expression; not run either.
//
// Not for ranks above 128 (64 with a float32 basis), rows of G that do not begin at multiples of 16 bytes, or panels too long
// for the shared memory of 16 blocks (`side_panels`). Dispatch has library products from rank 65 on, and for one side of
// matrices of less than 16 MiB.
#include "cuda/project_side.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "common/side_panels.h"
#include "cuda/bulk.h"
#include "cuda/cluster_launch.h"
#include "cuda/side_basis.h"
#include "cuda/side_boxes.h"
#include "cuda/wgmma.h"

namespace sculpt {
namespace {

constexpr int kGroup = 128;  // threads of a warpgroup
// Warpgroups: one of which a warp loads, one stores and two add, in turn; one that multiplies (two were no faster on an
// H200); those that correct, which share a panel's tiles and have its rows of U in registers. Three have not the registers
// for more than 32 numbers of a row, but at rank 16 in float32 they were 10 % faster than two.
constexpr int held_parts(BasisForm form) { return form == BasisForm::kFloat32 ? 2 : 1; }
constexpr int correctors(int64_t ranks, BasisForm form) { return ranks * held_parts(form) <= 32 ? 3 : 2; }
constexpr int threads_of(int64_t ranks, BasisForm form) { return (2 + correctors(ranks, form)) * kGroup; }
constexpr int kAdders = 2;
// Barriers of threads: of all that use the basis (all but two warps), and of those that multiply.
constexpr int kBasisBarrier = 1, kMultiplyBarrier = 2;

// How a block's shared memory is divided. box: rows of a panel's length that are copied at a time.
struct Sizes {
  int rows, blocks, owned, slots, stages, box;
};

// RANKS: padded. WIDE: columns (right: rows) of a panel.
template <int RANKS, BasisForm FORM, bool RIGHT, int WIDE>
struct Side {
  using Basis = SideBasis<RANKS, FORM>;
  static constexpr bool kHalf = FORM == BasisForm::kFloat16;
  static constexpr int kWidth = Basis::kWidth, kHalves = RANKS / kWidth;
  static constexpr int kSlotRow = WIDE * 2;  // bytes of a panel's slot for each row of its length
  static constexpr int kCoefficients = RANKS * WIDE;
  // bfloat16 factors that a coefficient is sent as. With a basis of bfloat16, orthonormal to 2^-9 as it is, one has the error
  // that the plain expression has; with two what is left of a matrix in a float32 basis' span is 1e-6 of it, not 6e-4.
  static constexpr int kParts = Basis::kParts;
  static constexpr int kStage = (4 + 2 * kParts) * kCoefficients;  // bytes
  static constexpr int kCorrectors = correctors(RANKS, FORM), kThreads = threads_of(RANKS, FORM);
  // Tiles of U that a warpgroup which corrects keeps in registers, its first ones: products then read a third of the shared
  // memory, and 4096 x 4096 took 44 us for 53 at rank 64 with a float32 basis.
  // Of U M Uᵀ that is U alone, and of 128 ranks one tile: with two registers were spilled.
  static constexpr int kHeldParts = held_parts(FORM);
  static constexpr int kHeld = RANKS * kParts > 128 ? 1 : RANKS * kHeldParts > 64 ? 2 : kCorrectors == 2 ? 4 : 3;
  using Sums = float[WIDE / 2];

  const SideEntry& entry;
  const Sizes& size;
  unsigned char* memory;
  // Addresses in shared memory: of it, of the stages, of the barriers.
  uint32_t base, stage_at, barriers;
  int own, tiles;  // of this block; tiles: that lie in G, at least in part
  int64_t first;   // of the panel's length, what this block holds from there on
  bool keep;
  Basis basis;

  __device__ Side(const SideEntry& entry, const Sizes& size, unsigned char* memory, int own)
      : entry(entry), size(size), memory(memory), own(own), first(static_cast<int64_t>(own) * size.rows), keep(entry.keep) {
    base = shared_address(memory);
    const int64_t length = RIGHT ? entry.n : entry.m, left = length - first;
    const uint32_t high = base + size.slots * size.rows * kSlotRow;
    basis = {static_cast<const typename Basis::Number*>(entry.basis), first, length, entry.r, size.rows, base, memory, high,
             high + size.rows * RANKS * 2};
    stage_at = basis.end(), barriers = stage_at + size.stages * kStage;
    tiles = static_cast<int>((min(max(left, int64_t(1)), static_cast<int64_t>(size.rows)) + kTile - 1) / kTile);
  }

  __device__ uint32_t slot(int at) const { return base + at * size.rows * kSlotRow; }
  // Of a stage: factors, high and then low, a row for each rank; all blocks' parts of what this one owns.
  __device__ uint32_t factors(int stage) const { return stage_at + stage * kStage; }
  __device__ uint32_t parts(int stage) const { return factors(stage) + 2 * kParts * kCoefficients; }
  // Barriers of slots: the panel is there; it is corrected; it has been stored. Of stages: all parts are there; all factors
  // are; they have been used.
  __device__ uint32_t full(int at) const { return barriers + 8 * at; }
  __device__ uint32_t corrected(int at) const { return full(kMostSlots + at); }
  __device__ uint32_t empty(int at) const { return corrected(kMostSlots + at); }
  __device__ uint32_t parts_full(int stage) const { return empty(kMostSlots + stage); }
  __device__ uint32_t factors_full(int stage) const { return parts_full(kMostStages + stage); }
  __device__ uint32_t used(int stage) const { return parts_full(2 * kMostStages + stage); }
  template <class T>
  __device__ T& in(uint32_t address) const {
    return *reinterpret_cast<T*>(memory + (address - base));
  }
  // Where a tile lies in its slot: left, 64 rows of WIDE columns; right, WIDE rows of 64 columns.
  __device__ uint32_t tile(int at, int i) const { return slot(at) + kTile * i * kSlotRow; }

  __device__ void load(int at, int i, uint32_t barrier) const {
    const uint32_t to = slot(at);
    expect(barrier, size.rows * kSlotRow);
    for (int row = 0; row < size.rows; row += size.box) {
      const int along = static_cast<int>(first) + row, across = i * WIDE;
      load_box(to + row * kSlotRow, &entry.map, RIGHT ? along : across, RIGHT ? across : along, barrier);
    }
  }

  __device__ void store(int at, int i) const {
    const uint32_t from = slot(at);
    for (int row = 0; row < size.rows; row += size.box) {
      const int along = static_cast<int>(first) + row, across = i * WIDE;
      store_box(&entry.map, RIGHT ? along : across, RIGHT ? across : along, from + row * kSlotRow);
    }
    close_stores();
  }

  // This block's part of the coefficients, of 64 ranks: they are the rows. Of fewer the product has each more than once.
  __device__ void multiply(int at, int half, Sums& sums) const {
    const uint64_t g = operand<RIGHT ? kTile : WIDE>(slot(at));
    const uint32_t beside = 2 * half * size.rows * kWidth;
    const uint64_t u = operand<kWidth>(basis.high + beside), rest = operand<kWidth>(basis.low + beside);
    begin_products(sums);
    int t = 0;
    // There is a tile, and each is a group of products: the compiler waits for each product of a loop that might not run.
#pragma unroll 1
    do {
      go_on_with_products();
#pragma unroll
      for (int k = 0; k < kTile; k += 16) {
        const uint64_t from = further(g, kTile * t * kSlotRow + (RIGHT ? 2 * k : k * kSlotRow));
        const uint32_t along = 2 * (kTile * t + k) * kWidth;
        multiply_add<kHalf, false, RIGHT>(sums, further(u, along), from);
        if constexpr (kParts == 2) multiply_add<kHalf, false, RIGHT>(sums, further(rest, along), from);
      }
      end_products();
    } while (++t < tiles);
    wait_for_products(sums);
  }

  // It goes to the owners of its ranks. Of a part an owner has eight columns of each of its ranks, then the next eight. Two
  // lanes beside each other have two columns each of two ranks, and change them for four of one: an SM sends as many
  // pieces in a time, of whatever size.
  __device__ void send_part(int stage, int half, const Sums& sums, int thread) const {
    // Of fewer than 64 ranks each is in several warps, for some of the columns each. Where there are more warps than that,
    // some have nothing to send: without meeting they could still be multiplying a panel that is being corrected.
    constexpr int kCopies = RANKS < 64 ? 64 / RANKS : 1;
    if constexpr (kCopies > WIDE / 8) meet(kMultiplyBarrier, kGroup);
    const bool odd = thread % 2 != 0;
    const int row = 16 * (thread / 32) + thread % 32 / 4, share = row / RANKS % kCopies;
    const int rank = 64 * half + (row + (odd ? 8 : 0)) % RANKS;
    const uint32_t barrier = address_in(parts_full(stage), rank >> (__ffs(size.owned) - 1));
    const uint32_t to = barrier + (parts(stage) - parts_full(stage)) + own * size.owned * WIDE * 4 +
                        32 * (rank & (size.owned - 1)) + 8 * (thread & 2);
#pragma unroll
    for (int j = 0; j < WIDE / 8; ++j) {
      const float give_x = odd ? sums[4 * j] : sums[4 * j + 2], give_y = odd ? sums[4 * j + 1] : sums[4 * j + 3];
      const uint32_t x = __shfl_xor_sync(0xffffffffu, __float_as_uint(give_x), 1);
      const uint32_t y = __shfl_xor_sync(0xffffffffu, __float_as_uint(give_y), 1);
      if (j % kCopies != share % (WIDE / 8) || (kCopies > WIDE / 8 && share >= WIDE / 8)) continue;
      const uint32_t at = to + 32 * j * size.owned;
      if (odd)
        send(at, x, y, __float_as_uint(sums[4 * j + 2]), __float_as_uint(sums[4 * j + 3]), barrier);
      else
        send(at, __float_as_uint(sums[4 * j]), __float_as_uint(sums[4 * j + 1]), x, y, barrier);
    }
  }

  // The parts of the ranks that this block owns are added, eight columns a thread, and sent to every block; where there are
  // more threads, some have the same eight, for some of the blocks each. What is to be taken away is sent with its sign
  // changed. Nothing is sent before all threads have read their parts: a block that has all factors may send its next part.
  // Sizes are powers of two, and nothing is divided.
  __device__ void send_factors(int stage, int lane) const {
    const int pieces = size.owned * WIDE / 8, shift = __ffs(pieces) - 1, shares = max(1, 32 >> shift);
    for (int item = lane; item < pieces * shares; item += 32) {
      const int piece = item & (pieces - 1), rank = own * size.owned + (piece & (size.owned - 1));
      const int column = piece >> (__ffs(size.owned) - 1) << 3;
      const auto* from = &in<const float4>(parts(stage) + 32 * piece);
      float sums[8] = {};
#pragma unroll 4
      for (int other = 0; other < size.blocks; ++other) {
        const float4 x = from[other * 2 * pieces], y = from[other * 2 * pieces + 1];
        sums[0] += x.x, sums[1] += x.y, sums[2] += x.z, sums[3] += x.w;
        sums[4] += y.x, sums[5] += y.y, sums[6] += y.z, sums[7] += y.w;
      }
      uint32_t high_parts[4], low_parts[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float x = keep ? sums[2 * k] : -sums[2 * k], y = keep ? sums[2 * k + 1] : -sums[2 * k + 1];
        high_parts[k] = packed<kHalf>(x, y), low_parts[k] = packed(rest_of(x), rest_of(y));
      }
      const uint32_t to = factors(stage) + 2 * swizzled<WIDE>(rank, column) - factors_full(stage);
      __syncwarp();  // all have read
      for (int other = item >> shift; other < size.blocks; other += shares) {
        const uint32_t barrier = address_in(factors_full(stage), other), there = barrier + to;
        send(there, high_parts[0], high_parts[1], high_parts[2], high_parts[3], barrier);
        if constexpr (kParts == 2)
          send(there + 2 * kCoefficients, low_parts[0], low_parts[1], low_parts[2], low_parts[3], barrier);
      }
    }
  }

  // U times the factors (the factors times Uᵀ, transposed) is added to a tile where it lies: the products begin from it.
  //
  // Four 8 x 8 blocks at a time: of rows 16 warp and eight below, columns 8 j and eight further. A lane has the address of a
  // row of one; of a tile that lies transposed, of a column.
  using Lines = uint32_t[WIDE / 16];
  __device__ static void find_lines(int thread, Lines& lines) {
    const int warp = thread / 32, lane = thread % 32, below = lane / 8 % 2, beside = lane / 16, line = lane % 8;
#pragma unroll
    for (int j = 0; j < WIDE / 8; j += 2) {
      const int row = RIGHT ? 8 * (j + beside) + line : 16 * warp + 8 * below + line;
      const int column = RIGHT ? 16 * warp + 8 * below : 8 * (j + beside);
      lines[j / 2] = 2 * (RIGHT ? swizzled<kTile>(row, column) : swizzled<WIDE>(row, column));
    }
  }

  // A warpgroup's share of U, of its first tiles.
  using Held = uint32_t[kHeld * kHeldParts][RANKS / 16][4];
  __device__ void hold_basis(int group, int thread, Held& held) const {
#pragma unroll
    for (int t = 0; t < kHeld * kHeldParts; ++t) {
      const int tile = group + t / kHeldParts * kCorrectors;
      if (tile < tiles) basis.hold(tile, t % kHeldParts, thread, held[t]);
    }
  }

  // HELD: which of its tiles of U in registers the warpgroup needs; kHeld: it is in shared memory.
  template <int HELD>
  __device__ void correct(int at, int i, int stage, const Lines& lines, const Held& held) const {
    const uint32_t begin = tile(at, i);
    float sums[WIDE / 2];
#pragma unroll
    for (int j = 0; j < WIDE / 8; j += 2) {
      uint32_t old[4] = {};
      if (!keep) {
        if constexpr (RIGHT)
          load_four_transposed(old, begin + lines[j / 2]);
        else
          load_four(old, begin + lines[j / 2]);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float2 pair = unpacked<kHalf>(old[k]);
        sums[4 * j + 2 * k] = pair.x, sums[4 * j + 2 * k + 1] = pair.y;
      }
    }
    hold(sums);
    go_on_with_products();
    const uint64_t c = operand<WIDE>(factors(stage)), c_low = operand<WIDE>(factors(stage) + 2 * kCoefficients);
#pragma unroll
    for (int k = 0; k < RANKS; k += 16) {
      const uint64_t factor = further(c, 2 * k * WIDE), rest = further(c_low, 2 * k * WIDE);
      if constexpr (HELD < kHeld) {
        const auto* u = held[HELD * kHeldParts];
        multiply_add<kHalf, false>(sums, u[k / 16], factor);
        if constexpr (kParts == 2) multiply_add<kHalf, false>(sums, u[k / 16], rest);
        if constexpr (kHeldParts == 2) multiply_add<kHalf, false>(sums, held[HELD * kHeldParts + 1][k / 16], factor);
      } else {
        const uint32_t at_rows = 2 * (k / kWidth * size.rows + kTile * i) * kWidth, along = 2 * (k % kWidth);
        const uint64_t u = further(operand<kWidth>(basis.high + at_rows), along);
        multiply_add<kHalf, true, false>(sums, u, factor);
        if constexpr (kParts == 2) multiply_add<kHalf, true, false>(sums, u, rest);
        if constexpr (kHeldParts == 2)
          multiply_add<kHalf, true, false>(sums, further(operand<kWidth>(basis.low + at_rows), along), factor);
      }
    }
    end_products();
    wait_for_products(sums);
#pragma unroll
    for (int j = 0; j < WIDE / 8; j += 2) {
      uint32_t out[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) out[k] = packed<kHalf>(sums[4 * j + 2 * k], sums[4 * j + 2 * k + 1]);
      if constexpr (RIGHT)
        store_four_transposed(begin + lines[j / 2], out);
      else
        store_four(begin + lines[j / 2], out);
    }
  }

  // A warpgroup's tiles, one after the other: from HELD of those in registers on, then those in shared memory.
  template <int HELD = 0>
  __device__ void correct_all(int at, int group, int stage, const Lines& lines, const Held& held) const {
    int i = group + HELD * kCorrectors;
    if constexpr (HELD < kHeld) {
      if (i >= tiles) return;
      correct<HELD>(at, i, stage, lines, held);
      correct_all<HELD + 1>(at, group, stage, lines, held);
    } else {
      for (; i < tiles; i += kCorrectors) correct<kHeld>(at, i, stage, lines, held);
    }
  }
};

// `list`: of entries, or null, and `one` is meant. `panels`: of all.
template <int RANKS, BasisForm FORM, bool RIGHT, int WIDE>
__global__ void __launch_bounds__(threads_of(RANKS, FORM), 1)
    project_side(const __grid_constant__ SideEntry one, const SideEntry* list, int panels,
                 const __grid_constant__ Sizes size) {
#ifdef SCULPT_SM90A
  // Rows of 128 bytes change their pieces by the address, so arrays begin at multiples of 1024.
  extern __shared__ __align__(1024) unsigned char memory[];
  using Of = Side<RANKS, FORM, RIGHT, WIDE>;
  const int own = cluster_rank(), thread = threadIdx.x % kGroup;
  // The same in all lanes, so that a warp has one role and addresses of operands are worked out once for it.
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0), group = warp / 4;
  const int clusters = static_cast<int>(gridDim.x) / size.blocks, cluster = static_cast<int>(blockIdx.x) / size.blocks;
  constexpr uint32_t kPartBytes = RANKS * WIDE * 4, kFactorBytes = RANKS * WIDE * 2 * Of::kParts;
  constexpr int kCorrectorWarps = 4 * Of::kCorrectors, kBasisThreads = Of::kThreads - 64;
  const Of any(one, size, memory, own);
  if (threadIdx.x == 0) {
    for (int i = 0; i < size.slots; ++i) {
      make_barrier(any.full(i), 1);
      make_barrier(any.corrected(i), kCorrectorWarps);
      make_barrier(any.empty(i), 1);
    }
    for (int i = 0; i < size.stages; ++i) {
      make_barrier(any.parts_full(i), 1), expect(any.parts_full(i), kPartBytes);
      make_barrier(any.factors_full(i), 1), expect(any.factors_full(i), kFactorBytes);
      make_barrier(any.used(i), kCorrectorWarps + kAdders - 1);
    }
    show_to_async();
  }
  // Every block of the cluster runs and has its barriers: from here on the others' memory may be written.
  cluster_barrier();

  Turn slot, stage;
  int seen = 0;  // panels before, as far as slots and stages go
  const SideEntry* entry = list ? list : &one;
  for (int first = 0; first < panels; first += entry->panels, ++entry) {
    PanelRun panel(first, entry->panels, panels, cluster, clusters, list != nullptr);
    if (!panel) continue;
    const Of side(*entry, size, memory, own);
    if (warp >= 2) {
      // All have done with the basis before.
      meet(kBasisBarrier, kBasisThreads);
      side.basis.load(threadIdx.x - 64, kBasisThreads);
      if constexpr (FORM == BasisForm::kMetric) {
        meet(kBasisBarrier, kBasisThreads);  // U is there
        side.basis.template weigh<RIGHT>(entry->metric, threadIdx.x - 64, kBasisThreads);
      }
      meet(kBasisBarrier, kBasisThreads);
    }
    if (list && thread % 32 == 0 && warp < 2) see_map(&entry->map);
    if (threadIdx.x == 0) {
      for (; panel; panel.next(), slot.next(size.slots)) {
        if (seen++ >= size.slots) wait_for(side.empty(slot.at), slot.phase ^ 1);
        side.load(slot.at, panel.at - first, side.full(slot.at));
      }
    } else if (threadIdx.x == 32) {
      for (; panel; panel.next(), slot.next(size.slots)) {
        wait_for(side.corrected(slot.at), slot.phase);
        side.store(slot.at, panel.at - first);
        wait_for_reads<0>();
        arrive(side.empty(slot.at));
      }
    } else if (group == 0 && warp >= 2) {
      // A block sends its part when it has used what the stage had before, so with all parts there all blocks have.
      for (; panel; panel.next(), stage.next(size.stages)) {
        wait_for_others(side.parts_full(stage.at), stage.phase);
        if (seen++ % kAdders != warp - 2) {
          __syncwarp();  // no lane is still to wait for this phase
          if (thread % 32 == 0) arrive(side.used(stage.at));
          continue;
        }
        if (thread % 32 == 0) expect(side.parts_full(stage.at), kPartBytes);
        side.send_factors(stage.at, thread % 32);
      }
    } else if (group == 1) {
      typename Of::Sums sums;
      for (; panel; panel.next(), slot.next(size.slots), stage.next(size.stages)) {
        wait_for(side.full(slot.at), slot.phase);
#pragma unroll
        for (int half = 0; half < Of::kHalves; ++half) {
          side.multiply(slot.at, half, sums);
          // What this stage had before has been used: so all its factors had come, and all owners had read their parts.
          if (half == 0 && seen++ >= size.stages) wait_for(side.used(stage.at), stage.phase ^ 1);
          side.send_part(stage.at, half, sums, thread);
        }
      }
    } else if (group >= 2) {
      typename Of::Lines lines;
      Of::find_lines(thread, lines);
      typename Of::Held held;
      side.hold_basis(group - 2, thread, held);
      for (; panel; panel.next(), slot.next(size.slots), stage.next(size.stages)) {
        wait_for(side.full(slot.at), slot.phase);
        wait_for_others(side.factors_full(stage.at), stage.phase);
        show_to_async();  // the stores of others
        if (group == 2 && thread == 0) expect(side.factors_full(stage.at), kFactorBytes);
        side.correct_all(slot.at, group - 2, stage.at, lines, held);
        __syncwarp();
        if (thread % 32 == 0) arrive(side.used(stage.at));
        show_to_async();
        __syncwarp();
        if (thread % 32 == 0) arrive(side.corrected(slot.at));
      }
    }
    __syncwarp();
  }
  // No block ends while others may write its memory.
  cluster_barrier();
#endif
}

using Kernel = decltype(&project_side<16, BasisForm::kBFloat16, false, 32>);

template <BasisForm FORM, bool RIGHT, int WIDE>
Kernel kernel_of(int64_t ranks) {
  switch (ranks) {
    case 16: return project_side<16, FORM, RIGHT, WIDE>;
    case 32: return project_side<32, FORM, RIGHT, WIDE>;
    case 64: return project_side<64, FORM, RIGHT, WIDE>;
    default:
      if constexpr (FORM == BasisForm::kFloat32) return nullptr;
      else return project_side<128, FORM, RIGHT, WIDE>;
  }
}

template <BasisForm FORM>
Kernel kernel_of(const SidePanels& plan, bool right) {
  if (right) return plan.width == 16 ? kernel_of<FORM, true, 16>(plan.ranks) : kernel_of<FORM, true, 32>(plan.ranks);
  return plan.width == 16 ? kernel_of<FORM, false, 16>(plan.ranks) : kernel_of<FORM, false, 32>(plan.ranks);
}

Kernel kernel_of(const SidePanels& plan, BasisForm form, bool right) {
  switch (form) {
    case BasisForm::kBFloat16: return kernel_of<BasisForm::kBFloat16>(plan, right);
    case BasisForm::kFloat32: return kernel_of<BasisForm::kFloat32>(plan, right);
    case BasisForm::kFloat16: return kernel_of<BasisForm::kFloat16>(plan, right);
    default: return kernel_of<BasisForm::kMetric>(plan, right);
  }
}

cudaError_t prepare(bool right, BasisForm form, const SidePanels& plan, cudaStream_t stream, ClusterLaunch& launch,
                    Kernel& kernel) {
  if (!built_for_sm90a()) return cudaErrorNoKernelImageForDevice;
  kernel = plan.fits ? kernel_of(plan, form, right) : nullptr;
  if (kernel == nullptr) return cudaErrorInvalidValue;
  return launch.prepare(reinterpret_cast<const void*>(kernel), plan, threads_of(plan.ranks, form), stream);
}

cudaError_t project(const SideEntry& one, const SideEntry* list, int64_t panels, bool right, BasisForm form,
                    const SidePanels& plan, cudaStream_t stream) {
  ClusterLaunch launch;
  Kernel kernel;
  if (const cudaError_t error = prepare(right, form, plan, stream, launch, kernel); error != cudaSuccess) return error;
  launch.cover(panels, plan);
  const Sizes size{static_cast<int>(plan.rows), static_cast<int>(plan.cluster), static_cast<int>(plan.owned),
                   static_cast<int>(plan.slots), static_cast<int>(plan.stages),
                   static_cast<int>(box_rows(plan, right))};
  return cleared(cudaLaunchKernelEx(&launch.config, kernel, one, list, static_cast<int>(panels), size));
}

}  // namespace

cudaError_t side_entry(void* grad, const void* basis, const float* metric, int64_t m, int64_t n, int64_t r, bool right,
                       bool keep, const SidePanels& plan, SideEntry& entry) {
  if (!plan.fits) return cudaErrorInvalidValue;
  entry.basis = basis, entry.metric = metric, entry.m = m, entry.n = n, entry.r = static_cast<int>(r), entry.keep = keep;
  entry.panels = static_cast<int>(((right ? m : n) + plan.width - 1) / plan.width);
  return boxes_of(grad, m, n, right, plan, entry.map);
}

cudaError_t side_runs(bool right, BasisForm form, const SidePanels& plan) {
  ClusterLaunch launch;
  Kernel kernel;
  return prepare(right, form, plan, nullptr, launch, kernel);
}

cudaError_t project_side_sm90a(const SideEntry& entry, bool right, BasisForm form, const SidePanels& plan,
                               cudaStream_t stream) {
  return project(entry, nullptr, entry.panels, right, form, plan, stream);
}

cudaError_t project_sides_sm90a(const SideEntry* list, int64_t panels, bool right, BasisForm form, const SidePanels& plan,
                                cudaStream_t stream) {
  return project(SideEntry{}, list, panels, right, form, plan, stream);
}

}  // namespace sculpt

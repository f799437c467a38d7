// Projection of one side in one pass, for Hopper: G -= U (Uᵀ G) or G -= (G U) Uᵀ, or what is subtracted there itself, G
// bfloat16 (m x n), U (m x r) or (n x r); of one matrix, or of a list of them in one launch.
//
// Moves: G read once and written once, 4 m n bytes; U once per cluster. Computes 6 m n r operations on tensor cores (with
// a float32 U, kept as two bfloat16 parts, 10 m n r).
//
// A cluster of blocks takes panels of some columns (right: rows), one after the other. Each block holds some of a panel's
// length, in tiles of 64, and the rows of U that go with it, in shared memory, and has warps for each step:
//   load      boxes of the panel to a slot of shared memory,
//   multiply  this block's part of Uᵀ G (of (G U)ᵀ), which goes from registers to the blocks that own its ranks,
//   add       the parts of the ranks that this block owns, in the order of the blocks; the sum goes to all, as two bfloat16
//             factors (to 2^-16),
//   correct   the panel where it lies,
//   store     its boxes; the slot is free again.
// Several panels are under way, each in another step, so that what the blocks wait for each other costs latency only.
// Nothing depends on how many clusters run: results are the same to the bit every time.
//
// On an H200 the tests of values passed, those of lists were cut off (docs/kernels.md). LLaMA-2 7B's shapes take 1.3 to 1.7
// times the floor there at rank 16 and 1.7 to 2.7 times at 64 with a bfloat16 basis, where cuBLAS takes 2.2 to 2.6 times.
//
// Not for float16, whose coefficients can overflow, for ranks above 128 (64 with a float32 basis), rows of G that do not
// begin at multiples of 16 bytes, or panels too long for the shared memory of 16 blocks (`side_panels`). Dispatch has
// library products from rank 65 on (17 with a float32 basis).
#include "cuda/project_side.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "common/side_panels.h"
#include "cuda/bulk.h"
#include "cuda/cluster_launch.h"
#include "cuda/side_boxes.h"
#include "cuda/wgmma.h"

namespace sculpt {
namespace {

constexpr int kGroup = 128;  // threads of a warpgroup
// Warpgroups: one of which a warp loads, one stores and two add; those that multiply, in turn; those that correct, which
// share a panel's tiles. Two that multiply, or half as many that correct, were no faster on an H200.
constexpr int kMultipliers = 1, kCorrectors = 4;
constexpr int kThreads = (1 + kMultipliers + kCorrectors) * kGroup;
constexpr int kAdders = 64, kCorrectorWarps = 4 * kCorrectors;
// Barriers of threads: of those that add, of all that use the basis (all but two warps), and of a group that multiplies.
constexpr int kAddBarrier = 1, kBasisBarrier = 2, kMultiplyBarrier = 3, kBasisThreads = kThreads - 64;

__device__ uint32_t packed(float x, float y) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// What rounding to bfloat16 took from x.
__device__ float rest_of(float x) { return x - __bfloat162float(__float2bfloat16_rn(x)); }

// How a block's shared memory is divided. box: rows of a panel's length that are copied at a time.
struct Sizes {
  int rows, blocks, owned, slots, stages, box;
};

// A ring of barriers, used one after the other: which one, and in which phase it is.
struct Turn {
  int at = 0;
  uint32_t phase = 0;
  __device__ void next(int size) {
    if (++at == size) at = 0, phase ^= 1;
  }
};

// RANKS: padded. SPLIT: U is float32. WIDE: columns (right: rows) of a panel.
template <int RANKS, bool SPLIT, bool RIGHT, int WIDE>
struct Side {
  // Columns of U lie in arrays of up to 64 beside each other.
  static constexpr int kWidth = RANKS < 64 ? RANKS : 64, kHalves = RANKS / kWidth;
  static constexpr int kSlotRow = WIDE * 2;  // bytes of a panel's slot for each row of its length
  static constexpr int kCoefficients = RANKS * WIDE;
  using Sums = float[WIDE / 2];

  const SideEntry& entry;
  const Sizes& size;
  unsigned char* memory;
  // Addresses in shared memory: of it, of U's parts, of the stages, of the barriers.
  uint32_t base, high, low, stage_at, barriers;
  int own, tiles;  // of this block; tiles: that lie in G, at least in part
  int64_t first;   // of the panel's length, what this block holds from there on
  bool keep;

  __device__ Side(const SideEntry& entry, const Sizes& size, unsigned char* memory, int own)
      : entry(entry), size(size), memory(memory), own(own), first(static_cast<int64_t>(own) * size.rows), keep(entry.keep) {
    base = shared_address(memory);
    high = base + size.slots * size.rows * kSlotRow, low = high + size.rows * RANKS * 2;
    stage_at = SPLIT ? low + size.rows * RANKS * 2 : low, barriers = stage_at + size.stages * 8 * kCoefficients;
    const int64_t left = (RIGHT ? entry.n : entry.m) - first;
    tiles = static_cast<int>((min(max(left, int64_t(1)), static_cast<int64_t>(size.rows)) + kTile - 1) / kTile);
  }

  __device__ uint32_t slot(int at) const { return base + at * size.rows * kSlotRow; }
  // Of a stage: factors, high and then low, a row for each rank; all blocks' parts of what this one owns.
  __device__ uint32_t factors(int stage) const { return stage_at + stage * 8 * kCoefficients; }
  __device__ uint32_t parts(int stage) const { return factors(stage) + 4 * kCoefficients; }
  // Barriers of slots: the panel is there; it is corrected; it has been stored. Of stages: all parts are there; all factors
  // are; they have been used. Of the first and the last there is one for each of those that multiply.
  __device__ uint32_t full(int at) const { return barriers + 8 * at; }
  __device__ uint32_t corrected(int at) const { return full(kMultipliers * kMostSlots + at); }
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

  // This block's rows of U, eight columns at a time, zeros where there are none.
  __device__ void load_basis(int thread, int threads) const {
    const int64_t length = RIGHT ? entry.n : entry.m;
    const int r = entry.r;
    for (int i = thread; i < size.rows * (RANKS / 8); i += threads) {
      const int row = i / (RANKS / 8), column = i % (RANKS / 8) * 8;
      const int to = 2 * (column / kWidth * size.rows * kWidth + swizzled<kWidth>(row, column % kWidth));
      const int64_t at = (first + row) * r + column;
      const bool inside = first + row < length, whole = inside && r % 8 == 0 && column < r;
      float x[8];
      uint32_t pairs[4];
      if constexpr (SPLIT) {
        const auto* from = static_cast<const float*>(entry.basis) + at;
        if (whole) {
          *reinterpret_cast<float4*>(x) = *reinterpret_cast<const float4*>(from);
          *reinterpret_cast<float4*>(x + 4) = *reinterpret_cast<const float4*>(from + 4);
        } else {
          for (int k = 0; k < 8; ++k) x[k] = inside && column + k < r ? from[k] : 0.0f;
        }
        for (int k = 0; k < 4; ++k) pairs[k] = packed(rest_of(x[2 * k]), rest_of(x[2 * k + 1]));
        in<uint4>(low + to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
      } else {
        const auto* from = static_cast<const __nv_bfloat16*>(entry.basis) + at;
        for (int k = 0; k < 8; ++k) x[k] = whole || (inside && column + k < r) ? __bfloat162float(from[k]) : 0.0f;
      }
      for (int k = 0; k < 4; ++k) pairs[k] = packed(x[2 * k], x[2 * k + 1]);
      in<uint4>(high + to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
    show_to_async();
  }

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
    const uint64_t u = operand<kWidth>(high + beside), rest = operand<kWidth>(low + beside);
    begin_products(sums);
    int t = 0;
    // There is a tile, and each is a group of products: the compiler waits for each product of a loop that might not run.
#pragma unroll 1
    do {
      go_on_with_products();
#pragma unroll
      for (int k = 0; k < kTile; k += 16) {
        const uint64_t from = further(g, kTile * t * kSlotRow + (RIGHT ? 2 * k : k * kSlotRow));
        multiply_add<false, RIGHT>(sums, further(u, 2 * (kTile * t + k) * kWidth), from);
        if constexpr (SPLIT) multiply_add<false, RIGHT>(sums, further(rest, 2 * (kTile * t + k) * kWidth), from);
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
    if constexpr (kCopies > WIDE / 8) meet(kMultiplyBarrier + threadIdx.x / kGroup - 1, kGroup);
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
  __device__ void send_factors(int stage, int thread) const {
    const int pieces = size.owned * WIDE / 8, shift = __ffs(pieces) - 1, shares = max(1, kAdders >> shift);
    for (int item = thread; item < pieces * shares; item += kAdders) {
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
        high_parts[k] = packed(x, y), low_parts[k] = packed(rest_of(x), rest_of(y));
      }
      const uint32_t to = factors(stage) + 2 * swizzled<WIDE>(rank, column) - factors_full(stage);
      meet(kAddBarrier, kAdders);
      for (int other = item >> shift; other < size.blocks; other += shares) {
        const uint32_t barrier = address_in(factors_full(stage), other), there = barrier + to;
        send(there, high_parts[0], high_parts[1], high_parts[2], high_parts[3], barrier);
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

  __device__ void correct(int at, int i, int stage, const Lines& lines) const {
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
        sums[4 * j + 2 * k] = __uint_as_float(old[k] << 16);
        sums[4 * j + 2 * k + 1] = __uint_as_float(old[k] & 0xffff0000u);
      }
    }
    hold(sums);
    go_on_with_products();
    const uint64_t c = operand<WIDE>(factors(stage)), c_low = operand<WIDE>(factors(stage) + 2 * kCoefficients);
#pragma unroll
    for (int k = 0; k < RANKS; k += 16) {
      const uint32_t at_rows = 2 * (k / kWidth * size.rows + kTile * i) * kWidth, along = 2 * (k % kWidth);
      const uint64_t u = further(operand<kWidth>(high + at_rows), along);
      multiply_add<true, false>(sums, u, further(c, 2 * k * WIDE));
      multiply_add<true, false>(sums, u, further(c_low, 2 * k * WIDE));
      if constexpr (SPLIT)
        multiply_add<true, false>(sums, further(operand<kWidth>(low + at_rows), along), further(c, 2 * k * WIDE));
    }
    end_products();
    wait_for_products(sums);
#pragma unroll
    for (int j = 0; j < WIDE / 8; j += 2) {
      uint32_t out[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) out[k] = packed(sums[4 * j + 2 * k], sums[4 * j + 2 * k + 1]);
      if constexpr (RIGHT)
        store_four_transposed(begin + lines[j / 2], out);
      else
        store_four(begin + lines[j / 2], out);
    }
  }
};

// `list`: of `entries`, or null, and `one` is meant. `panels`: of all; a cluster takes some in a row, one entry after the
// other.
template <int RANKS, bool SPLIT, bool RIGHT, int WIDE>
__global__ void __launch_bounds__(kThreads, 1)
    project_side(const __grid_constant__ SideEntry one, const SideEntry* list, int64_t panels,
                 const __grid_constant__ Sizes size) {
  // Rows of 128 bytes change their pieces by the address, so arrays begin at multiples of 1024.
  extern __shared__ __align__(1024) unsigned char memory[];
  using Of = Side<RANKS, SPLIT, RIGHT, WIDE>;
  const int own = cluster_rank(), thread = threadIdx.x % kGroup;
  // The same in all lanes, so that a warp has one role and addresses of operands are worked out once for it.
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0), group = warp / 4;
  const int64_t clusters = gridDim.x / size.blocks, cluster = blockIdx.x / size.blocks;
  const int64_t begin = panels * cluster / clusters, end = panels * (cluster + 1) / clusters;
  constexpr uint32_t kExchanged = RANKS * WIDE * 4;
  const Of any(one, size, memory, own);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kMultipliers * size.slots; ++i) make_barrier(any.full(i), 1);
    for (int i = 0; i < size.slots; ++i) {
      make_barrier(any.corrected(i), kCorrectorWarps);
      make_barrier(any.empty(i), 1);
    }
    for (int i = 0; i < size.stages; ++i) {
      make_barrier(any.parts_full(i), 1), expect(any.parts_full(i), kExchanged);
      make_barrier(any.factors_full(i), 1), expect(any.factors_full(i), kExchanged);
    }
    for (int i = 0; i < kMultipliers * size.stages; ++i) make_barrier(any.used(i), kCorrectorWarps);
    show_to_async();
  }
  // Every block of the cluster runs and has its barriers: from here on the others' memory may be written.
  cluster_barrier();

  // Every panel has a slot, a stage, and barriers from `kMultipliers` times as many that say that it is there and that its
  // factors have been used: who does not multiply all panels sees all phases of its own; leaving one out would be taking the
  // one before for the next.
  Turn slot, stage, there, use;
  const int all_there = kMultipliers * size.slots, all_uses = kMultipliers * size.stages;
  int seen = 0;  // panels before, as far as slots and stages go
  const SideEntry* entry = list ? list : &one;
  while (list && entry->first_panel + entry->panels <= begin) ++entry;
  for (int64_t at = begin; at < end; ++entry) {
    const int from = static_cast<int>(at - entry->first_panel);
    const int to = static_cast<int>(min(end - entry->first_panel, entry->panels));
    at = entry->first_panel + to;
    const Of side(*entry, size, memory, own);
    if (warp >= 2) {
      // All have done with the basis before.
      meet(kBasisBarrier, kBasisThreads);
      side.load_basis(threadIdx.x - 64, kBasisThreads);
      meet(kBasisBarrier, kBasisThreads);
    }
    if (list && thread % 32 == 0 && warp < 2) see_map(&entry->map);
    if (threadIdx.x == 0) {
      for (int i = from; i < to; ++i, slot.next(size.slots), there.next(all_there)) {
        if (seen++ >= size.slots) wait_for(side.empty(slot.at), slot.phase ^ 1);
        side.load(slot.at, i, side.full(there.at));
      }
    } else if (threadIdx.x == 32) {
      for (int i = from; i < to; ++i, slot.next(size.slots)) {
        wait_for(side.corrected(slot.at), slot.phase);
        side.store(slot.at, i);
        wait_for_reads<0>();
        arrive(side.empty(slot.at));
      }
    } else if (group == 0 && warp >= 2) {
      // A block sends its part when it has used what the stage had before, so with all parts there all blocks have.
      for (int i = from; i < to; ++i, stage.next(size.stages)) {
        wait_for_others(side.parts_full(stage.at), stage.phase);
        if (thread == 64) expect(side.parts_full(stage.at), kExchanged);
        side.send_factors(stage.at, thread - 64);
      }
    } else if (group >= 1 && group <= kMultipliers) {
      typename Of::Sums sums;
      for (int i = from; i < to;
           ++i, slot.next(size.slots), stage.next(size.stages), there.next(all_there), use.next(all_uses)) {
        const int before = seen++;
        if (before % kMultipliers != group - 1) continue;
        wait_for(side.full(there.at), there.phase);
#pragma unroll
        for (int half = 0; half < Of::kHalves; ++half) {
          side.multiply(slot.at, half, sums);
          // What this stage had before has been used: so all its factors had come, and all owners had read their parts.
          const bool back = use.at >= size.stages;
          const int last = use.at + size.stages * (back ? -1 : kMultipliers - 1);
          if (half == 0 && before >= size.stages) wait_for(side.used(last), use.phase ^ !back);
          side.send_part(stage.at, half, sums, thread);
        }
      }
    } else if (group > kMultipliers) {
      typename Of::Lines lines;
      Of::find_lines(thread, lines);
      for (int i = from; i < to;
           ++i, slot.next(size.slots), stage.next(size.stages), there.next(all_there), use.next(all_uses)) {
        wait_for(side.full(there.at), there.phase);
        wait_for_others(side.factors_full(stage.at), stage.phase);
        show_to_async();  // the stores of others
        if (group == kMultipliers + 1 && thread == 0) expect(side.factors_full(stage.at), kExchanged);
        for (int t = group - kMultipliers - 1; t < side.tiles; t += kCorrectors)
          side.correct(slot.at, t, stage.at, lines);
        __syncwarp();
        if (thread % 32 == 0) arrive(side.used(use.at));
        show_to_async();
        __syncwarp();
        if (thread % 32 == 0) arrive(side.corrected(slot.at));
      }
    }
    __syncwarp();
  }
  // No block ends while others may write its memory.
  cluster_barrier();
}

using Kernel = decltype(&project_side<16, false, false, 32>);

template <bool SPLIT, bool RIGHT, int WIDE>
Kernel kernel_of(int64_t ranks) {
  switch (ranks) {
    case 16: return project_side<16, SPLIT, RIGHT, WIDE>;
    case 32: return project_side<32, SPLIT, RIGHT, WIDE>;
    case 64: return project_side<64, SPLIT, RIGHT, WIDE>;
    default: return SPLIT ? nullptr : project_side<128, false, RIGHT, WIDE>;
  }
}

template <bool SPLIT, bool RIGHT>
Kernel kernel_of(const SidePanels& plan) {
  return plan.width == 16 ? kernel_of<SPLIT, RIGHT, 16>(plan.ranks) : kernel_of<SPLIT, RIGHT, 32>(plan.ranks);
}

Kernel kernel_of(const SidePanels& plan, bool split, bool right) {
  if (right) return split ? kernel_of<true, true>(plan) : kernel_of<false, true>(plan);
  return split ? kernel_of<true, false>(plan) : kernel_of<false, false>(plan);
}

cudaError_t prepare(bool right, bool split, const SidePanels& plan, cudaStream_t stream, ClusterLaunch& launch,
                    Kernel& kernel) {
  kernel = plan.fits ? kernel_of(plan, split, right) : nullptr;
  if (kernel == nullptr) return cudaErrorInvalidValue;
  return launch.prepare(reinterpret_cast<const void*>(kernel), plan, kThreads, stream);
}

cudaError_t project(const SideEntry& one, const SideEntry* list, int64_t panels, bool right, bool split,
                    const SidePanels& plan, cudaStream_t stream) {
  ClusterLaunch launch;
  Kernel kernel;
  if (const cudaError_t error = prepare(right, split, plan, stream, launch, kernel); error != cudaSuccess) return error;
  launch.cover(panels, plan);
  const Sizes size{static_cast<int>(plan.rows), static_cast<int>(plan.cluster), static_cast<int>(plan.owned),
                   static_cast<int>(plan.slots), static_cast<int>(plan.stages),
                   static_cast<int>(box_rows(plan, right))};
  return cudaLaunchKernelEx(&launch.config, kernel, one, list, panels, size);
}

}  // namespace

cudaError_t side_entry(void* grad, const void* basis, int64_t m, int64_t n, int64_t r, bool right, bool keep,
                       const SidePanels& plan, int64_t first_panel, SideEntry& entry) {
  if (!plan.fits) return cudaErrorInvalidValue;
  entry.basis = basis, entry.m = m, entry.n = n, entry.r = static_cast<int>(r), entry.keep = keep;
  entry.first_panel = first_panel, entry.panels = ((right ? m : n) + plan.width - 1) / plan.width;
  return boxes_of(grad, m, n, right, plan, entry.map);
}

cudaError_t side_runs(bool right, bool split, const SidePanels& plan) {
  ClusterLaunch launch;
  Kernel kernel;
  return prepare(right, split, plan, nullptr, launch, kernel);
}

cudaError_t project_side_sm90a(const SideEntry& entry, bool right, bool split, const SidePanels& plan,
                               cudaStream_t stream) {
  return project(entry, nullptr, entry.panels, right, split, plan, stream);
}

cudaError_t project_sides_sm90a(const SideEntry* list, int64_t panels, bool right, bool split, const SidePanels& plan,
                                cudaStream_t stream) {
  return project(SideEntry{}, list, panels, right, split, plan, stream);
}

}  // namespace sculpt

// Small kernels of what csrc/cuda/bulk.h has, and what must be noticed if it is left out.
#include <cuda_bf16.h>

#include "emulated.h"

#include "cuda/bulk.h"
#include "cuda/wgmma.h"

namespace {

using namespace sculpt;

enum Missing { kNothing, kFence, kReads, kThreads, kBarrierFence, kRoom };

struct Boxes {
  int columns, rows, first, across, down, span;  // numbers and rows of a box; boxes from `first` on
  Missing missing;
};

CUtensorMap map_of(void* begin, int64_t columns, int64_t rows, int64_t stride, int box_columns, int box_rows, int span) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  CUtensorMap map;
  const auto swizzle = static_cast<CUtensorMapSwizzle>(span == 0 ? 0 : span == 32 ? 1 : span == 64 ? 2 : 3);
  const CUresult error = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found)(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, begin, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      swizzle, CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS) map.opaque[0] = 0;
  return map;
}

uint32_t begin_of_memory() { return shared_address(emulated::dynamic_memory()); }

// One warp fills two slots, two warps write what is in them, without its swizzle.
void copy_boxes(const CUtensorMap& from, const CUtensorMap* to, Boxes b) {
  const uint32_t memory = begin_of_memory(), barriers = memory + 3 * 8192, bytes = b.columns * b.rows * 2;
  const uint32_t full = barriers, empty = barriers + 16, mask = b.span ? b.span / 16 - 1 : 0;
  if (threadIdx.x == 0) {
    for (uint32_t i = 0; i < 16; i += 8) make_barrier(full + i, 1), make_barrier(empty + i, 64);
    if (b.missing != kBarrierFence) show_to_async();
  }
  __syncthreads();
  for (int i = 0; i < b.across * b.down; ++i) {
    const uint32_t slot = memory + i % 2 * 8192, of_slot = i % 2 * 8, phase = i / 2 % 2;
    const int column = b.first + i % b.across * b.columns, row = b.first + i / b.across * b.rows;
    if (threadIdx.x == 0) {
      if (b.missing != kRoom) wait_for(empty + of_slot, phase ^ 1);
      expect(full + of_slot, bytes);
      load_box(slot, &from, column, row, full + of_slot);
    } else if (threadIdx.x >= 32) {
      wait_for(full + of_slot, phase);
      for (uint32_t at = 16 * (threadIdx.x - 32); at < bytes; at += 16 * 64) {
        uint32_t x[4];
        ptx::load_four(x[0], x[1], x[2], x[3], slot + (at ^ (at >> 7 & mask) << 4));
        for (int j = 0; j < 4; ++j) ptx::store(memory + 2 * 8192 + at + 4 * j, x[j]);
      }
      arrive(empty + of_slot);
      if (b.missing != kFence) show_to_async();
      meet(1, b.missing == kThreads && threadIdx.x >= 64 ? 96 : 64);
      if (threadIdx.x == 32) {
        store_box(to, column, row, memory + 2 * 8192);
        close_stores();
        if (b.missing != kReads) wait_for_reads<0>();
      }
      meet(1, 64);
    }
  }
}

// A (64 x 16) of rows of W along M, `further_bytes` apart, B (16 x 16) of fragments of `b`, as they are or transposed.
template <int W>
void multiply(const CUtensorMap& a, const uint32_t* b, float* out, uint32_t further_bytes, bool transposed) {
  const uint32_t memory = begin_of_memory(), at_b = memory + 4096, barrier = memory + 8192;
  if (threadIdx.x == 0) {
    make_barrier(barrier, 1), show_to_async();
    expect(barrier, 64 * 16 * 2);
    for (int i = 0; i < 64 / W; ++i) load_box(memory + 32 * W * i, &a, W * i, 0, barrier);
  }
  if (threadIdx.x < 32) {
    // Of the blocks, two beside and two below: row of 16 numbers, whose two pieces change places in rows 4 to 7.
    const uint32_t lane = threadIdx.x, row = lane % 8 + lane / 16 * 8, piece = lane / 8 % 2 ^ row / 4 % 2;
    const uint32_t x[4] = {b[lane], b[32 + lane], b[64 + lane], b[96 + lane]};
    if (transposed)
      store_four_transposed(at_b + 32 * row + 16 * piece, x);
    else
      store_four(at_b + 32 * row + 16 * piece, x);
    show_to_async();
  }
  __syncthreads();
  wait_for(barrier, 0);
  float d[8];
  begin_products(d);
  const uint64_t wide = (operand<W>(memory) & ~(uint64_t{0x3fff} << 16)) | uint64_t{further_bytes >> 4} << 16;
  multiply_add<false, false, false>(d, wide, operand<16>(at_b));
  end_products();
  wait_for_products(d);
  for (int i = 0; i < 8; ++i) {
    const int row = 16 * (threadIdx.x / 32) + threadIdx.x % 32 / 4 + i / 2 % 2 * 8;
    out[16 * row + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2] = d[i];
  }
}

}  // namespace

extern "C" int boxes(void* from, int columns, int rows, int stride, void* to, int to_columns, int to_rows, int to_stride,
                     const Boxes* b, unsigned seed) {
  const CUtensorMap source = map_of(from, columns, rows, stride, b->columns, b->rows, b->span);
  const CUtensorMap target = map_of(to, to_columns, to_rows, to_stride, b->columns, b->rows, 0);
  emulated::device.seed = seed;
  emulated::forget(), emulated::allow(&target, sizeof(target), false);
  for (int i = 0; i < rows; ++i) emulated::allow(static_cast<char*>(from) + i * stride, columns * 2, false);
  for (int i = 0; i < to_rows; ++i) emulated::allow(static_cast<char*>(to) + i * to_stride, to_columns * 2, true);
  return emulated::launch(1, 1, 96, 3 * 8192 + 64, copy_boxes, source, &target, *b);
}

extern "C" int product(void* a, const uint32_t* b, float* out, int wide, int further_bytes, int transposed,
                       unsigned seed) {
  const CUtensorMap map = map_of(a, 64, 16, 128, wide, 16, 2 * wide);
  emulated::device.seed = seed;
  emulated::forget(), emulated::allow(a, 2048, false), emulated::allow(b, 512, false), emulated::allow(out, 4096, true);
  const auto kernel = wide == 64 ? multiply<64> : wide == 32 ? multiply<32> : multiply<16>;
  return emulated::launch(1, 1, 128, 8192 + 8, kernel, map, b, out, further_bytes, transposed != 0);
}

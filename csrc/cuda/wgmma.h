// Hopper's asynchronous products of a warpgroup (wgmma, bfloat16 or float16 to float32): D (64 x N) += A (64 x 16) B (16 x N), both
// operands in shared memory. PTX ISA, sections "Asynchronous Warpgroup Level Matrix Instructions" and "Matrix Descriptor".
#pragma once
#include <cuda_bf16.h>

#include <cstdint>

// Architecture 9.0a alone has them: a kernel's body stands between #ifdef SCULPT_SM90A and #endif, so that other
// architectures, for the kernels that have use of them, may be compiled beside it.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SCULPT_SM90A
#elif __CUDA_ARCH__ == 900
#error "wanted architecture 9.0a in place of 9.0 (TORCH_CUDA_ARCH_LIST), which has no wgmma: kernels would do nothing"
#endif

namespace sculpt {

// Whether it was compiled for 9.0a: the empty code of others must not be launched, as that of 8.0+PTX would on Hopper.
inline bool built_for_sm90a() {
#ifdef __CUDA_ARCH_LIST__
  for (int architecture : {__CUDA_ARCH_LIST__})
    if (architecture == 900) return true;
#endif
  return false;
}

// An operand stored by rows of W numbers (16, 32 or 64), `swizzled<W>`, from a multiple of 1024 bytes on; eight rows
// after eight rows. Whether the rows run along K or along the other dimension is said with the product. The two low bits
// of the layout are 1, 2, 3 for rows of 128, 64, 32 bytes. The other stride, for operands wider than a row, is 0: one of 64
// columns whose rows have 16 or 32 has them more than once.
template <int W>
__device__ inline uint64_t operand(uint32_t address) {
  constexpr uint64_t kLayout = W == 64 ? 1 : W == 32 ? 2 : 3, kEightRows = 8 * W * 2;
  return uint64_t((address >> 4) & 0x3fff) | (kEightRows >> 4) << 32 | kLayout << 62;
}

// The same operand `bytes` further: along a row, or whole groups of eight rows.
__device__ inline uint64_t further(uint64_t operand, uint32_t bytes) { return operand + (bytes >> 4); }

// The compiler may neither move what is written to `d` before into the products nor what reads it after: it would wait
// for each product by itself.
template <int N>
__device__ inline void hold(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Registers and shared memory that were written before are seen by the products after.
__device__ inline void go_on_with_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Until `wait_for_products` `d` is a sum of products.
template <int N>
__device__ inline void begin_products(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) d[i] = 0.0f;
  hold(d);
  go_on_with_products();
}

// A group of products ends.
__device__ inline void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int N>
__device__ inline void wait_for_products(float (&d)[N]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  hold(d);
}

// HALF: the operands are float16. The first one in registers: rows as D's, of 16 columns 2 (t % 4) and the next, eight rows
// below, those columns eight further, and there eight rows below, two numbers a register. They stay until
// `wait_for_products`.
template <bool HALF, bool ROWS_B>
__device__ inline void multiply_add(float (&d)[8], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (HALF)
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7}, "
        "{%8, %9, %10, %11}, %12, 1, 1, 1, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ROWS_B ? 0 : 1));
  else
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7}, "
        "{%8, %9, %10, %11}, %12, 1, 1, 1, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ROWS_B ? 0 : 1));
}

template <bool HALF, bool ROWS_B>
__device__ inline void multiply_add(float (&d)[16], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (HALF)
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "{%16, %17, %18, %19}, %20, 1, 1, 1, %21;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ROWS_B ? 0 : 1));
  else
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "{%16, %17, %18, %19}, %20, 1, 1, 1, %21;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ROWS_B ? 0 : 1));
}

// ROWS_A, ROWS_B: whether the operand is stored with rows along K (16 numbers of a row at a time), else K is the number
// of the row. D: thread t has, of rows 16 (t / 32) + t % 32 / 4 and the one eight
// below, columns 8 j + 2 (t % 4) and the next: d[4 j], d[4 j + 1], and below d[4 j + 2], d[4 j + 3].
template <bool HALF, bool ROWS_A, bool ROWS_B>
__device__ inline void multiply_add(float (&d)[8], uint64_t a, uint64_t b) {
  if constexpr (HALF)
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7}, "
        "%8, %9, 1, 1, 1, %10, %11;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
        : "l"(a), "l"(b), "n"(ROWS_A ? 0 : 1), "n"(ROWS_B ? 0 : 1));
  else
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7}, "
        "%8, %9, 1, 1, 1, %10, %11;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
        : "l"(a), "l"(b), "n"(ROWS_A ? 0 : 1), "n"(ROWS_B ? 0 : 1));
}

template <bool HALF, bool ROWS_A, bool ROWS_B>
__device__ inline void multiply_add(float (&d)[16], uint64_t a, uint64_t b) {
  if constexpr (HALF)
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "%16, %17, 1, 1, 1, %18, %19;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
        : "l"(a), "l"(b), "n"(ROWS_A ? 0 : 1), "n"(ROWS_B ? 0 : 1));
  else
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "%16, %17, 1, 1, 1, %18, %19;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
        : "l"(a), "l"(b), "n"(ROWS_A ? 0 : 1), "n"(ROWS_B ? 0 : 1));
}

}  // namespace sculpt

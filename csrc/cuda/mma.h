// Tensor-core products of 16 x 16 by 16 x 8 blocks of bfloat16 (mma.sync.m16n8k16), and how operands come from shared
// memory. Fragment layouts are those of the PTX ISA, section "Matrix Fragments for mma.m16n8k16".
#pragma once
#include <cuda_bf16.h>

#include <cstdint>

namespace sculpt {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// c += a b. c[0], c[1]: row lane / 4, columns 2 (lane % 4) and the next; c[2], c[3]: eight rows below.
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 16 bytes from global to shared memory, not through registers. Both addresses are multiples of 16.
__device__ inline void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ inline void copy_async(void* to, const void* from) { copy_async(shared_address(to), from); }

// Copies since the last call are a group; what is waited for is all of them but the newest `NEWER` groups.
__device__ inline void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int NEWER>
__device__ inline void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(NEWER) : "memory");
}

// Four 8 x 8 blocks, as stored or each transposed: eight lanes in turn give the
// addresses in shared memory of the rows, 16 bytes each, of one block.
__device__ inline void load_four(uint32_t (&x)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
}

__device__ inline void load_four_transposed(uint32_t (&x)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
}

// c += a b for one of the two B fragments that four blocks hold.
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  multiply_add(c, a, b);
}

}  // namespace sculpt

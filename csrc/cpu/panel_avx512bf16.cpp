// The panel kernels for AVX-512 with the bf16 dot product.
#if defined(__x86_64__)
#include "cpu/kernels.h"

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#endif
#define SCULPT_ISA avx512bf16
#define SCULPT_VECTOR_BYTES 64
#define SCULPT_ROWS 8
#define SCULPT_F16C
#define SCULPT_BF16_DOT
#include "cpu/panel.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace sculpt::cpu {
const Kernels kAvx512Bf16{"avx512bf16",
    avx512bf16::plan_one_sided, avx512bf16::pack_one_sided, avx512bf16::panel_one_sided,
    avx512bf16::plan_matmul, avx512bf16::pack_matmul, avx512bf16::panel_matmul};
}  // namespace sculpt::cpu
#endif

// The panel kernels for AVX-512 (F, BW, VL, DQ).
#if defined(__x86_64__)
#include "cpu/kernels.h"

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#endif
#define SCULPT_ISA avx512
#define SCULPT_VECTOR_BYTES 64
#define SCULPT_ROWS 8
#define SCULPT_F16C
#include "cpu/panel.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace sculpt::cpu {
const Kernels kAvx512{"avx512",
    avx512::plan_one_sided, avx512::pack_one_sided, avx512::panel_one_sided,
    avx512::plan_matmul, avx512::pack_matmul, avx512::panel_matmul};
}  // namespace sculpt::cpu
#endif

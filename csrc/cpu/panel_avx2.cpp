// The panel kernels for AVX2 with FMA and F16C.
#if defined(__x86_64__)
#include "cpu/kernels.h"

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define SCULPT_ISA avx2
#define SCULPT_VECTOR_BYTES 32
#define SCULPT_ROWS 4
#define SCULPT_F16C
#include "cpu/panel.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace sculpt::cpu {
const Kernels kAvx2{"avx2",
    avx2::plan_one_sided, avx2::pack_one_sided, avx2::panel_one_sided,
    avx2::plan_matmul, avx2::pack_matmul, avx2::panel_matmul};
}  // namespace sculpt::cpu
#endif

// The panel kernels for any machine: SSE2 on x86-64; meant for NEON on AArch64 too, not yet compiled there.
#include "cpu/kernels.h"

#include <torch/headeronly/util/Half.h>

#define SCULPT_ISA generic
#define SCULPT_VECTOR_BYTES 16
#define SCULPT_ROWS 4
#include "cpu/panel.h"

namespace sculpt::cpu {
const Kernels kGeneric{"generic",
    generic::plan_one_sided, generic::pack_one_sided, generic::panel_one_sided,
    generic::plan_matmul, generic::pack_matmul, generic::panel_matmul};
}  // namespace sculpt::cpu

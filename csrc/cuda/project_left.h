// The launcher of the left projection.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/left_panels.h"

namespace sculpt {

// G -= U (Uᵀ G), with `keep` G = U (Uᵀ G): G bfloat16 (m x n), U (m x r) bfloat16, or float32 if `split`; both contiguous,
// aligned to 16 bytes. `plan` is `left_panels` of these. cudaErrorInvalidValue where it does not fit; G is then as it was.
cudaError_t project_left_sm90a(void* grad, const void* basis, int64_t m, int64_t n, int64_t r, bool split, bool keep,
                               const LeftPanels& plan, cudaStream_t stream);

}  // namespace sculpt

// The launchers of the right projection.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/right_panels.h"

namespace sculpt {

// G -= (G R) Rᵀ, with `keep` G = (G R) Rᵀ: G bfloat16 (m x n), R (n x s) bfloat16, or float32 if `split`; both contiguous,
// aligned to 16 bytes. `plan` is `right_panels` of these shapes; where it does not fit, cudaErrorInvalidValue, and G is as
// it was.
cudaError_t project_right_sm90a(void* grad, const void* basis, int64_t m, int64_t n, int64_t s, bool split, bool keep,
                                const RightPanels& plan, cudaStream_t stream);

}  // namespace sculpt

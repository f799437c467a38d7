// The launcher of the projection of one side.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/side_panels.h"

namespace sculpt {

// G -= U (Uᵀ G), with `right` G -= (G U) Uᵀ, with `keep` what is subtracted there: G bfloat16 (m x n), U (m x r or n x r)
// bfloat16, or float32 if `split`; both contiguous, aligned to 16 bytes. `plan` is `side_panels` of these.
// cudaErrorInvalidValue where it does not fit; G is then as it was.
cudaError_t project_side_sm90a(void* grad, const void* basis, int64_t m, int64_t n, int64_t r, bool right, bool split,
                               bool keep, const SidePanels& plan, cudaStream_t stream);

}  // namespace sculpt

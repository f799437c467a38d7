// The launchers of the two-sided projection.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/both_panels.h"

namespace sculpt {

// L (m x r) and R (n x s), each bfloat16 or float32.
struct BothBases {
  const void *left, *right;
  int64_t r, s;
  bool left_float, right_float;
};

// The current GPU, as `both_panels` asks for it.
cudaError_t both_device(BothDevice* device);

// Whether the build has code for the current device.
bool both_runs();

// G = (I - L Lᵀ) G (I - R Rᵀ), with `block` G -= L Lᵀ G R Rᵀ: G bfloat16 (m x n), all contiguous and aligned to 16 bytes.
// `plan` is `both_panels` of these shapes on the current GPU, `scratch` its bytes, aligned to 256.
cudaError_t project_both(void* grad, const BothBases& bases, int64_t m, int64_t n, bool block, const BothPanels& plan,
                         void* scratch, cudaStream_t stream);

}  // namespace sculpt

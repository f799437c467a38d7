// The launcher that adds steps to the weights of a list.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/philox.h"

namespace sculpt {

// One tensor. weight is bfloat16 if `half`, else float32. low: its further bits, or null. key: of stochastic rounding.
struct AddEntry {
  void* weight;
  int16_t* low;
  const float* step;
  int64_t numel;
  Key key;
  bool half;
};

// weight += step, in float32. A bfloat16 weight takes the sum with its 16 further bits where it has them; otherwise it is
// rounded, stochastically if asked for, with the bits of `_round_stochastic_` at offset 0.
cudaError_t add_steps(const AddEntry* entries, int64_t n, bool stochastic, cudaStream_t stream);

}  // namespace sculpt

// The launcher of AdamW's elementwise work on a list of tensors.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace sculpt {

// One tensor. grad, the moments, out, weight and start are float32, or bfloat16 where their flag is set. weight, low,
// start: may be null.
// count: on the device, goes up by one; null: `count_value`, in which this step is counted already.
struct AdamEntry {
  const void* grad;
  void *first, *second, *out;
  float* count;
  const void* weight;
  const int16_t* low;
  const void* start;
  int64_t numel;
  float count_value;
  bool half_grad, half_moments, half_out, half_weight;
};

struct AdamSettings {
  const void* lr;  // on the device, double if `lr_double`, else float; null: `lr_value`
  double lr_value, beta1, beta2, eps, weight_decay;
  bool lr_double, maximize;
};

// As `_adam_` (csrc/ops.cpp): counts on the device go up by one, moments and steps are written.
cudaError_t adam(const AdamEntry* entries, int64_t n, const AdamSettings& settings, cudaStream_t stream);

// Whether the build has code for the current device.
bool adam_runs();

}  // namespace sculpt

// The launcher of a batch of small SVDs.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace sculpt {

// What shared memory a block of this device needs for q x q matrices; with `both`, the second factor lies there too.
int64_t jacobi_bytes(int q, bool both);

// Whether the build has code for the current device.
bool jacobi_runs();

// Whether the current device's blocks have room for the second factor, and for the first.
struct JacobiRoom {
  cudaError_t error;
  int64_t limit;
  bool both, one;
};
JacobiRoom jacobi_room(int q);

// `batch` contiguous row-major q x q matrices, q >= 1: input = u diag(s) v^T, s descending. `scratch`: batch q^2 floats
// where `both` is false, otherwise unused.
cudaError_t jacobi_svd(const float* input, float* u, float* s, float* v, float* scratch, int64_t batch, int q, bool both,
                       cudaStream_t stream);

}  // namespace sculpt

// Whether the build has code of a kernel for the current device.
#pragma once
#include <cuda_runtime.h>

namespace sculpt {

// `error` as the return value of a launcher tells it. It is cleared: torch's next launch would be blamed.
inline cudaError_t cleared(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

template <class Kernel>
bool has_code(Kernel kernel) {
  cudaFuncAttributes attributes;
  return cleared(cudaFuncGetAttributes(&attributes, kernel)) == cudaSuccess;
}

}  // namespace sculpt

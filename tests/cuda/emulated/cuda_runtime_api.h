// As much of the CUDA runtime as the launchers call, for kernels that run on the CPU.
#pragma once
#include <cstddef>

using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0, cudaErrorInvalidValue = 1;
constexpr int cudaDevAttrMaxSharedMemoryPerBlockOptin = 0, cudaFuncAttributeMaxDynamicSharedMemorySize = 0;

inline int cudaGetDevice(int*) { return cudaSuccess; }
inline int cudaDeviceGetAttribute(int* value, int, int) { return *value = 227 << 10, cudaSuccess; }
template <class Kernel>
int cudaFuncSetAttribute(Kernel, int, int) {
  return cudaSuccess;
}
struct cudaFuncAttributes {};
template <class Kernel>
int cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}
inline int cudaGetLastError() { return cudaSuccess; }

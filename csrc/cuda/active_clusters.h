// How many clusters of a kernel a device holds.
#pragma once
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>

#include "common/side_panels.h"

namespace sculpt {

// Clusters that fit the device at a time; asked once for each kernel, size and device: the question takes longer than a
// launch.
inline cudaError_t active_clusters(const void* kernel, const SidePanels& plan, int device,
                                   const cudaLaunchConfig_t& config, int& clusters) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int64_t, int64_t, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int& found = known[{kernel, plan.cluster, plan.bytes, device}];
  if (found == 0) {
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kSharedBytes));
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&found, kernel, &config);
    if (error != cudaSuccess) return error;
  }
  clusters = found;
  return cudaSuccess;
}

}  // namespace sculpt

// Launches of kernels whose blocks come in clusters.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "common/side_panels.h"
#include "cuda/runs.h"

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
    if (error != cudaSuccess) return cleared(error);
  }
  clusters = found;
  return cudaSuccess;
}

// It stays where it is: `config` points into it.
struct ClusterLaunch {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  int clusters = 0;  // at a time

  ClusterLaunch() = default;
  ClusterLaunch(const ClusterLaunch&) = delete;
  ClusterLaunch& operator=(const ClusterLaunch&) = delete;

  // On the current device; cudaErrorInvalidConfiguration where its GPCs are cut smaller than the cluster.
  cudaError_t prepare(const void* kernel, const SidePanels& plan, int threads, cudaStream_t stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(plan.cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(static_cast<unsigned>(plan.cluster));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(plan.bytes);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = active_clusters(kernel, plan, device, config, clusters);
    return error == cudaSuccess && clusters < 1 ? cudaErrorInvalidConfiguration : error;
  }

  // As many clusters as are of use for so many panels.
  void cover(int64_t panels, const SidePanels& plan) {
    config.gridDim = dim3(static_cast<unsigned>(plan.cluster * std::min<int64_t>(panels, clusters)));
  }
};

}  // namespace sculpt

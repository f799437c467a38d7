// The CUDA that kernels see on an emulated GPU; their inline PTX is calls of namespace ptx (tests/cuda/emulated_gpu.py).
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <tuple>

inline dim3 gridDim;

namespace emulated {

struct Device {
  int multiprocessors = 132, capability = 9, clusters = 1 << 20;
  unsigned seed = 0;
};
extern Device device;

dim3 thread_index();
dim3 block_index();
int rank_in_cluster();
int blocks_in_cluster();
unsigned char* dynamic_memory();
unsigned char* fixed_memory(size_t bytes);
uint32_t shared_address(const void* pointer);
void meet_block();
void meet_warp();
uint32_t exchange(uint32_t value, int lane, int width);

// Memory that kernels may touch, beside their stacks and shared memory.
void allow(const void* begin, size_t bytes, bool writable);
void forget(size_t newest);

// What a thread did wrong, if one did.
extern std::string wrong;
void run(dim3 grid, int cluster, unsigned threads, size_t bytes, void (*kernel)(void*), void* arguments);

template <typename... Parameters, typename... Arguments>
cudaError_t launch(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  if (config->dynamicSmemBytes > 227 * 1024) return cudaErrorInvalidConfiguration;
  const int size = config->numAttrs ? static_cast<int>(config->attrs[0].val.clusterDim.x) : 1;
  using Call = std::tuple<void (*)(Parameters...), Parameters...>;
  Call call(kernel, static_cast<Parameters>(arguments)...);
  gridDim = config->gridDim;
  allow(&call, sizeof(call), false), allow(&gridDim, sizeof(gridDim), false);
  const auto kernel_of = [](void* given) {
    std::apply([](auto f, auto... x) { f(x...); }, *static_cast<const Call*>(given));
  };
  run(config->gridDim, size, config->blockDim.x, config->dynamicSmemBytes, kernel_of, &call);
  forget(2);
  return wrong.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

// The number of multiprocessors is the name of the device: launchers remember what they asked of it.
inline cudaError_t get_device(int* index) { return *index = device.multiprocessors * 1024 + device.clusters % 1024, cudaSuccess; }
inline cudaError_t attribute(int* value, cudaDeviceAttr name, int) {
  *value = name == cudaDevAttrMultiProcessorCount            ? device.multiprocessors
           : name == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 227 * 1024
                                                             : device.capability;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t set(Kernel*, cudaFuncAttribute, int) { return cudaSuccess; }
template <typename Kernel>
cudaError_t clusters(int* count, Kernel*, const cudaLaunchConfig_t* config) {
  const int size = static_cast<int>(config->attrs[0].val.clusterDim.x);
  return *count = std::max(1, std::min(device.clusters, device.multiprocessors / size)), cudaSuccess;
}

}  // namespace emulated

namespace ptx {

void load(uint32_t& x, uint32_t address);
void load_four(uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w, uint32_t address);
void load_four(float& x, float& y, float& z, float& w, uint32_t address);
void store(uint32_t address, uint32_t x);
void map(uint32_t& there, uint32_t address, uint32_t rank);
void store_async(uint32_t address, uint32_t x, uint32_t y, uint32_t barrier);
void store_async(uint32_t address, float x, float y, uint32_t barrier);
void make_barrier(uint32_t barrier);
void expect(uint32_t barrier, uint32_t bytes);
void wait(uint32_t barrier, uint32_t parity);
void cluster_barrier();
void copy_async(uint32_t to, const void* from);
void close_copies();
void wait_for_copies(int newer);
void matrices(uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w, uint32_t row);
void matrices_transposed(uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w, uint32_t row);
void multiply(float& c0, float& c1, float& c2, float& c3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
              uint32_t b0, uint32_t b1);
void fence_products();
void close_products();
void wait_for_products();
void fence_proxy();
void product(std::initializer_list<float*> d, uint64_t a, uint64_t b, int a_across, int b_across);
template <typename... X>
void nothing(X&&...) {}

}  // namespace ptx

namespace cooperative_groups {
struct Emulated {
  unsigned num_blocks() const { return emulated::blocks_in_cluster(); }
  unsigned block_rank() const { return emulated::rank_in_cluster(); }
};
inline Emulated this_cluster() { return {}; }
}  // namespace cooperative_groups

#undef __launch_bounds__
#define __launch_bounds__(...)
#define threadIdx (::emulated::thread_index())
#define blockIdx (::emulated::block_index())
#define __syncthreads() ::emulated::meet_block()
#define __syncwarp() ::emulated::meet_warp()
#define __cvta_generic_to_shared(pointer) ::emulated::shared_address(pointer)
#define cudaLaunchKernelEx ::emulated::launch
#define cudaGetDevice ::emulated::get_device
#define cudaDeviceGetAttribute ::emulated::attribute
#define cudaFuncSetAttribute ::emulated::set
#define cudaOccupancyMaxActiveClusters ::emulated::clusters

inline uint32_t __shfl_sync(unsigned, uint32_t x, int lane, int width = 32) { return emulated::exchange(x, lane, width); }
inline int __shfl_sync(unsigned, int x, int lane, int width = 32) {
  return static_cast<int>(emulated::exchange(static_cast<uint32_t>(x), lane, width));
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __uint_as_float(uint32_t x) {
  float y;
  __builtin_memcpy(&y, &x, 4);
  return y;
}
// Byte i of the result is byte (selector >> 4 i) & 7 of x and y beside each other.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
namespace sculpt {
using std::max;
using std::min;
}  // namespace sculpt

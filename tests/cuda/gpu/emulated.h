// The CUDA that kernels see on an emulated GPU; their inline PTX is calls of namespace ptx (tests/cuda/emulated_gpu.py).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string>
#include <tuple>

#include "common/bits.h"
#include "cuda_runtime_api.h"

inline dim3 gridDim, blockDim;

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
void meet_warp();
// The sum of what all threads of the block bring; `kind` must be the same.
int meet_block(int value, int kind);
uint32_t exchange(uint32_t value, int from);

// Memory that kernels may touch, beside their arguments, stacks and shared memory, until the next `forget`.
void allow(const void* begin, size_t bytes, bool writable);
void forget();

struct Launch {
  dim3 grid;
  int cluster = 1;
  unsigned threads = 0;
  size_t bytes = 0;
  void (*kernel)(void*) = nullptr;
  void* arguments = nullptr;
  size_t arguments_bytes = 0;
};
// What a thread did wrong, if one did.
extern std::string wrong;
void run(const Launch& launch);

template <typename... Parameters, typename... Arguments>
cudaError_t launch(dim3 grid, int cluster, unsigned threads, size_t bytes, void (*kernel)(Parameters...),
                   const Arguments&... arguments) {
  if (bytes > 227 * 1024) return cudaErrorInvalidConfiguration;
  using Call = std::tuple<void (*)(Parameters...), std::decay_t<Parameters>...>;
  Call call(kernel, static_cast<std::decay_t<Parameters>>(arguments)...);
  const auto kernel_of = [](void* given) {
    std::apply([](auto f, const auto&... x) { f(x...); }, *static_cast<const Call*>(given));
  };
  run({grid, cluster, threads, bytes, kernel_of, &call, sizeof(call)});
  return wrong.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emulated

namespace ptx {

void load(uint32_t& x, uint32_t address);
void load_four(uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w, uint32_t address);
void load_four(float& x, float& y, float& z, float& w, uint32_t address);
void store(uint32_t address, uint32_t x);
void map(uint32_t& there, uint32_t address, uint32_t rank);
void store_async(uint32_t address, uint32_t x, uint32_t y, uint32_t z, uint32_t w, uint32_t barrier);

void make_barrier(uint32_t barrier, uint32_t count);
void arrive(uint32_t barrier);
void expect(uint32_t barrier, uint32_t bytes);
void wait(uint32_t barrier, uint32_t parity);
void cluster_barrier();
void meet_some(int id, int threads);
void copy_async(uint32_t to, const void* from);
void close_copies();
void wait_for_copies(int newer);
void matrices(uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w, uint32_t row);
void matrices_transposed(uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w, uint32_t row);
void store_four(uint32_t row, uint32_t x, uint32_t y, uint32_t z, uint32_t w);
void store_four_transposed(uint32_t row, uint32_t x, uint32_t y, uint32_t z, uint32_t w);
void multiply(float& c0, float& c1, float& c2, float& c3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
              uint32_t b0, uint32_t b1);
void fence_products();
void close_products();
void wait_for_products();
void fence_proxy();
void product(std::initializer_list<float*> d, bool half, uint64_t a, uint64_t b, int a_across, int b_across);
void held_product(std::initializer_list<float*> d, bool half, std::initializer_list<const uint32_t*> a, uint64_t b,
                  int b_across);
void load_box(uint32_t to, const void* map, int column, int row, uint32_t barrier);
void store_box(const void* map, int column, int row, uint32_t from);
inline void see_map(const void*) {}
void close_stores();
void wait_for_reads(int newer);
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

#define __device__
#define __global__
#define __launch_bounds__(...)
#define threadIdx (::emulated::thread_index())
#define blockIdx (::emulated::block_index())

using std::isfinite;
inline void __syncthreads() { emulated::meet_block(0, 0); }
inline int __syncthreads_or(int value) { return emulated::meet_block(value != 0, 1) != 0; }
inline int __syncthreads_count(int value) { return emulated::meet_block(value != 0, 2); }
inline void __syncwarp() { emulated::meet_warp(); }
inline uint32_t __cvta_generic_to_shared(const void* pointer) { return emulated::shared_address(pointer); }

template <typename T>
T exchanged(T x, int from) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = emulated::exchange(bits, from);
  std::memcpy(&x, &bits, 4);
  return x;
}
template <typename T>
T __shfl_sync(unsigned, T x, int lane, int width = 32) {
  const int mine = static_cast<int>(threadIdx.x) % 32;
  return exchanged(x, mine / width * width + lane % width);
}
template <typename T>
T __shfl_xor_sync(unsigned, T x, int mask) { return exchanged(x, static_cast<int>(threadIdx.x) % 32 ^ mask); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline uint32_t __float_as_uint(float x) { return sculpt::bits_of(x); }
inline float __uint_as_float(uint32_t x) { return sculpt::float_of(x); }
// Byte i of the result is byte (selector >> 4 i) & 7 of x and y beside each other.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
using std::max;
using std::min;

// The number of multiprocessors is the name of the device: launchers remember what they asked of it.
inline cudaError_t cudaGetDevice(int* index) {
  return *index = emulated::device.multiprocessors * 1024 + emulated::device.clusters % 1024, cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  *value = name == cudaDevAttrMultiProcessorCount            ? emulated::device.multiprocessors
           : name == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 227 * 1024
                                                             : emulated::device.capability;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) { return cudaSuccess; }
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) { return cudaSuccess; }
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned version, unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* result = nullptr);
inline cudaError_t cudaGetLastError() { return emulated::wrong.empty() ? cudaSuccess : cudaErrorLaunchFailure; }
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, Kernel*, const cudaLaunchConfig_t* config) {
  const int size = static_cast<int>(config->attrs[0].val.clusterDim.x);
  return *count = std::max(1, std::min(emulated::device.clusters, emulated::device.multiprocessors / size)), cudaSuccess;
}
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const int size = config->numAttrs ? static_cast<int>(config->attrs[0].val.clusterDim.x) : 1;
  return emulated::launch(config->gridDim, size, config->blockDim.x, config->dynamicSmemBytes, kernel, arguments...);
}

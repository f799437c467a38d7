// SVD of a batch of small float32 matrices by one-sided Jacobi rotations (common/jacobi.h), one block a matrix.
//
// Moves 12 q^2 bytes of a matrix to and from memory; everything else happens in shared memory: the matrix and the second
// factor, 8 q (q + 1) bytes, 204 KB at q = 160. A sweep reads the first once for each of its q - 1 rounds, and reads and
// writes both where columns are turned: up to 16 q^3 bytes, 3200 clocks of shared memory a round at q = 160, which bounds
// the kernel; 3 to 11 q^3 operations. Calculated from that alone for 224 matrices on an H100, eight sweeps that turn:
// 3.5 ms at q = 144, where a multiprocessor has one block, 0.6 ms at q = 80, where it has two.
//
// Where a block may not have that much (163 KB on sm_80: from q = 144 on) the second factor lies in global memory, for
// all matrices together 23 MB at most that stay in L2: rotations touch it less often than the matrix, and the
// alternatives lose accuracy (V from A^T U diag(1/S) has no digits left for small singular values) or half the sizes.
//
// A warp has a pair of columns, its lanes the rows; sums go through shuffles in one fixed order and there are no atomics:
// the same to the bit every time. Nothing is read back by the host, so that a CUDA graph can hold it: the sweeps end on
// the device. Tests passed on an H200, but for the second factor in global memory, which has run on the CPU alone, one
// thread after the other (tests/cuda/test_jacobi_emulated.py).
#include "cuda/jacobi.h"

#include <cuda_runtime.h>

#include "common/jacobi.h"
#include "cuda/column.h"
#include "cuda/runs.h"

namespace sculpt {
namespace {

// Up to q = 96 two blocks share a multiprocessor, 48 registers a thread; above, one has it, 72 registers.
constexpr int kMaxWarps = 27;
constexpr int max_blocks(int chunks) { return chunks <= 3 ? 2 : 1; }
constexpr int max_warps(int chunks) { return chunks <= 3 ? 20 : kMaxWarps; }

// One matrix in the hands of a block.
template <int CHUNKS>
struct Block {
  float *left, *right;  // column after column: the matrix, then R^T, then Y; Q, then Q W
  float *values, *extra;
  int *pivots, *order;
  int q, pitch, right_pitch;

  __device__ int lane() const { return static_cast<int>(threadIdx.x) % 32; }
  __device__ int warp() const { return static_cast<int>(threadIdx.x) / 32; }
  __device__ int warps() const { return static_cast<int>(blockDim.x) / 32; }
  __device__ float* a(int column) const { return left + column * pitch; }
  __device__ float* b(int column) const { return right + column * right_pitch; }

  // Scaled by a power of two, with the squared norms of its columns in `values`. False for NaN or Inf.
  __device__ bool load(const float* from, int& exponent) const {
    float largest = 0.0f;
    bool bad = false;
    for (int row = warp(); row < q; row += warps())
      for (int column = lane(); column < q; column += 32) {
        const float x = from[row * q + column];
        bad |= !isfinite(x);
        largest = fmaxf(largest, fabsf(x));
        a(column)[row] = x;
      }
    int unused = 0;
    best_of(largest, unused);
    if (lane() == 0) extra[warp()] = largest;
    if (__syncthreads_or(bad)) return false;
    largest = lane() < warps() ? extra[lane()] : 0.0f;
    best_of(largest, unused);
    exponent = jacobi_exponent(largest);
    for (int j = warp(); j < q; j += warps()) {
      Column<CHUNKS> x;
      x.load(a(j), lane(), q);
#pragma unroll
      for (int i = 0; i < CHUNKS; ++i) x.x[i] = ldexpf(x.x[i], -exponent);
      x.store(a(j), lane(), q);
      const float square = x.square_from(0, lane());
      if (lane() == 0) values[j] = square;
    }
    __syncthreads();
    for (int j = threadIdx.x; j < q; j += blockDim.x) pivots[j] = j, extra[j] = 0.0f;
    __syncthreads();
    return true;
  }

  // R in the upper triangle, reflectors below, their tau in `extra`. Where nothing is left, R's other rows become zero.
  __device__ void factor() const {
    for (int k = 0; k < q; ++k) {
      float square = -1.0f;
      int pivot = k;
      for (int j = k + lane(); j < q; j += 32)
        if (values[j] > square) square = values[j], pivot = j;
      best_of(square, pivot);
      if (square < kJacobiZero) {  // the same in every thread
        for (int j = k + warp(); j < q; j += warps())
          for (int i = k + lane(); i < q; i += 32) a(j)[i] = 0.0f;
        break;
      }
      Column<CHUNKS> v, first;
      v.load(a(pivot), lane(), q);
      first.load(a(k), lane(), q);
      const JacobiReflector h = jacobi_reflector(a(pivot)[k], square);
      __syncthreads();  // everyone has read the norms and both columns
      if (warp() == 0) {
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) {
          const int row = 32 * i + lane();
          if (row < q) a(k)[row] = row < k ? v.x[i] : row == k ? h.value : v.x[i] * h.inverse;
        }
        if (lane() == 0) {
          extra[k] = h.tau;
          const int there = pivots[k];
          pivots[k] = pivots[pivot];
          pivots[pivot] = there;
        }
      }
#pragma unroll
      for (int i = 0; i < CHUNKS; ++i) v.x[i] *= h.inverse;
      v.from_row(k, 1.0f, lane());
      for (int j = k + 1 + warp(); j < q; j += warps()) {
        Column<CHUNKS> x;
        if (j == pivot)
          x = first;  // what was in the pivot's place
        else
          x.load(a(j), lane(), q);
        x.subtract(h.tau * sum_of(v.dot(x)), v);
        x.store(a(j), lane(), q);
        const float rest = x.square_from(k + 1, lane());
        if (lane() == 0) values[j] = rest;
      }
      __syncthreads();
    }
    __syncthreads();
  }

  // Q = H_0 H_1 ... a column a warp, in registers; then R becomes R^T.
  __device__ void form_q_and_transpose() const {
    for (int j = warp(); j < q; j += warps()) {
      Column<CHUNKS> x;
#pragma unroll
      for (int i = 0; i < CHUNKS; ++i) x.x[i] = 32 * i + lane() == j ? 1.0f : 0.0f;
      for (int k = j; k >= 0; --k) {
        const float tau = extra[k];
        if (tau == 0.0f) continue;
        Column<CHUNKS> v;
        v.load(a(k), lane(), q);
        v.from_row(k, 1.0f, lane());
        x.subtract(tau * sum_of(v.dot(x)), v);
      }
      x.store(b(j), lane(), q);
    }
    __syncthreads();
    for (int k = warp(); k < q; k += warps())
      for (int j = k + 1 + lane(); j < q; j += 32) {
        a(k)[j] = a(j)[k];
        a(j)[k] = 0.0f;
      }
    __syncthreads();
  }

  __device__ void rotate() const {
    const float tolerance = jacobi_tolerance(q);
    const int rounds = jacobi_rounds(q), pairs = jacobi_pairs(q);
    for (int sweep = 0; sweep < kJacobiSweeps; ++sweep) {
      bool turned = false;
      for (int round = 0; round < rounds; ++round) {
        for (int k = warp(); k < pairs; k += warps()) {
          const JacobiPair pair = jacobi_pair(q, round, k);
          if (pair.high >= q) continue;
          Column<CHUNKS> x, y;
          x.load(a(pair.low), lane(), q);
          y.load(a(pair.high), lane(), q);
          const float alpha = sum_of(x.dot(x)), beta = sum_of(y.dot(y)), gamma = sum_of(x.dot(y));
          const JacobiRotation turn = jacobi_rotation(alpha, beta, gamma, tolerance);
          if (!turn.turns) continue;
          turned = true;
#pragma unroll
          for (int i = 0; i < CHUNKS; ++i) jacobi_turn(x.x[i], y.x[i], turn);
          x.store(a(pair.low), lane(), q);
          y.store(a(pair.high), lane(), q);
          x.load(b(pair.low), lane(), q);
          y.load(b(pair.high), lane(), q);
#pragma unroll
          for (int i = 0; i < CHUNKS; ++i) jacobi_turn(x.x[i], y.x[i], turn);
          x.store(b(pair.low), lane(), q);
          y.store(b(pair.high), lane(), q);
        }
        __syncthreads();
      }
      if (!__syncthreads_or(turned)) return;
    }
  }

  // Unit columns, singular values in `values`, and the columns' order; returns how many values are not zero. A rotation
  // that is not quite one stretches both factors alike: the ratio of the norms is free of it.
  __device__ int normalize() const {
    for (int j = warp(); j < q; j += warps()) {
      Column<CHUNKS> x, y;
      x.load(a(j), lane(), q);
      y.load(b(j), lane(), q);
      const float square = sum_of(x.dot(x)), size = sqrtf(sum_of(y.dot(y))), root = sqrtf(square);
      const bool some = square >= kJacobiZero;
#pragma unroll
      for (int i = 0; i < CHUNKS; ++i) x.x[i] = some ? x.x[i] / root : 0.0f;
      y.divide(size);
      x.store(a(j), lane(), q);
      y.store(b(j), lane(), q);
      if (lane() == 0) values[j] = some ? root / size : 0.0f;
    }
    __syncthreads();
    bool mine = false;
    if (const int j = threadIdx.x; j < q) {  // a block has a thread for every column
      const float value = values[j];
      mine = value > 0.0f;
      int before = 0;
      for (int i = 0; i < q; ++i) before += values[i] > value || (values[i] == value && i < j);
      order[before] = j;
    }
    return __syncthreads_count(mine);
  }

  // Columns of zeros become orthogonal to all others: the unit vector that has least in common with those, without its
  // part in them, taken off twice. At least (q - column) / q of its square is left.
  __device__ void complete(int first) const {
    for (int column = first; column < q; ++column) {
      for (int i = threadIdx.x; i < q; i += blockDim.x) {
        float sum = 0.0f;
        for (int t = 0; t < column; ++t) sum = fmaf(a(order[t])[i], a(order[t])[i], sum);
        extra[i] = -sum;
      }
      __syncthreads();
      float least = -3e38f;
      int best = 0;
      for (int i = lane(); i < q; i += 32)
        if (extra[i] > least) least = extra[i], best = i;
      best_of(least, best);
      float* x = a(order[column]);
      __syncthreads();  // everyone has read `extra`
      if (threadIdx.x == 0) x[best] = 1.0f;
      for (int twice = 0; twice < 2; ++twice) {
        __syncthreads();
        Column<CHUNKS> whole, other;
        whole.load(x, lane(), q);
        for (int t = warp(); t < column; t += warps()) {
          other.load(a(order[t]), lane(), q);
          const float part = sum_of(whole.dot(other));
          if (lane() == 0) extra[t] = part;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < q; i += blockDim.x) {
          float value = x[i];
          for (int t = 0; t < column; ++t) value = fmaf(-extra[t], a(order[t])[i], value);
          x[i] = value;
        }
      }
      __syncthreads();
      if (warp() == 0) {
        Column<CHUNKS> whole;
        whole.load(x, lane(), q);
        whole.divide(sqrtf(sum_of(whole.dot(whole))));
        whole.store(x, lane(), q);
      }
      __syncthreads();
    }
  }

  __device__ void write(float* u, float* s, float* v, int exponent) const {
    for (int r = threadIdx.x; r < q; r += blockDim.x) s[r] = ldexpf(values[order[r]], exponent);
    for (int i = warp(); i < q; i += warps())
#pragma unroll 1  // unrolled, it spills on sm_100a
      for (int r = lane(); r < q; r += 32) {
        u[i * q + r] = b(order[r])[i];
        v[pivots[i] * q + r] = a(order[r])[i];
      }
  }
};

__device__ void fill(float* to, int count, float value) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = value;
}

// BOTH: the second factor lies in shared memory, with an odd pitch: rows are written to it without bank conflicts.
template <int CHUNKS, bool BOTH>
__global__ void __launch_bounds__(32 * max_warps(CHUNKS), max_blocks(CHUNKS))
    jacobi(const float* __restrict__ input, float* __restrict__ u, float* __restrict__ s, float* __restrict__ v,
           float* __restrict__ scratch, int q) {
  extern __shared__ float memory[];
  const int64_t at = blockIdx.x, area = static_cast<int64_t>(q) * q;
  Block<CHUNKS> block;
  block.q = q;
  block.pitch = q | 1;
  block.right_pitch = BOTH ? q | 1 : q;
  block.left = memory;
  float* end = memory + q * block.pitch;
  if constexpr (BOTH) {
    block.right = end;
    end += q * block.right_pitch;
  } else {
    block.right = scratch + at * area;
  }
  block.values = end;
  block.extra = block.values + q;
  block.pivots = reinterpret_cast<int*>(block.extra + (q < kMaxWarps ? kMaxWarps : q));
  block.order = block.pivots + q;

  u += at * area;
  v += at * area;
  s += at * q;
  int exponent = 0;
  if (!block.load(input + at * area, exponent)) {
    const float nan = float_of(0x7fc00000u);
    fill(u, q * q, nan);
    fill(s, q, nan);
    fill(v, q * q, nan);
    return;
  }
  block.factor();
  block.form_q_and_transpose();
  block.rotate();
  block.complete(block.normalize());
  block.write(u, s, v, exponent);
}

using Kernel = void (*)(const float*, float*, float*, float*, float*, int);

template <bool BOTH>
Kernel kernel_of(int q) {
  switch ((q + 31) / 32) {
    case 1: return jacobi<1, BOTH>;
    case 2: return jacobi<2, BOTH>;
    case 3: return jacobi<3, BOTH>;
    case 4: return jacobi<4, BOTH>;
    default: return jacobi<5, BOTH>;
  }
}

// As many as share the pairs of a round evenly, and threads for every column.
int warps_of(int q) {
  const int pairs = jacobi_pairs(q), chunks = (q + 31) / 32, most = max_warps(chunks);
  const int each = (pairs + most - 1) / most, warps = (pairs + each - 1) / each;
  return warps < chunks ? chunks : warps;
}

}  // namespace

int64_t jacobi_bytes(int q, bool both) {
  const int64_t floats = (both ? 2 : 1) * static_cast<int64_t>(q) * (q | 1) + 3 * q + (q < kMaxWarps ? kMaxWarps : q);
  return 4 * floats;
}

bool jacobi_runs() { return has_code(kernel_of<true>(kJacobiMaxSize)); }

JacobiRoom jacobi_room(int q) {
  int device = 0, bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return {error, bytes, jacobi_bytes(q, true) <= bytes, jacobi_bytes(q, false) <= bytes};
}

cudaError_t jacobi_svd(const float* input, float* u, float* s, float* v, float* scratch, int64_t batch, int q, bool both,
                       cudaStream_t stream) {
  if (q < 1 || q > kJacobiMaxSize || batch < 1 || batch > 0x7fffffff) return cudaErrorInvalidValue;
  const Kernel kernel = both ? kernel_of<true>(q) : kernel_of<false>(q);
  const int bytes = static_cast<int>(jacobi_bytes(q, both));
  const cudaError_t error =
      cleared(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(batch), 32 * warps_of(q), static_cast<size_t>(bytes), stream>>>(input, u, s, v, scratch,
                                                                                              q);
  return cudaGetLastError();
}

}  // namespace sculpt

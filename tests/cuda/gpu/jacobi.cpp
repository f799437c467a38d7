// The launcher of the Jacobi SVD, run on an emulated GPU.
#include "cuda/jacobi.inc"

extern "C" int jacobi(const float* input, float* u, float* s, float* v, float* scratch, int64_t batch, int q, int both,
                      unsigned seed) {
  emulated::device.seed = seed;
  const size_t square = static_cast<size_t>(batch) * q * q * 4;
  emulated::forget();
  emulated::allow(input, square, false), emulated::allow(scratch, square, true);
  emulated::allow(u, square, true), emulated::allow(v, square, true), emulated::allow(s, square / q, true);
  return sculpt::jacobi_svd(input, u, s, v, scratch, batch, q, both, nullptr);
}

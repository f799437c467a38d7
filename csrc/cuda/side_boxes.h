// How a matrix is copied in boxes of a panel, as the copy engine's maps say it.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/side_panels.h"

namespace sculpt {

// Of a panel's length: right, as many columns as the hardware's rows of 128 bytes have; left, up to 256 rows.
inline int64_t box_rows(const SidePanels& plan, bool right) {
  int64_t tiles = right ? 1 : 4;
  while (plan.rows / kTile % tiles) --tiles;
  return kTile * tiles;
}

// The driver's function, found without linking its library.
inline cudaError_t boxes_of(void* grad, int64_t m, int64_t n, bool right, const SidePanels& plan, CUtensorMap& map) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                              const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static void* const found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? function : nullptr;
  }();
  if (found == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(n), static_cast<cuuint64_t>(m)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(n) * 2};
  const cuuint32_t wide = static_cast<cuuint32_t>(plan.width), along = static_cast<cuuint32_t>(box_rows(plan, right));
  const cuuint32_t box[] = {right ? along : wide, right ? wide : along}, steps[] = {1, 1};
  const CUtensorMapSwizzle swizzle = right ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : plan.width == 32 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_32B;
  // Copied as bits: of float16 as well. Lines of 128 bytes are fetched whole, of which a panel on the left has a half or a quarter and the next ones the rest:
  // without that copying in such panels took 1.3 times as long on an H200.
  const CUresult error = reinterpret_cast<Encode>(found)(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, grad, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return error == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace sculpt

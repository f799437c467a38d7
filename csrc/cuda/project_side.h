// The launchers of the projection of one side.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/side_panels.h"

namespace sculpt {

// A matrix of a list: what its boxes are, and how many panels it has.
struct SideEntry {
  CUtensorMap map;
  const void* basis;
  const float* metric;  // of BasisForm::kMetric
  int64_t m, n;
  int r, panels;
  bool keep;
};
// As much as `sculpt_ops/ops/side_lists.py` makes room for; CUDA 12 and 13 align the boxes differently.
static_assert(sizeof(SideEntry) <= 256);

// The entry of a matrix G, 16 bit (m x n), with U (m x r or n x r) of the plan's form and M (r x r, or null); G and U
// contiguous and aligned to 16 bytes, n a multiple of 8. cudaErrorInvalidValue where `plan`, which is `side_panels` of these,
// does not fit.
cudaError_t side_entry(void* grad, const void* basis, const float* metric, int64_t m, int64_t n, int64_t r, bool right,
                       bool keep, const SidePanels& plan, SideEntry& entry);

// Whether the current device runs what has such a plan: asked before the first of two sides is written.
cudaError_t side_runs(bool right, BasisForm form, const SidePanels& plan);

// G -= U M (Uᵀ G), with `right` G -= (G U) M Uᵀ, with an entry's `keep` what is subtracted there.
cudaError_t project_side_sm90a(const SideEntry& entry, bool right, BasisForm form, const SidePanels& plan,
                               cudaStream_t stream);

// A list in the device's memory, of matrices that have the same `plan` but for their sizes (`rows` as large as the largest
// wants), in one launch; `panels` are those of all.
cudaError_t project_sides_sm90a(const SideEntry* list, int64_t panels, bool right, BasisForm form, const SidePanels& plan,
                                cudaStream_t stream);

}  // namespace sculpt

// masked_patch_mse: M predicted patches, P values a patch, N clean patches.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"

namespace moca {

struct MaskedPatchMseParams {
  const void* pred;      // (M, P) pred_dtype
  const void* patches;   // (N, P) patches_dtype
  const int64_t* index;  // (M,) rows of patches
  float* row_loss;       // (M,) forward: mean over P of the squared error
  const float* d_loss;   // () backward: gradient of the mean over M of row_loss
  void* d_pred;          // (M, P) backward: pred_dtype
  int64_t rows, row_size, num_patches;
  DType pred_dtype, patches_dtype;
  bool normalize;
  int threads;
};

}  // namespace moca

MOCA_KERNEL(masked_patch_mse_forward, MaskedPatchMseParams)
MOCA_KERNEL(masked_patch_mse_backward, MaskedPatchMseParams)

// masked_patch_mse: M predicted patches, P values a patch, N clean patches.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "common/queue.h"

namespace moca {

constexpr double kEpsilon = 1e-6;  // on the variance, as in the MAE paper's released code

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
  int threads;  // of the CPU
};

// On a GPU. An entry of index outside of patches makes its row NaN: it is not read back to be
// refused.
void masked_patch_mse_forward_cuda(const MaskedPatchMseParams& p, Queue queue);
void masked_patch_mse_backward_cuda(const MaskedPatchMseParams& p, Queue queue);

}  // namespace moca

MOCA_KERNEL(masked_patch_mse_forward, MaskedPatchMseParams)
MOCA_KERNEL(masked_patch_mse_backward, MaskedPatchMseParams)

// patchify: an image of H x W pixels; N patches of P values.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"

namespace moca {

struct PatchifyParams {
  const uint8_t* image;  // (H, W, 3), any strides
  void* patches;         // (N, P) dtype
  int64_t height, width;
  int64_t row_stride, column_stride, channel_stride;  // of image, in bytes
  int64_t patch, merge, frames;  // pixels, patches along a side of a token, frames a patch
  float mean[3], std[3];
  DType dtype;
  int threads;
};

}  // namespace moca

MOCA_KERNEL(patchify_forward, PatchifyParams)

// csrc/common/tensor_map.h for the emulator.
#pragma once

#include "common/cuda.h"

namespace moca {

struct TensorBox {
  const void* data;
  int64_t tokens, heads, dim, token_stride, head_stride;
  int rows, columns;
  DType dtype;
  int device;
};

using TensorMap = TensorBox;

inline TensorMap make_tensor_map(const TensorBox& box) { return box; }

}  // namespace moca

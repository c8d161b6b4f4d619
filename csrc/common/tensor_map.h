// How Hopper's copies find boxes of a tensor: made on the host, read by the copy engine.
#pragma once

#include <cuda.h>

#include "common/cuda.h"

namespace moca {

using TensorMap = CUtensorMap;

// A (tokens, heads, dim) tensor of 16-bit values, whose rows of dim are contiguous, and a box of
// (rows, 1, columns) of it. Strides are in elements.
struct TensorBox {
  const void* data;
  int64_t tokens, heads, dim, token_stride, head_stride;
  int rows, columns;  // columns are 64 or 16: a row of the box is 128 or 32 bytes, its swizzle
  DType dtype;
  int device;
};

// The driver's function. No library of the driver is linked: it is asked for by name.
inline decltype(&cuTensorMapEncodeTiled) find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status;
  constexpr unsigned kVersion = 12000;  // of CUDA, the first to have it
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, kVersion,
                                       cudaEnableDefault, &status) != cudaSuccess ||
      status != cudaDriverEntryPointSuccess)
    throw std::runtime_error("moca_fast: the driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

// Throws std::runtime_error if the driver cannot make it.
inline TensorMap make_tensor_map(const TensorBox& box) {
  static const auto encode = find_encode();
  // The driver wants a context, and a thread that is new to CUDA gets it here.
  const cudaError_t current = cudaSetDevice(box.device);
  if (current != cudaSuccess)
    throw std::runtime_error("moca_fast: no tensor map on GPU " + std::to_string(box.device) +
                             ": " + cudaGetErrorString(current));
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(box.dim), static_cast<cuuint64_t>(box.heads),
                              static_cast<cuuint64_t>(box.tokens)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(box.head_stride) * 2,
                                static_cast<cuuint64_t>(box.token_stride) * 2};
  const cuuint32_t extent[] = {static_cast<cuuint32_t>(box.columns), 1,
                               static_cast<cuuint32_t>(box.rows)};
  const cuuint32_t steps[] = {1, 1, 1};
  TensorMap map;
  const CUresult result = encode(
      &map,
      box.dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                   : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      3, const_cast<void*>(box.data), sizes, strides, extent, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      box.columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_32B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("moca_fast: no tensor map for " + std::to_string(box.tokens) +
                             " tokens, " + std::to_string(box.heads) + " heads, dim " +
                             std::to_string(box.dim) + ": error " + std::to_string(result));
  return map;
}

}  // namespace moca

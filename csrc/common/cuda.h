// What the host side of every CUDA source shares: errors, launches, element types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/dtype.h"
#include "common/queue.h"

namespace moca {

__host__ __device__ constexpr int64_t ceil_div(int64_t value, int64_t by) {
  return (value + by - 1) / by;
}

// The sizes a kernel was launched for, as its error names them: {{"T", p.tokens}, {"D", p.dim}}.
using Shape = std::initializer_list<std::pair<const char*, int64_t>>;

struct Launch {
  const char* kernel;  // its name in errors
  Shape shape;
  Queue queue;
  dim3 grid, block;
  size_t shared = 0;  // bytes of dynamic shared memory
  dim3 cluster = {1, 1, 1};
};

// Throws std::runtime_error with the kernel, its shape and what CUDA says, if `status` is an error.
void check_cuda(cudaError_t status, const Launch& at);

// Queues a kernel and returns. A grid without blocks is no work and no error.
template <typename... Wanted, typename... Given>
void launch(const Launch& at, void (*kernel)(Wanted...), Given&&... arguments) {
  if (at.grid.x == 0 || at.grid.y == 0 || at.grid.z == 0) return;
  // The caller has made this device torch's current one; this runtime is linked statically and
  // keeps its own idea of it.
  check_cuda(cudaSetDevice(at.queue.device), at);
  constexpr size_t kShared = 48 << 10;  // what a block gets without asking
  if (at.shared > kShared)
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(at.shared)),
               at);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {at.cluster.x, at.cluster.y, at.cluster.z};
  cudaLaunchConfig_t config = {};
  config.gridDim = at.grid;
  config.blockDim = at.block;
  config.dynamicSmemBytes = at.shared;
  config.stream = reinterpret_cast<cudaStream_t>(at.queue.stream);
  config.attrs = &cluster;
  config.numAttrs = at.cluster.x * at.cluster.y * at.cluster.z > 1 ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Given>(arguments)...), at);
}

// As visit() of dtype.h, with CUDA's types: visit_cuda(dtype, [&](auto* type) {...}).
template <typename Body>
void visit_cuda(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::float32: return body(static_cast<float*>(nullptr));
    case DType::bfloat16: return body(static_cast<__nv_bfloat16*>(nullptr));
    case DType::float16: return body(static_cast<__half*>(nullptr));
  }
  throw std::invalid_argument("moca_fast: unknown dtype");
}

// Whether an address can be accessed 16 bytes at a time.
inline bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

}  // namespace moca

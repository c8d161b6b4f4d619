// Launching a kernel, with errors raised by its name and shape.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace moca {

// Runs kernel(params) on `blocks` blocks of `threads` threads with `shared` bytes of shared memory.
// Throws std::runtime_error with `name` and the shape if the device refuses.
template <typename Params>
void launch(const std::string& name, void (*kernel)(Params), int64_t blocks, int threads,
            int shared, void* stream, const std::decay_t<Params>& params) {
  if (blocks == 0) return;
  cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error == cudaSuccess) {
    kernel<<<static_cast<unsigned>(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(
        params);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess)
    throw std::runtime_error("moca_fast: " + name + " did not start with " +
                             std::to_string(blocks) + " blocks of " + std::to_string(threads) +
                             " threads and " + std::to_string(shared) +
                             " bytes of shared memory: " + cudaGetErrorString(error));
}

}  // namespace moca

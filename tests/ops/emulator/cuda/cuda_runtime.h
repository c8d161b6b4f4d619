// CUDA's runtime for the emulator: what csrc/common/cuda.h and cuda_device.h use of it. Variables
// in shared memory keep what the block before left there.
#pragma once

#include "../device.h"

#define __shared__ static

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaLaunchAttributeClusterDimension };

struct cudaLaunchAttribute {
  int id;
  struct {
    dim3 clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  int numAttrs;
};

inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
  return cudaSuccess;
}

template <typename... Wanted, typename... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* at, void (*kernel)(Wanted...),
                               const Given&... arguments) {
  emulator::launch(at->gridDim, at->blockDim, at->dynamicSmemBytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  auto& block = *emulator::Block::active();
  auto& all = block.slots;
  const int self = block.thread();
  std::memcpy(&all[self][0], &value, sizeof value);
  block.meet_warp([&](int first) {
    for (int lane = 0; lane < 32; ++lane) all[first + lane][1] = all[first + (lane ^ mask)][0];
  });
  std::memcpy(&value, &all[self][1], sizeof value);
  return value;
}

// What the device side of every CUDA source shares: 16-byte accesses, conversions, sums.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace moca {

constexpr int kWarp = 32;

__device__ inline float as_float(float value) { return value; }
__device__ inline float as_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float as_float(__half value) { return __half2float(value); }

template <typename T>
__device__ T rounded(float value) {
  if constexpr (sizeof(T) == 4)
    return value;
  else
    return T(value);  // to nearest, ties to even
}

// N neighbouring elements, read and written in accesses of up to 16 bytes. An address of one is a
// multiple of its alignment; N = 1 is for rows that are not aligned.
template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T lane[N];
};

template <int N, typename T>
__device__ Pack<T, N> load(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <typename T, int N>
__device__ void store(T* to, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// The sum over the warp, in every lane; always in the same order.
__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// The sum over a block of kThreads threads, in every thread; always in the same order. All threads
// call it. `scratch` is shared memory of kThreads / kWarp floats.
template <int kThreads>
__device__ float block_sum(float value, float* scratch) {
  value = warp_sum(value);
  __syncthreads();  // an earlier call's sums have been read
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kThreads / kWarp; ++warp) sum += scratch[warp];
  return sum;
}

}  // namespace moca

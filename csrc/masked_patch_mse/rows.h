// What forward.cu and backward.cu share: a warp has a row. M rows, P values a row, N clean patches.
#pragma once

#include "common/cuda.h"
#include "common/cuda_device.h"
#include "masked_patch_mse/masked_patch_mse.h"

namespace moca {

constexpr int kThreads = 256;  // of a block

// Calls body(i, N values of each row at i) for this lane's places in rows of `size` values.
template <int N, typename Body, typename... T>
__device__ void along(int64_t size, Body&& body, const T*... row) {
#pragma unroll 4
  for (int64_t i = threadIdx.x % kWarp * N; i < size; i += kWarp * N) body(i, load<N>(row + i)...);
}

// What a target is compared as: (value - mean) * scale + shift.
struct Standardize {
  float mean = 0.0f, scale = 1.0f, shift = 0.0f;
  __device__ float operator()(float value) const { return (value - mean) * scale + shift; }
};

// Brings one target patch to mean 0 and unbiased variance 1, epsilon aside. Two passes, so that a
// nearly constant patch does not cancel; the second also finds what the rounded mean is off by.
// Passes after the first read the cache.
template <int N, typename Target>
__device__ Standardize standardize(const Target* target, int64_t size) {
  const double count = static_cast<double>(size);
  float sum = 0.0f, rest = 0.0f, squares = 0.0f;
  const auto add = [&](int64_t, const Pack<Target, N>& pack) {
#pragma unroll
    for (int n = 0; n < N; ++n) sum += as_float(pack.lane[n]);
  };
  along<N>(size, add, target);
  const float mean = static_cast<float>(warp_sum(sum) / count);
  const auto add_centred = [&](int64_t, const Pack<Target, N>& pack) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float centred = as_float(pack.lane[n]) - mean;
      rest += centred;
      squares += centred * centred;
    }
  };
  along<N>(size, add_centred, target);
  const double off = warp_sum(rest) / count;
  const double variance =
      (warp_sum(squares) - count * off * off) / (count > 1.0 ? count - 1.0 : 1.0);
  const double scale = 1.0 / sqrt(variance + kEpsilon);
  return {mean, static_cast<float>(scale), static_cast<float>(-off * scale)};
}

// The target of prediction m, or null where index names none.
template <typename Target>
__device__ const Target* target_of(const MaskedPatchMseParams& p, int64_t m) {
  const int64_t row = p.index[m];
  if (row < 0 || row >= p.num_patches) return nullptr;
  return static_cast<const Target*>(p.patches) + row * p.row_size;
}

// The row of this warp; it may be past the last.
__device__ inline int64_t row_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
}

// Calls body(null Pred*, null Target*, N as an integral constant): how many values are accessed at
// a time, 16 bytes of predictions where rows are aligned.
template <typename Body>
void visit_rows(const MaskedPatchMseParams& p, const void* written, Body&& body) {
  visit_cuda(p.pred_dtype, [&](auto* pred) {
    visit_cuda(p.patches_dtype, [&](auto* target) {
      using Pred = std::remove_pointer_t<decltype(pred)>;
      using Target = std::remove_pointer_t<decltype(target)>;
      constexpr int kPack = 16 / (sizeof(Pred) < sizeof(Target) ? sizeof(Pred) : sizeof(Target));
      const bool whole = p.row_size % kPack == 0 && is_aligned(p.pred) && is_aligned(p.patches) &&
                         is_aligned(written);
      if (whole)
        body(pred, target, std::integral_constant<int, kPack>());
      else
        body(pred, target, std::integral_constant<int, 1>());
    });
  });
}

inline void launch_rows(const char* kernel, const MaskedPatchMseParams& p, Queue queue,
                        void (*rows)(MaskedPatchMseParams)) {
  const auto blocks = static_cast<unsigned>(ceil_div(p.rows, kThreads / kWarp));
  launch({kernel,
          {{"M", p.rows}, {"P", p.row_size}, {"N", p.num_patches}},
          queue,
          dim3(blocks),
          dim3(kThreads)},
         rows, p);
}

}  // namespace moca

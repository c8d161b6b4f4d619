// Each row is read once: a warp gathers its target, finds its statistics and adds up the squared
// error. The caller sums the rows, so that results are repeatable.
#include "masked_patch_mse/rows.h"

namespace moca {
namespace {

template <typename Pred, typename Target, int N>
__global__ void __launch_bounds__(kThreads) row_losses(MaskedPatchMseParams p) {
  const int64_t m = row_of_warp();
  if (m >= p.rows) return;
  const Target* target = target_of<Target>(p, m);
  float sum = 0.0f;
  if (target == nullptr) {
    sum = nanf("");
  } else {
    const Standardize norm = p.normalize ? standardize<N>(target, p.row_size) : Standardize{};
    const auto add = [&](int64_t, const Pack<Pred, N>& x, const Pack<Target, N>& y) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float error = as_float(x.lane[n]) - norm(as_float(y.lane[n]));
        sum += error * error;
      }
    };
    along<N>(p.row_size, add, static_cast<const Pred*>(p.pred) + m * p.row_size, target);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) p.row_loss[m] = sum / static_cast<float>(p.row_size);
}

}  // namespace

void masked_patch_mse_forward_cuda(const MaskedPatchMseParams& p, Queue queue) {
  visit_rows(p, nullptr, [&](auto* pred, auto* target, auto width) {
    using Pred = std::remove_pointer_t<decltype(pred)>;
    using Target = std::remove_pointer_t<decltype(target)>;
    launch_rows("masked_patch_mse_forward", p, queue, row_losses<Pred, Target, width>);
  });
}

}  // namespace moca

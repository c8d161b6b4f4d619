// Each row is read once and its gradient written once: a warp gathers its target and finds its
// statistics again, which costs less than keeping a gradient since the forward.
#include "masked_patch_mse/rows.h"

namespace moca {
namespace {

template <typename Pred, typename Target, int N>
__global__ void __launch_bounds__(kThreads) row_gradients(MaskedPatchMseParams p) {
  const int64_t m = row_of_warp();
  if (m >= p.rows) return;
  const Target* target = target_of<Target>(p, m);
  const Pred* pred = static_cast<const Pred*>(p.pred) + m * p.row_size;
  Pred* d_pred = static_cast<Pred*>(p.d_pred) + m * p.row_size;
  const float scale =
      2.0f * *p.d_loss / (static_cast<float>(p.rows) * static_cast<float>(p.row_size));
  if (target == nullptr) {
    along<1>(
        p.row_size, [&](int64_t i, const Pack<Pred, 1>&) { d_pred[i] = rounded<Pred>(nanf("")); },
        pred);
    return;
  }
  const Standardize norm = p.normalize ? standardize<N>(target, p.row_size) : Standardize{};
  const auto write = [&](int64_t i, const Pack<Pred, N>& x, const Pack<Target, N>& y) {
    Pack<Pred, N> d;
#pragma unroll
    for (int n = 0; n < N; ++n)
      d.lane[n] = rounded<Pred>((as_float(x.lane[n]) - norm(as_float(y.lane[n]))) * scale);
    store(d_pred + i, d);
  };
  along<N>(p.row_size, write, pred, target);
}

}  // namespace

void masked_patch_mse_backward_cuda(const MaskedPatchMseParams& p, Queue queue) {
  visit_rows(p, p.d_pred, [&](auto* pred, auto* target, auto width) {
    using Pred = std::remove_pointer_t<decltype(pred)>;
    using Target = std::remove_pointer_t<decltype(target)>;
    launch_rows("masked_patch_mse_backward", p, queue, row_gradients<Pred, Target, width>);
  });
}

}  // namespace moca

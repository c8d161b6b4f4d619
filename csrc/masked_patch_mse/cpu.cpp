// Each row is read once: target statistics, error and gradient stay in cache. Rows are
// independent and their losses are summed in order by the caller, so results are repeatable.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "common/parallel.h"
#include "masked_patch_mse/masked_patch_mse.h"

namespace moca::MOCA_ISA {
namespace {

constexpr int64_t kRowsPerTask = 32;
constexpr float kEpsilon = 1e-6f;  // on the variance, as in the MAE paper's released code

struct Standardize {
  float mean = 0.0f, scale = 1.0f;
};

// Mean and 1 / sqrt(unbiased variance + epsilon) of one target patch; two passes, so that a
// nearly constant patch does not cancel.
template <typename Target>
Standardize statistics(const Target* target, int64_t size) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += to_float(target[i]);
  const float mean = sum / static_cast<float>(size);
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < size; ++i) {
    const float centred = to_float(target[i]) - mean;
    squares += centred * centred;
  }
  const float variance = squares / static_cast<float>(std::max<int64_t>(size - 1, 1));
  return {mean, 1.0f / std::sqrt(variance + kEpsilon)};
}

template <typename Pred, typename Target, typename Row>
void for_each_row(const MaskedPatchMseParams& p, Row&& row) {
  const auto* pred = static_cast<const Pred*>(p.pred);
  const auto* patches = static_cast<const Target*>(p.patches);
  const int64_t tasks = (p.rows + kRowsPerTask - 1) / kRowsPerTask;
  parallel_for(tasks, p.threads, [&](int64_t task, int) {
    const int64_t end = std::min(p.rows, (task + 1) * kRowsPerTask);
    for (int64_t m = task * kRowsPerTask; m < end; ++m) {
      const int64_t source = p.index[m];
      if (source < 0 || source >= p.num_patches)
        throw std::out_of_range("masked_patch_mse: index[" + std::to_string(m) + "] is " +
                                std::to_string(source) + ", expected 0 to " +
                                std::to_string(p.num_patches - 1));
      const Target* target = patches + source * p.row_size;
      row(m, pred + m * p.row_size, target,
          p.normalize ? statistics(target, p.row_size) : Standardize{});
    }
  });
}

template <typename Body>
void visit_both(const MaskedPatchMseParams& p, Body&& body) {
  visit(p.pred_dtype,
        [&](auto* pred) { visit(p.patches_dtype, [&](auto* target) { body(pred, target); }); });
}

}  // namespace

void masked_patch_mse_forward(const MaskedPatchMseParams& p) {
  visit_both(p, [&](auto* pred_type, auto* target_type) {
    using Pred = std::remove_pointer_t<decltype(pred_type)>;
    using Target = std::remove_pointer_t<decltype(target_type)>;
    for_each_row<Pred, Target>(
        p, [&](int64_t m, const Pred* pred, const Target* target, Standardize norm) {
          float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
          for (int64_t i = 0; i < p.row_size; ++i) {
            const float error = to_float(pred[i]) - (to_float(target[i]) - norm.mean) * norm.scale;
            sum += error * error;
          }
          p.row_loss[m] = sum / static_cast<float>(p.row_size);
        });
  });
}

void masked_patch_mse_backward(const MaskedPatchMseParams& p) {
  const float scale =
      2.0f * *p.d_loss / (static_cast<float>(p.rows) * static_cast<float>(p.row_size));
  visit_both(p, [&](auto* pred_type, auto* target_type) {
    using Pred = std::remove_pointer_t<decltype(pred_type)>;
    using Target = std::remove_pointer_t<decltype(target_type)>;
    for_each_row<Pred, Target>(
        p, [&](int64_t m, const Pred* pred, const Target* target, Standardize norm) {
          Pred* d_pred = static_cast<Pred*>(p.d_pred) + m * p.row_size;
#pragma omp simd
          for (int64_t i = 0; i < p.row_size; ++i) {
            const float error = to_float(pred[i]) - (to_float(target[i]) - norm.mean) * norm.scale;
            d_pred[i] = from_float<Pred>(scale * error);
          }
        });
  });
}

}  // namespace moca::MOCA_ISA

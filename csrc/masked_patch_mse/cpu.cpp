// Each row is read once: target statistics, error and gradient stay in cache. Rows are
// independent and their losses are summed in order by the caller, so results are repeatable.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "common/pages.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "masked_patch_mse/masked_patch_mse.h"

namespace moca::MOCA_ISA {
namespace {

constexpr int64_t kRowsPerTask = 32;
constexpr double kEpsilon = 1e-6;  // on the variance, as in the MAE paper's released code

// What a target is compared as: (value - mean) * scale + shift.
struct Standardize {
  float mean = 0.0f, scale = 1.0f, shift = 0.0f;
  Lanes operator()(Lanes value) const { return (value - mean) * scale + shift; }
};

// Calls body(i, count, lanes of each row at i) along rows of `size`; `count` lanes exist. In one
// place, so that the compiler puts the body there and keeps its sums in registers.
template <typename Body, typename... T>
void along(int64_t size, Body&& body, const T*... row) {
  for (int64_t i = 0; i < size; i += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, size - i);
    body(i, count, count == kLanes ? load(row + i) : load_some(row + i, count)...);
  }
}

// Brings one target patch to mean 0 and unbiased variance 1, epsilon aside. Two passes, so that a
// nearly constant patch does not cancel; the second also finds what the rounded mean is off by.
template <typename Target>
Standardize standardize(const Target* target, int64_t size) {
  const double count = static_cast<double>(size);
  Lanes sum = {}, rest = {}, squares = {};
  along(size, [&](int64_t, int64_t, Lanes x) { sum += x; }, target);
  const float mean = static_cast<float>(sum_of(sum) / count);
  const auto add_centred = [&](int64_t, int64_t left, Lanes x) {
    const Lanes centred = keep(x - mean, left);
    rest += centred;
    squares += centred * centred;
  };
  along(size, add_centred, target);
  const double off = sum_of(rest) / count;
  const double variance = (sum_of(squares) - count * off * off) / std::max(count - 1.0, 1.0);
  const double scale = 1.0 / std::sqrt(variance + kEpsilon);
  return {mean, static_cast<float>(scale), static_cast<float>(-off * scale)};
}

template <typename T>
void prefetch_row(const T* row, int64_t size) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < size; i += kLine) __builtin_prefetch(row + i, 0, 2);
}

// The row of patches that prediction m stands for.
int64_t source(const MaskedPatchMseParams& p, int64_t m) {
  const int64_t row = p.index[m];
  if (row < 0 || row >= p.num_patches)
    throw std::out_of_range("masked_patch_mse: index[" + std::to_string(m) + "] is " +
                            std::to_string(row) + ", expected 0 to " +
                            std::to_string(p.num_patches - 1));
  return row;
}

template <typename Pred, typename Target, typename Row>
void for_each_row(const MaskedPatchMseParams& p, Row&& row) {
  const auto* pred = static_cast<const Pred*>(p.pred);
  const auto* patches = static_cast<const Target*>(p.patches);
  parallel_for(ceil_div(p.rows, kRowsPerTask), p.threads, [&](int64_t task, int) {
    const int64_t end = std::min(p.rows, (task + 1) * kRowsPerTask);
    for (int64_t m = task * kRowsPerTask; m < end; ++m) {
      const Target* target = patches + source(p, m) * p.row_size;
      // Targets lie anywhere: the processor cannot foresee where the next one is.
      if (m + 1 < end) prefetch_row(patches + source(p, m + 1) * p.row_size, p.row_size);
      row(m, pred + m * p.row_size, target,
          p.normalize ? standardize(target, p.row_size) : Standardize{});
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
          Lanes sum = {};
          const auto add_square = [&](int64_t, int64_t count, Lanes x, Lanes y) {
            const Lanes error = keep(x - norm(y), count);
            sum += error * error;
          };
          along(p.row_size, add_square, pred, target);
          p.row_loss[m] = sum_of(sum) / static_cast<float>(p.row_size);
        });
  });
}

void masked_patch_mse_backward(const MaskedPatchMseParams& p) {
  const float scale =
      2.0f * *p.d_loss / (static_cast<float>(p.rows) * static_cast<float>(p.row_size));
  visit_both(p, [&](auto* pred_type, auto* target_type) {
    using Pred = std::remove_pointer_t<decltype(pred_type)>;
    using Target = std::remove_pointer_t<decltype(target_type)>;
    prefer_huge_pages(p.d_pred, p.rows * p.row_size * sizeof(Pred));
    for_each_row<Pred, Target>(
        p, [&](int64_t m, const Pred* pred, const Target* target, Standardize norm) {
          Pred* d_pred = static_cast<Pred*>(p.d_pred) + m * p.row_size;
          const auto write = [&](int64_t i, int64_t count, Lanes x, Lanes y) {
            const Lanes d = (x - norm(y)) * scale;
            count == kLanes ? store(d_pred + i, d) : store_some(d_pred + i, d, count);
          };
          along(p.row_size, write, pred, target);
        });
  });
}

}  // namespace moca::MOCA_ISA

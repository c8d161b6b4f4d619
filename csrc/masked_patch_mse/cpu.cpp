// Each row is read once: target statistics, error and gradient stay in cache. Rows are
// independent and their losses are summed in order by the caller, so results are repeatable.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "common/parallel.h"
#include "common/simd.h"
#include "common/stream.h"
#include "masked_patch_mse/masked_patch_mse.h"

namespace moca::MOCA_ISA {
namespace {

constexpr int64_t kRowsPerTask = 32;

// What a target is compared as: (value - mean) * scale + shift.
struct Standardize {
  float mean = 0.0f, scale = 1.0f, shift = 0.0f;
  Lanes operator()(Lanes value) const { return (value - mean) * scale + shift; }
};

// Fetches `count` elements for reading.
template <typename T>
void prefetch(const T* from, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; from && i < count; i += kLine) __builtin_prefetch(from + i);
}

// A row, and one that is soon to be read and not yet asked for, or null.
template <typename T>
struct Row {
  const T* here;
  const T* next;
};

// Calls body(part, i, count, lanes of each row at i) along rows of `size`; `count` lanes exist.
// Sums are kept in `kParts` parts, so that none waits for the one before. In one place, so that the
// compiler puts the body there and keeps its sums in registers. Fetches the next rows meanwhile:
// targets lie anywhere, and the processor cannot foresee where the next one is.
constexpr int kParts = 4;

template <typename Body, typename... T>
void along(int64_t size, Body&& body, Row<T>... row) {
  constexpr int64_t kStep = kParts * kLanes;
  int64_t i = 0;
  for (; i + kStep <= size; i += kStep) {
    (prefetch(row.next ? row.next + i : nullptr, kStep), ...);
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part)
      body(part, i + part * kLanes, kLanes, load(row.here + i + part * kLanes)...);
  }
  for (; i < size; i += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, size - i);
    body(0, i, count, count == kLanes ? load(row.here + i) : load_some(row.here + i, count)...);
  }
}

// The sum of a row's parts.
using Parts = Lanes[kParts];
float total(const Parts& parts) { return sum_of((parts[0] + parts[1]) + (parts[2] + parts[3])); }

// Brings one target patch to mean 0 and unbiased variance 1, epsilon aside. Two passes, so that a
// nearly constant patch does not cancel; the second also finds what the rounded mean is off by.
template <typename Target>
Standardize standardize(Row<Target> target, int64_t size) {
  const double count = static_cast<double>(size);
  Parts sum = {}, rest = {}, squares = {};
  along(
      size, [&](int part, int64_t, int64_t, Lanes x) { sum[part] += x; },
      Row<Target>{target.here, nullptr});
  const float mean = static_cast<float>(total(sum) / count);
  const auto add_centred = [&](int part, int64_t, int64_t left, Lanes x) {
    const Lanes centred = keep(x - mean, left);
    rest[part] += centred;
    squares[part] += centred * centred;
  };
  along(size, add_centred, target);
  const double off = total(rest) / count;
  const double variance = (total(squares) - count * off * off) / std::max(count - 1.0, 1.0);
  const double scale = 1.0 / std::sqrt(variance + kEpsilon);
  return {mean, static_cast<float>(scale), static_cast<float>(-off * scale)};
}

// The row of patches that prediction m stands for.
int64_t source(const MaskedPatchMseParams& p, int64_t m) {
  const int64_t row = p.index[m];
  if (row < 0 || row >= p.num_patches)
    throw std::out_of_range("moca_fast.masked_patch_mse: index[" + std::to_string(m) +
                            "]: expected 0 to " + std::to_string(p.num_patches - 1) + ", got " +
                            std::to_string(row));
  return row;
}

template <typename Pred, typename Target, typename Body>
void for_each_row(const MaskedPatchMseParams& p, Body&& body) {
  const auto* pred = static_cast<const Pred*>(p.pred);
  const auto* patches = static_cast<const Target*>(p.patches);
  parallel_for(ceil_div(p.rows, kRowsPerTask), p.threads, [&](int64_t task, int) {
    const int64_t begin = task * kRowsPerTask, end = std::min(p.rows, begin + kRowsPerTask);
    ResultRows<Pred> d_pred(p.d_pred, p.rows, p.row_size, begin, end);
    for (int64_t m = begin; m < end; ++m) {
      const int64_t next = std::min(m + 1, end - 1);
      Row<Target> target{patches + source(p, m) * p.row_size,
                         patches + source(p, next) * p.row_size};
      Standardize norm;
      if (p.normalize) {
        norm = standardize(target, p.row_size);
        target.next = nullptr;
      }
      body(m, Row<Pred>{pred + m * p.row_size, pred + next * p.row_size}, target, norm,
           d_pred.begin_row(m));
      d_pred.end_row(m);
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
        p, [&](int64_t m, Row<Pred> pred, Row<Target> target, Standardize norm, Pred*) {
          Parts sum = {};
          const auto add_square = [&](int part, int64_t, int64_t count, Lanes x, Lanes y) {
            const Lanes error = keep(x - norm(y), count);
            sum[part] += error * error;
          };
          along(p.row_size, add_square, pred, target);
          p.row_loss[m] = total(sum) / static_cast<float>(p.row_size);
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
        p, [&](int64_t, Row<Pred> pred, Row<Target> target, Standardize norm, Pred* d_pred) {
          const auto write = [&](int, int64_t i, int64_t count, Lanes x, Lanes y) {
            const Lanes d = (x - norm(y)) * scale;
            count == kLanes ? store(d_pred + i, d) : store_some(d_pred + i, d, count);
          };
          along(p.row_size, write, pred, target);
        });
  });
}

}  // namespace moca::MOCA_ISA

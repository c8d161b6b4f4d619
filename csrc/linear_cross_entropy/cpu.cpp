// The scores of common/softmax_scores.h are logits here: x is hidden, w the weight.
#include <stdexcept>
#include <string>

#include "common/held_scores.h"
#include "linear_cross_entropy/linear_cross_entropy.h"

namespace moca::MOCA_ISA {
namespace {

// The problem, once its rows and labels are known to lie inside their tensors.
template <typename T>
Scores<T> scores(const LinearCrossEntropyParams& p) {
  for (int64_t i = 0; i < p.rows; ++i) {
    const int64_t row = p.index[i];
    if (row < 0 || row >= p.tokens)
      throw std::out_of_range("moca_fast.linear_cross_entropy: row index past the tokens");
    if (p.labels[row] < 0 || p.labels[row] >= p.vocabulary)
      throw std::out_of_range("moca_fast.linear_cross_entropy: labels[" + std::to_string(row) +
                              "]: expected 0 to " + std::to_string(p.vocabulary - 1) +
                              " or the ignored label, got " + std::to_string(p.labels[row]));
  }
  Scores<T> s{};
  s.x = static_cast<const T*>(p.hidden);
  s.w = static_cast<const T*>(p.weight);
  s.bias = static_cast<const T*>(p.bias);
  s.index = p.index;
  s.target = p.labels;
  s.rows = p.rows;
  s.cols = p.vocabulary;
  s.dim = p.dim;
  s.divisor = 1.0f;
  s.threads = p.threads;
  return s;
}

void finish(const LinearCrossEntropyParams& p, int64_t i, const RowStats& stats) {
  p.loss[p.index[i]] = stats.loss();
  p.lse[p.index[i]] = stats.lse();
}

template <typename T>
void forward(const LinearCrossEntropyParams& p) {
  std::vector<RowStats> stats(p.rows);
  softmax_forward(scores<T>(p), stats);
  for (int64_t i = 0; i < p.rows; ++i) finish(p, i, stats[i]);
}

// Writes the gradients that softmax(s, g) makes.
template <typename T, typename Softmax>
void differentiate(const LinearCrossEntropyParams& p, Softmax&& softmax) {
  const int64_t pitch = product_pitch(p.dim);
  const Buffer d_x(p.d_hidden ? p.rows * pitch : 0);
  ScoreGradients<T> g{};
  g.lse = p.lse;
  g.d_loss = p.d_loss;
  g.d_x = p.d_hidden ? d_x.get() : nullptr;
  g.d_x_pitch = pitch;
  g.d_w = static_cast<T*>(p.d_weight);
  g.d_bias = static_cast<T*>(p.d_bias);
  softmax(scores<T>(p), g);
  if (!p.d_hidden) return;
  parallel_for(ceil_div(p.rows, kBlock<T>), p.threads, [&](int64_t block, int) {
    for (int64_t i = block * kBlock<T>; i < std::min(p.rows, (block + 1) * kBlock<T>); ++i) {
      T* to = static_cast<T*>(p.d_hidden) + p.index[i] * p.dim;
      for (int64_t d = 0; d < p.dim; ++d) to[d] = from_float<T>(d_x.get()[i * pitch + d]);
    }
  });
}

template <typename T>
void backward(const LinearCrossEntropyParams& p) {
  differentiate<T>(p, [](const auto& s, const auto& g) { softmax_backward(s, g); });
}

template <typename T>
void with_gradients(const LinearCrossEntropyParams& p) {
  if (p.rows == 0) return backward<T>(p);
  HeldScores<T> held(scores<T>(p), std::min(p.held, p.rows));
  for (int64_t first = 0; first < p.rows; first += p.held) {
    LinearCrossEntropyParams some = p;
    some.index += first;
    some.rows = std::min(p.held, p.rows - first);
    differentiate<T>(some, [&](const auto& s, const auto& g) {
      held.run(s, g, first > 0, [&](int64_t i, RowStats& stats) { finish(some, i, stats); });
    });
  }
}

}  // namespace

void linear_cross_entropy_forward(const LinearCrossEntropyParams& p) {
  visit(p.dtype, [&](auto* type) { forward<std::remove_pointer_t<decltype(type)>>(p); });
}

void linear_cross_entropy_backward(const LinearCrossEntropyParams& p) {
  visit(p.dtype, [&](auto* type) { backward<std::remove_pointer_t<decltype(type)>>(p); });
}

void linear_cross_entropy_with_gradients(const LinearCrossEntropyParams& p) {
  visit(p.dtype, [&](auto* type) { with_gradients<std::remove_pointer_t<decltype(type)>>(p); });
}

}  // namespace moca::MOCA_ISA

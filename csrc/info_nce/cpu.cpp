// The scores of common/softmax_scores.h are query . document / temperature here. Hard negatives
// are K more scores of a row, made and differentiated apart.
#include <stdexcept>
#include <string>

#include "common/softmax_scores.h"
#include "info_nce/info_nce.h"

namespace moca::MOCA_ISA {
namespace {

template <typename T>
Scores<T> scores(const InfoNceParams& p) {
  for (int64_t b = 0; b < p.queries; ++b)
    if (p.target[b] < 0 || p.target[b] >= p.documents)
      throw std::out_of_range("moca_fast.info_nce: target[" + std::to_string(b) +
                              "]: expected 0 to " + std::to_string(p.documents - 1) + ", got " +
                              std::to_string(p.target[b]));
  Scores<T> s{};
  s.x = static_cast<const T*>(p.query);
  s.w = static_cast<const T*>(p.document);
  s.target = p.target;
  s.row_ids = p.query_ids;
  s.col_ids = p.document_ids;
  s.rows = p.queries;
  s.cols = p.documents;
  s.dim = p.dim;
  s.divisor = *p.temperature;
  s.threads = p.threads;
  return s;
}

// The score of query b and another vector.
template <typename T>
float score(const InfoNceParams& p, int64_t b, const T* other) {
  const T* query = static_cast<const T*>(p.query) + b * p.dim;
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < p.dim; ++d) sum += to_float(query[d]) * to_float(other[d]);
  return sum / *p.temperature;
}

template <typename T>
const T* hard_negative(const InfoNceParams& p, int64_t b, int64_t k) {
  return static_cast<const T*>(p.hard_negatives) + (b * p.hard + k) * p.dim;
}

// Adds what hard negative k of query b gives to the gradients, and returns
// (score - anchor) * d_score.
template <typename T>
double differentiate_hard(const InfoNceParams& p, int64_t b, int64_t k, float anchor,
                          float* d_query) {
  const T* query = static_cast<const T*>(p.query) + b * p.dim;
  const T* hard = hard_negative<T>(p, b, k);
  const float hard_score = score(p, b, hard);
  const float d_score = static_cast<float>(std::exp(hard_score - p.lse[b])) * p.d_loss[b];
  const float d_dot = d_score / *p.temperature;
  if (d_query)
#pragma omp simd
    for (int64_t d = 0; d < p.dim; ++d) d_query[d] += d_dot * to_float(hard[d]);
  if (p.d_hard_negatives) {
    T* d_hard = static_cast<T*>(p.d_hard_negatives) + (b * p.hard + k) * p.dim;
#pragma omp simd
    for (int64_t d = 0; d < p.dim; ++d) d_hard[d] = from_float<T>(d_dot * to_float(query[d]));
  }
  return d_score * (double{hard_score} - anchor);
}

template <typename T>
void forward(const InfoNceParams& p, const Scores<T>& s) {
  std::vector<RowStats> stats(p.queries);
  softmax_forward(s, stats);
  parallel_for(ceil_div(p.queries, kBlock<T>), p.threads, [&](int64_t block, int) {
    for (int64_t b = block * kBlock<T>; b < std::min(p.queries, (block + 1) * kBlock<T>); ++b) {
      for (int64_t k = 0; k < p.hard; ++k) {
        float row[kLanes];
        std::fill(row, row + kLanes, kMasked);
        row[0] = score(p, b, hard_negative<T>(p, b, k));
        fold(stats[b], row, 1);
      }
      p.loss[b] = stats[b].loss();
      p.lse[b] = stats[b].lse();
    }
  });
}

template <typename T>
void backward(const InfoNceParams& p, const Scores<T>& s) {
  constexpr bool kInPlace = std::is_same_v<T, float>;
  const Buffer d_x(p.d_query && !kInPlace ? p.queries * p.dim : 0);
  std::vector<double> moment(p.queries);
  std::vector<float> anchor(p.queries);  // the moments' sums cancel least about the target
  for (int64_t b = 0; b < p.queries && p.d_temperature; ++b)
    anchor[b] = score(p, b, s.w + p.target[b] * p.dim);
  ScoreGradients<T> g{};
  g.lse = p.lse;
  g.d_loss = p.d_loss;
  if (p.d_query) g.d_x = kInPlace ? static_cast<float*>(p.d_query) : d_x.get();
  g.d_w = static_cast<T*>(p.d_document);
  g.moment = p.d_temperature ? moment.data() : nullptr;
  g.anchor = anchor.data();
  if (g.d_x || g.d_w || g.moment) softmax_backward(s, g);
  parallel_for(ceil_div(p.queries, kBlock<T>), p.threads, [&](int64_t block, int) {
    for (int64_t b = block * kBlock<T>; b < std::min(p.queries, (block + 1) * kBlock<T>); ++b) {
      float* d_query = g.d_x ? g.d_x + b * p.dim : nullptr;
      for (int64_t k = 0; k < p.hard; ++k)
        moment[b] += differentiate_hard<T>(p, b, k, anchor[b], d_query);
      if (!d_query || kInPlace) continue;
      T* to = static_cast<T*>(p.d_query) + b * p.dim;
      for (int64_t d = 0; d < p.dim; ++d) to[d] = from_float<T>(d_query[d]);
    }
  });
  if (!p.d_temperature) return;
  double sum = 0.0;
  for (double value : moment) sum += value;
  *p.d_temperature = static_cast<float>(-sum / *p.temperature);
}

}  // namespace

void info_nce_forward(const InfoNceParams& p) {
  visit(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    forward(p, scores<T>(p));
  });
}

void info_nce_backward(const InfoNceParams& p) {
  visit(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    backward(p, scores<T>(p));
  });
}

void info_nce_with_gradients(const InfoNceParams& p) {
  visit(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Scores<T> s = scores<T>(p);
    const Buffer kept(s.rows * s.kept_pitch());
    s.kept = kept.get();
    forward(p, s);
    backward(p, s);
  });
}

}  // namespace moca::MOCA_ISA

// The scores of common/softmax_scores.h are query . document / temperature here. Hard negatives
// are K more scores of a row, made and differentiated apart.
#include <numeric>
#include <stdexcept>
#include <string>

#include "common/held_scores.h"
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

// The statistics of query b, hard negatives still missing, become its loss and logsumexp.
template <typename T>
void finish(const InfoNceParams& p, int64_t b, RowStats& stats) {
  for (int64_t k = 0; k < p.hard; ++k) {
    float row[kLanes];
    std::fill(row, row + kLanes, kMasked);
    row[0] = score(p, b, hard_negative<T>(p, b, k));
    fold(stats, row, 1);
  }
  p.loss[b] = stats.loss();
  p.lse[b] = stats.lse();
}

template <typename T, typename Body>
void for_each_query(const InfoNceParams& p, Body&& body) {
  parallel_for(ceil_div(p.queries, kBlock<T>), p.threads, [&](int64_t block, int) {
    for (int64_t b = block * kBlock<T>; b < std::min(p.queries, (block + 1) * kBlock<T>); ++b)
      body(b);
  });
}

template <typename T>
void forward(const InfoNceParams& p) {
  std::vector<RowStats> stats(p.queries);
  softmax_forward(scores<T>(p), stats);
  for_each_query<T>(p, [&](int64_t b) { finish<T>(p, b, stats[b]); });
}

// Writes the gradients but for d_temperature, which is returned. softmax(s, g) makes what the
// documents give to them.
template <typename T, typename Softmax>
double differentiate(const InfoNceParams& p, Softmax&& softmax) {
  constexpr bool kInPlace = std::is_same_v<T, float>;
  const Scores<T> s = scores<T>(p);
  const int64_t pitch = kInPlace ? p.dim : product_pitch(p.dim);
  const Buffer d_x(p.d_query && !kInPlace ? p.queries * pitch : 0);
  std::vector<double> moment(p.queries);
  std::vector<float> anchor(p.queries);  // the moments' sums cancel least about the target
  for (int64_t b = 0; b < p.queries && p.d_temperature; ++b)
    anchor[b] = score(p, b, s.w + p.target[b] * p.dim);
  ScoreGradients<T> g{};
  g.lse = p.lse;
  g.d_loss = p.d_loss;
  if (p.d_query) g.d_x = kInPlace ? static_cast<float*>(p.d_query) : d_x.get();
  g.d_x_pitch = pitch;
  g.d_w = static_cast<T*>(p.d_document);
  g.moment = p.d_temperature ? moment.data() : nullptr;
  g.anchor = anchor.data();
  softmax(s, g);
  for_each_query<T>(p, [&](int64_t b) {
    float* d_query = g.d_x ? g.d_x + b * pitch : nullptr;
    for (int64_t k = 0; k < p.hard; ++k)
      moment[b] += differentiate_hard<T>(p, b, k, anchor[b], d_query);
    if (!d_query || kInPlace) return;
    T* to = static_cast<T*>(p.d_query) + b * p.dim;
    for (int64_t d = 0; d < p.dim; ++d) to[d] = from_float<T>(d_query[d]);
  });
  return -std::accumulate(moment.begin(), moment.end(), 0.0) / *p.temperature;
}

template <typename T>
void backward(const InfoNceParams& p) {
  const double d_temperature = differentiate<T>(p, [](const auto& s, const auto& g) {
    if (g.d_x || g.d_w || g.moment) softmax_backward(s, g);
  });
  if (p.d_temperature) *p.d_temperature = static_cast<float>(d_temperature);
}

// `count` of the queries from `first` on.
template <typename T>
InfoNceParams part(InfoNceParams p, int64_t first, int64_t count) {
  const int64_t hard = first * p.hard * p.dim;
  p.query = static_cast<const T*>(p.query) + first * p.dim;
  p.target += first;
  p.loss += first;
  p.lse += first;
  p.d_loss += first;
  if (p.hard_negatives) p.hard_negatives = static_cast<const T*>(p.hard_negatives) + hard;
  if (p.query_ids) p.query_ids += first;
  if (p.d_query) p.d_query = static_cast<T*>(p.d_query) + first * p.dim;
  if (p.d_hard_negatives) p.d_hard_negatives = static_cast<T*>(p.d_hard_negatives) + hard;
  p.queries = count;
  return p;
}

template <typename T>
void with_gradients(const InfoNceParams& p) {
  if (p.queries == 0) return backward<T>(p);
  HeldScores<T> held(scores<T>(p), std::min(p.held, p.queries));
  double d_temperature = 0.0;
  for (int64_t first = 0; first < p.queries; first += p.held) {
    const InfoNceParams some = part<T>(p, first, std::min(p.held, p.queries - first));
    d_temperature += differentiate<T>(some, [&](const auto& s, const auto& g) {
      held.run(s, g, first > 0, [&](int64_t b, RowStats& stats) { finish<T>(some, b, stats); });
    });
  }
  if (p.d_temperature) *p.d_temperature = static_cast<float>(d_temperature);
}

}  // namespace

void info_nce_forward(const InfoNceParams& p) {
  visit(p.dtype, [&](auto* type) { forward<std::remove_pointer_t<decltype(type)>>(p); });
}

void info_nce_backward(const InfoNceParams& p) {
  visit(p.dtype, [&](auto* type) { backward<std::remove_pointer_t<decltype(type)>>(p); });
}

void info_nce_with_gradients(const InfoNceParams& p) {
  visit(p.dtype, [&](auto* type) { with_gradients<std::remove_pointer_t<decltype(type)>>(p); });
}

}  // namespace moca::MOCA_ISA

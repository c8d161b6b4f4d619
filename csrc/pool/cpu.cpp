// One task a document: each token is read or written once. Sums are in float64, so a long document
// loses nothing and results do not depend on threads.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/parallel.h"
#include "pool/pool.h"

namespace moca::MOCA_ISA {
namespace {

constexpr double kEpsilon = 1e-12;  // least length divided by, as in torch's normalize

struct Span {
  int64_t start, end;
};

// The tokens that are pooled into a document.
Span members(const PoolParams& p, int64_t document) {
  const int64_t start = p.cu_seqlens[document], end = p.cu_seqlens[document + 1];
  return {p.mean ? start : std::max(start, end - 1), end};
}

void check_boundaries(const PoolParams& p) {
  const auto fail = [&](int64_t b) {
    throw std::invalid_argument(
        "moca_fast.pool: cu_seqlens: expected non-decreasing entries from 0 to at most T = " +
        std::to_string(p.tokens) + ", got " + std::to_string(p.cu_seqlens[b]) + " at " +
        std::to_string(b) + (b ? " after " + std::to_string(p.cu_seqlens[b - 1]) : ""));
  };
  if (p.cu_seqlens[0] != 0) fail(0);
  for (int64_t b = 1; b <= p.documents; ++b)
    if (p.cu_seqlens[b] < p.cu_seqlens[b - 1] || p.cu_seqlens[b] > p.tokens) fail(b);
}

template <typename T>
void forward_document(const PoolParams& p, int64_t document, std::vector<double>& sum) {
  const Span span = members(p, document);
  sum.assign(p.dim, 0.0);
  for (int64_t t = span.start; t < span.end; ++t) {
    const T* row = static_cast<const T*>(p.hidden) + t * p.dim;
#pragma omp simd
    for (int64_t d = 0; d < p.dim; ++d) sum[d] += to_float(row[d]);
  }
  const double count = static_cast<double>(std::max<int64_t>(span.end - span.start, 1));
  double squares = 0.0;
#pragma omp simd reduction(+ : squares)
  for (int64_t d = 0; d < p.dim; ++d) {
    sum[d] /= count;
    squares += sum[d] * sum[d];
  }
  const double length = std::sqrt(squares);
  const double norm = !p.normalize ? 1.0 : length < kEpsilon ? kEpsilon : length;
  p.norm[document] = static_cast<float>(norm);
  float* to = p.pooled + document * p.dim;
  for (int64_t d = 0; d < p.dim; ++d) to[d] = static_cast<float>(sum[d] / norm);
}

template <typename T>
void backward_document(const PoolParams& p, int64_t document, std::vector<double>& d_mean) {
  const Span span = members(p, document);
  const float* d_pooled = p.d_pooled + document * p.dim;
  const float* pooled = p.pooled + document * p.dim;
  const double norm = p.norm[document];
  double along = 0.0;
  if (p.normalize && !(p.norm[document] <= static_cast<float>(kEpsilon)))
#pragma omp simd reduction(+ : along)
    for (int64_t d = 0; d < p.dim; ++d) along += double{pooled[d]} * d_pooled[d];
  const double factor = 1.0 / (norm * std::max<int64_t>(span.end - span.start, 1));
  d_mean.resize(p.dim);
  for (int64_t d = 0; d < p.dim; ++d) d_mean[d] = (d_pooled[d] - along * pooled[d]) * factor;
  T* row = static_cast<T*>(p.d_hidden) + int64_t{p.cu_seqlens[document]} * p.dim;
  for (int64_t t = p.cu_seqlens[document]; t < span.end; ++t, row += p.dim)
    for (int64_t d = 0; d < p.dim; ++d)
      row[d] = from_float<T>(t < span.start ? 0.0f : static_cast<float>(d_mean[d]));
}

template <typename Body>
void for_each_document(const PoolParams& p, Body&& body) {
  check_boundaries(p);
  std::vector<std::vector<double>> scratch(std::max(p.threads, 1));
  parallel_for(p.documents, p.threads,
               [&](int64_t document, int thread) { body(document, scratch[thread]); });
}

}  // namespace

void pool_forward(const PoolParams& p) {
  visit(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_each_document(p, [&](int64_t document, std::vector<double>& scratch) {
      forward_document<T>(p, document, scratch);
    });
  });
}

void pool_backward(const PoolParams& p) {
  visit(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_each_document(p, [&](int64_t document, std::vector<double>& scratch) {
      backward_document<T>(p, document, scratch);
    });
    T* d_hidden = static_cast<T*>(p.d_hidden);
    std::fill(d_hidden + p.cu_seqlens[p.documents] * p.dim, d_hidden + p.tokens * p.dim,
              from_float<T>(0.0f));
  });
}

}  // namespace moca::MOCA_ISA

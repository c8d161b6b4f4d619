// Forward: a task sums some dims of one document, in float64, so that a long document loses nothing
// and results do not depend on how dims are shared out. Backward: a task writes some tokens. Each
// token is read or written once.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/parallel.h"
#include "common/simd.h"
#include "pool/pool.h"

namespace moca::MOCA_ISA {
namespace {

constexpr int64_t kTokens = 128;     // of one task of the backward
constexpr int64_t kTasks = 4;        // least tasks a thread in the forward, if dims allow
constexpr int64_t kLeastDims = 128;  // of one task of the forward: rows are read in long pieces

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

// Means of dims [begin, end) of a document.
template <typename T>
void mean(const PoolParams& p, int64_t document, int64_t begin, int64_t end) {
  const Span span = members(p, document);
  const T* hidden = static_cast<const T*>(p.hidden) + begin;
  const int64_t dims = end - begin;
  std::vector<double> sum(dims);
  for (int64_t t = span.start; t < span.end; ++t) {
    const T* row = hidden + t * p.dim;
#pragma omp simd
    for (int64_t d = 0; d < dims; ++d) sum[d] += to_float(row[d]);
  }
  const double count = static_cast<double>(std::max<int64_t>(span.end - span.start, 1));
  float* to = p.pooled + document * p.dim + begin;
  for (int64_t d = 0; d < dims; ++d) to[d] = static_cast<float>(sum[d] / count);
}

void normalize(const PoolParams& p, int64_t document) {
  float* pooled = p.pooled + document * p.dim;
  p.norm[document] = 1.0f;
  if (!p.normalize) return;
  double squares = 0.0;
#pragma omp simd reduction(+ : squares)
  for (int64_t d = 0; d < p.dim; ++d) squares += double{pooled[d]} * pooled[d];
  const double length = std::sqrt(squares), norm = length < kLeastNorm ? kLeastNorm : length;
  p.norm[document] = static_cast<float>(norm);
  for (int64_t d = 0; d < p.dim; ++d) pooled[d] = static_cast<float>(pooled[d] / norm);
}

// The gradient of each token that is pooled into a document.
template <typename T>
void token_gradient(const PoolParams& p, int64_t document, T* to) {
  const Span span = members(p, document);
  const float* d_pooled = p.d_pooled + document * p.dim;
  const float* pooled = p.pooled + document * p.dim;
  double along = 0.0;
  if (p.normalize && !(p.norm[document] <= kLeastNorm))
#pragma omp simd reduction(+ : along)
    for (int64_t d = 0; d < p.dim; ++d) along += double{pooled[d]} * d_pooled[d];
  const double factor = 1.0 / (double{p.norm[document]} * (span.end - span.start));
  for (int64_t d = 0; d < p.dim; ++d)
    to[d] = from_float<T>(static_cast<float>((d_pooled[d] - along * pooled[d]) * factor));
}

// Gradients of tokens [begin, end), those past the last document included.
template <typename T>
void backward_tokens(const PoolParams& p, int64_t begin, int64_t end) {
  T* d_hidden = static_cast<T*>(p.d_hidden);
  const int32_t* bounds = p.cu_seqlens;
  if (!p.mean)  // only last tokens are pooled
    std::fill(d_hidden + begin * p.dim, d_hidden + end * p.dim, from_float<T>(0.0f));
  std::vector<T> gradient(p.dim);
  int64_t document = std::upper_bound(bounds, bounds + p.documents + 1, begin) - bounds - 1;
  for (; document < p.documents && bounds[document] < end; ++document) {
    const Span span = members(p, document);
    const int64_t first = std::max(begin, span.start), last = std::min(end, span.end);
    if (first >= last) continue;
    token_gradient(p, document, gradient.data());
    for (int64_t t = first; t < last; ++t)
      std::memcpy(d_hidden + t * p.dim, gradient.data(), p.dim * sizeof(T));
  }
  const int64_t rest = std::max<int64_t>(begin, bounds[p.documents]);
  if (rest < end) std::fill(d_hidden + rest * p.dim, d_hidden + end * p.dim, from_float<T>(0.0f));
}

}  // namespace

void pool_forward(const PoolParams& p) {
  check_boundaries(p);
  const int64_t wanted = ceil_div(kTasks * p.threads, std::max<int64_t>(p.documents, 1));
  const int64_t slices = std::clamp<int64_t>(p.dim / kLeastDims, 1, std::max<int64_t>(wanted, 1));
  const int64_t dims = ceil_div(p.dim, slices);
  visit(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(p.documents * slices, p.threads, [&](int64_t task, int) {
      const int64_t begin = std::min(task % slices * dims, p.dim);
      mean<T>(p, task / slices, begin, std::min(begin + dims, p.dim));
    });
    parallel_for(p.documents, p.threads, [&](int64_t document, int) { normalize(p, document); });
  });
}

void pool_backward(const PoolParams& p) {
  check_boundaries(p);
  visit(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(ceil_div(p.tokens, kTokens), p.threads, [&](int64_t task, int) {
      backward_tokens<T>(p, task * kTokens, std::min(p.tokens, (task + 1) * kTokens));
    });
  });
}

}  // namespace moca::MOCA_ISA

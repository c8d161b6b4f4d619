// First, plain kernels: one task a row, nothing but what the row sees.
#include "attention/attention.h"

#include <cmath>
#include <limits>
#include <vector>

#include "common/parallel.h"

namespace moca::MOCA_ISA {
namespace {

template <typename T>
void load(const T* from, int64_t dim, float* to) {
#pragma omp simd
  for (int64_t d = 0; d < dim; ++d) to[d] = to_float(from[d]);
}

template <typename T>
float dot(const float* a, const T* b, int64_t dim) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < dim; ++d) sum += a[d] * to_float(b[d]);
  return sum;
}

template <typename T>
void add(float factor, const T* x, int64_t dim, float* sum) {
#pragma omp simd
  for (int64_t d = 0; d < dim; ++d) sum[d] += factor * to_float(x[d]);
}

template <typename T>
void store(const float* x, float factor, int64_t dim, T* to) {
#pragma omp simd
  for (int64_t d = 0; d < dim; ++d) to[d] = from_float<T>(x[d] * factor);
}

template <typename T>
struct Problem {
  explicit Problem(const AttentionParams& params) : p(params), group(p.heads / p.kv_heads) {}
  const T* q(int64_t i, int64_t h) const { return row(p.q, p.q_strides, i, h); }
  const T* k(int64_t j, int64_t h) const { return row(p.k, p.k_strides, j, h / group); }
  const T* v(int64_t j, int64_t h) const { return row(p.v, p.v_strides, j, h / group); }
  const T* d_out(int64_t i, int64_t h) const {
    return row(p.d_out, {p.heads * p.dim, p.dim}, i, h);
  }
  static const T* row(const void* base, Strides strides, int64_t token, int64_t head) {
    return static_cast<const T*>(base) + token * strides.token + head * strides.head;
  }
  const AttentionParams& p;
  int64_t group;
};

template <typename T>
void forward_row(const Problem<T>& x, int64_t i, int64_t h) {
  const AttentionParams& p = x.p;
  float q[256], sum[256] = {};
  load(x.q(i, h), p.dim, q);
  float top = -std::numeric_limits<float>::infinity(), total = 0.0f;
  for (int64_t j = p.queries.start[i]; j < p.queries.end[i]; ++j) {
    const float score = dot(q, x.k(j, h), p.dim) * p.softmax_scale;
    if (!(score <= top)) {
      const float shrink = top == -std::numeric_limits<float>::infinity() ? 0.0f : std::exp(top - score);
      total *= shrink;
      for (int64_t d = 0; d < p.dim; ++d) sum[d] *= shrink;
      top = score;
    }
    const float weight = std::exp(score - top);
    total += weight;
    add(weight, x.v(j, h), p.dim, sum);
  }
  const bool empty = p.queries.start[i] >= p.queries.end[i];
  store(sum, empty ? 0.0f : 1.0f / total, p.dim, static_cast<T*>(p.out) + (i * p.heads + h) * p.dim);
  p.lse[i * p.heads + h] = top + std::log(total);
}

template <typename T>
float d_score(const Problem<T>& x, int64_t i, int64_t j, int64_t h, const float* q,
              const float* d_out, float* probability) {
  const AttentionParams& p = x.p;
  const float score = dot(q, x.k(j, h), p.dim) * p.softmax_scale;
  *probability = std::exp(score - p.lse[i * p.heads + h]);
  const float d_probability = dot(d_out, x.v(j, h), p.dim);
  return *probability * (d_probability - p.delta[i * p.heads + h]) * p.softmax_scale;
}

template <typename T>
void backward_query(const Problem<T>& x, int64_t i, int64_t h) {
  const AttentionParams& p = x.p;
  float q[256], d_out[256], d_q[256] = {}, probability;
  load(x.q(i, h), p.dim, q);
  load(x.d_out(i, h), p.dim, d_out);
  for (int64_t j = p.queries.start[i]; j < p.queries.end[i]; ++j)
    add(d_score(x, i, j, h, q, d_out, &probability), x.k(j, h), p.dim, d_q);
  store(d_q, 1.0f, p.dim, static_cast<T*>(p.d_q) + (i * p.heads + h) * p.dim);
}

template <typename T>
void backward_key(const Problem<T>& x, int64_t j, int64_t g) {
  const AttentionParams& p = x.p;
  float q[256], d_out[256], d_k[256] = {}, d_v[256] = {}, probability;
  for (int64_t h = g * x.group; h < (g + 1) * x.group; ++h)
    for (int64_t i = p.keys.start[j]; i < p.keys.end[j]; ++i) {
      load(x.q(i, h), p.dim, q);
      load(x.d_out(i, h), p.dim, d_out);
      add(d_score(x, i, j, h, q, d_out, &probability), q, p.dim, d_k);
      add(probability, d_out, p.dim, d_v);
    }
  store(d_k, 1.0f, p.dim, static_cast<T*>(p.d_k) + (j * p.kv_heads + g) * p.dim);
  store(d_v, 1.0f, p.dim, static_cast<T*>(p.d_v) + (j * p.kv_heads + g) * p.dim);
}

}  // namespace

void attention_forward(const AttentionParams& p) {
  visit(p.dtype, [&](auto* type) {
    const Problem<std::remove_pointer_t<decltype(type)>> x(p);
    parallel_for(p.queries.size, p.threads, [&](int64_t i, int) {
      for (int64_t h = 0; h < p.heads; ++h) forward_row(x, i, h);
    });
  });
}

void attention_backward(const AttentionParams& p) {
  visit(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Problem<T> x(p);
    parallel_for(p.queries.size, p.threads, [&](int64_t i, int) {
      for (int64_t h = 0; h < p.heads; ++h) {
        float row[256];
        load(x.d_out(i, h), p.dim, row);
        float& delta = p.delta[i * p.heads + h];
        delta = dot(row, static_cast<const T*>(p.out) + (i * p.heads + h) * p.dim, p.dim) - delta;
        backward_query(x, i, h);
      }
    });
    parallel_for(p.keys.size, p.threads, [&](int64_t j, int) {
      for (int64_t g = 0; g < p.kv_heads; ++g) backward_key(x, j, g);
    });
  });
}

}  // namespace moca::MOCA_ISA

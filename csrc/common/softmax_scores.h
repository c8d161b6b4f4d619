// Softmax cross entropy over the scores x . w^T, without the matrix of scores: the common part of
// linear_cross_entropy and info_nce.
//
// Forward: for a chunk of columns (packed once) every block of rows makes its tile of scores and
// folds it into the running peak and sum of its rows. Backward: tiles are made again, turned into
// gradients of the scores, kept for one chunk x region at a time, and multiplied with w and x.
// Every output element is summed by one task in a fixed order, whatever the number of threads.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "common/exp.h"
#include "common/gemm.h"
#include "common/parallel.h"

namespace moca::MOCA_ISA {

constexpr int64_t kBlock = 48;             // rows (or columns) of one task
constexpr int64_t kChunk = 3 * kDepth;     // columns whose panels are packed together
constexpr int64_t kDimBlock = 2 * kDepth;  // dims of one task of the gradient of w

// score(i, j) = (x[i] . w[j] + bias[j]) / divisor, or -inf where the ids of row and column agree
// and j is not the row's target. Row i of the problem is row index[i] of x and of all row arrays.
template <typename T>
struct Scores {
  const T* x;
  const T* w;
  const T* bias;           // (cols,) or null
  const int64_t* index;    // (rows,) or null
  const int64_t* target;   // column of each row of x
  const int64_t* row_ids;  // or null
  const int64_t* col_ids;  // (cols,)
  int64_t rows, cols, dim;
  float divisor;
  int threads;
  int64_t source(int64_t i) const { return index ? index[i] : i; }
};

constexpr float kMasked = -std::numeric_limits<float>::infinity();

struct RowStats {
  float peak = kMasked;
  double sum = 0.0;  // of exp(score - peak)
  float own = 0.0f;  // the target's score
  double lse() const { return peak + std::log(sum); }
  // log(sum) + (peak - own), not lse - own: nothing cancels where the target has the top score.
  float loss() const { return static_cast<float>(std::log(sum) + (double{peak} - own)); }
};

// Folds `cols` more scores into the statistics of their row.
inline void fold(RowStats& stats, const float* scores, int64_t cols) {
  Lanes top = broadcast(stats.peak);
  for (int64_t j = 0; j < cols; j += kLanes) {
    const Lanes x = load(scores + j);
    top = x > top ? x : top;
  }
  const float peak = largest(top);
  const float base = peak == kMasked ? 0.0f : peak;
  Lanes sum = {};
  for (int64_t j = 0; j < cols; j += kLanes) sum += exp_lanes(load(scores + j) - base);
  stats.sum =
      (stats.sum == 0.0 ? 0.0 : stats.sum * std::exp(double{stats.peak} - base)) + sum_of(sum);
  stats.peak = peak;
}

// The tile of scores of `rows` rows from `first` and `cols` columns from `chunk`; the columns
// that fill up the last vector are masked.
template <typename T>
void score_tile(const Scores<T>& s, int64_t first, int64_t rows, int64_t chunk, int64_t cols,
                const float* w_panels, float* x_panels, float* tile, int64_t stride) {
  pack_rows<kTileRows>(Rows<T>{s.x, s.dim, s.index}, first, rows, s.dim, x_panels);
  multiply(rows, cols, s.dim, x_panels, w_panels, tile, stride, false);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = s.source(first + i);
    float* scores = tile + i * stride;
    if (s.bias)
      for (int64_t j = 0; j < cols; ++j) scores[j] += to_float(s.bias[chunk + j]);
    if (s.divisor != 1.0f)
      for (int64_t j = 0; j < cols; ++j) scores[j] /= s.divisor;
    if (s.row_ids) {
      const int64_t id = s.row_ids[row], own = s.target[row] - chunk;
      for (int64_t j = 0; j < cols; ++j)
        scores[j] = s.col_ids[chunk + j] == id && j != own ? kMasked : scores[j];
    }
    std::fill(scores + cols, scores + round_up(cols, kLanes), kMasked);
  }
}

template <typename T>
void softmax_forward(const Scores<T>& s, std::vector<RowStats>& stats) {
  const int64_t width = std::min(kChunk, s.cols), blocks = ceil_div(s.rows, kBlock);
  const int64_t stride = round_up(width, kLanes) + kLanes;
  const int threads = static_cast<int>(std::min<int64_t>(std::max(s.threads, 1), blocks));
  Buffer w_panels(round_up(width, kTileCols) * s.dim);
  Buffer x_panels(threads * kBlock * s.dim), tiles(threads * kBlock * stride);
  for (int64_t chunk = 0; chunk < s.cols && s.rows > 0; chunk += kChunk) {
    const int64_t cols = std::min(kChunk, s.cols - chunk);
    parallel_for(ceil_div(cols, kTileCols), s.threads, [&](int64_t panel, int) {
      const int64_t j = panel * kTileCols;
      pack_rows<kTileCols>(Rows<T>{s.w, s.dim}, chunk + j, std::min<int64_t>(kTileCols, cols - j),
                           s.dim, w_panels.get() + j * s.dim);
    });
    parallel_for(blocks, threads, [&](int64_t block, int thread) {
      const int64_t first = block * kBlock, rows = std::min(kBlock, s.rows - first);
      float* tile = tiles.get() + thread * kBlock * stride;
      score_tile(s, first, rows, chunk, cols, w_panels.get(),
                 x_panels.get() + thread * kBlock * s.dim, tile, stride);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t own = s.target[s.source(first + i)] - chunk;
        if (own >= 0 && own < cols) stats[first + i].own = tile[i * stride + own];
        fold(stats[first + i], tile + i * stride, cols);
      }
    });
  }
}

// exp(score - lse), with lse in two floats: rounded to one it would shift the whole row.
struct Probability {
  explicit Probability(double lse)
      : high(static_cast<float>(lse)), low(static_cast<float>(lse - high)) {}
  Lanes operator()(Lanes score) const { return exp_lanes((score - high) - low); }
  float high, low;
};

// What the backward reads and writes; a null pointer is a gradient that is not needed.
template <typename T>
struct ScoreGradients {
  const double* lse;    // of each row of x
  const float* d_loss;  // of each row of x
  float* d_x;           // (rows, dim) of the problem; overwritten
  T* d_w;               // (cols, dim)
  T* d_bias;            // (cols,)
  double* moment;       // (rows,) sum over columns of score * d_score; added to
};

// Scores of one row become the gradient of their numerators (score * divisor).
template <typename T>
void differentiate(const Scores<T>& s, const ScoreGradients<T>& g, int64_t i, int64_t chunk,
                   int64_t cols, float* scores) {
  const int64_t row = s.source(i), own = s.target[row] - chunk;
  const bool has_own = own >= 0 && own < cols;
  const float own_score = has_own ? scores[own] : 0.0f;
  const Probability probability(g.lse[row]);
  const float scale = g.d_loss[row] / s.divisor;
  Lanes sum = {};
  for (int64_t j = 0; j < cols; j += kLanes) {
    const Lanes score = load(scores + j), p = probability(score);
    sum += p == 0.0f ? Lanes{} : p * score;  // a masked score is -inf
    store(scores + j, p * scale);
  }
  if (g.moment) g.moment[i] += g.d_loss[row] * (double{sum_of(sum)} - own_score);
  if (has_own) scores[own] = (probability(broadcast(own_score))[0] - 1.0f) * scale;
}

template <typename T>
class SoftmaxBackward {
 public:
  SoftmaxBackward(const Scores<T>& scores, const ScoreGradients<T>& gradients)
      : s(scores),
        g(gradients),
        width(std::min(kChunk, s.cols)),
        region(std::min(s.rows, kChunk * ceil_div(s.threads, kChunk / kBlock))),
        stride(round_up(width, kLanes) + kLanes),
        scratch_size(kBlock * std::max({s.dim, round_up(width, kTileRows), region})),
        w_rows(round_up(width, kTileCols) * s.dim),
        w_columns(g.d_x ? width * round_up(s.dim, kTileCols) : 0),
        x_columns(g.d_w ? region * round_up(s.dim, kTileCols) : 0),
        d_scores(region * stride),
        d_w(g.d_w ? width * s.dim : 0),
        d_bias(g.d_bias ? width : 0),
        scratch(std::max(s.threads, 1) * scratch_size) {}

  void run() {
    for (chunk = 0; chunk < s.cols; chunk += kChunk) {
      cols = std::min(kChunk, s.cols - chunk);
      pack_w();
      for (first = 0; first < s.rows; first += region) {
        rows = std::min(region, s.rows - first);
        parallel_for(ceil_div(rows, kBlock), s.threads,
                     [&](int64_t block, int thread) { row_task(block * kBlock, thread); });
        if (g.d_w || g.d_bias) column_tasks();
      }
      store();
    }
  }

 private:
  float* scratch_of(int thread) const { return scratch.get() + thread * scratch_size; }

  void pack_w() {
    const Rows<T> w{s.w, s.dim};
    parallel_for(ceil_div(cols, kTileCols), s.threads, [&](int64_t panel, int) {
      const int64_t j = panel * kTileCols, count = std::min<int64_t>(kTileCols, cols - j);
      pack_rows<kTileCols>(w, chunk + j, count, s.dim, w_rows.get() + j * s.dim);
      if (g.d_x) pack_columns<kTileCols>(w, chunk + j, count, s.dim, cols, j, w_columns.get());
    });
  }

  // Gradients of the scores of a block of rows, and what they add to the gradient of x.
  void row_task(int64_t start, int thread) {
    const int64_t count = std::min(kBlock, rows - start);
    float* tile = d_scores.get() + start * stride;
    float* panels = scratch_of(thread);
    score_tile(s, first + start, count, chunk, cols, w_rows.get(), panels, tile, stride);
    for (int64_t i = 0; i < count; ++i)
      differentiate(s, g, first + start + i, chunk, cols, tile + i * stride);
    if (g.d_x) {
      pack_rows<kTileRows>(Rows<float>{tile, stride}, 0, count, cols, panels);
      multiply(count, s.dim, cols, panels, w_columns.get(), g.d_x + (first + start) * s.dim, s.dim,
               chunk > 0);
    }
    if (g.d_w)
      pack_columns<kTileCols>(Rows<T>{s.x, s.dim, s.index}, first + start, count, s.dim, rows,
                              start, x_columns.get());
  }

  // What the region's rows add to the gradients of w and bias.
  void column_tasks() {
    const int64_t dim_blocks = g.d_w ? ceil_div(s.dim, kDimBlock) : 1;
    parallel_for(ceil_div(cols, kBlock) * dim_blocks, s.threads, [&](int64_t task, int thread) {
      const int64_t start = task / dim_blocks * kBlock, dim_start = task % dim_blocks * kDimBlock;
      const int64_t count = std::min(kBlock, cols - start);
      if (g.d_bias && dim_start == 0) add_columns(start, count);
      if (!g.d_w) return;
      float* panels = scratch_of(thread);
      pack_columns<kTileRows>(Rows<float>{d_scores.get() + start, stride}, 0, rows, count, rows, 0,
                              panels);
      multiply(count, std::min(kDimBlock, s.dim - dim_start), rows, panels,
               x_columns.get() + dim_start * rows, d_w.get() + start * s.dim + dim_start, s.dim,
               first > 0);
    });
  }

  void add_columns(int64_t start, int64_t count) {
    for (int64_t slice = 0; slice < rows; slice += kChunk) {
      float sum[kBlock] = {};
      for (int64_t i = slice; i < std::min(rows, slice + kChunk); ++i)
        for (int64_t j = 0; j < count; ++j) sum[j] += d_scores.get()[i * stride + start + j];
      float* to = d_bias.get() + start;
      for (int64_t j = 0; j < count; ++j) to[j] = first + slice > 0 ? to[j] + sum[j] : sum[j];
    }
  }

  void store() {
    if (g.d_bias)
      for (int64_t j = 0; j < cols; ++j)
        g.d_bias[chunk + j] = from_float<T>(s.rows ? d_bias.get()[j] : 0.0f);
    if (!g.d_w) return;
    parallel_for(ceil_div(cols, kBlock), s.threads, [&](int64_t block, int) {
      const int64_t begin = block * kBlock * s.dim;
      const int64_t end = std::min(cols, (block + 1) * kBlock) * s.dim;
      for (int64_t e = begin; e < end; ++e)
        g.d_w[chunk * s.dim + e] = from_float<T>(s.rows ? d_w.get()[e] : 0.0f);
    });
  }

  const Scores<T>& s;
  const ScoreGradients<T>& g;
  const int64_t width, region, stride, scratch_size;
  const Buffer w_rows, w_columns;  // panels of a chunk of w, for the scores and for d_x
  const Buffer x_columns;          // panels of a region of x, for d_w
  const Buffer d_scores, d_w, d_bias, scratch;
  int64_t chunk = 0, cols = 0, first = 0, rows = 0;
};

template <typename T>
void softmax_backward(const Scores<T>& scores, const ScoreGradients<T>& gradients) {
  SoftmaxBackward<T>(scores, gradients).run();
}

}  // namespace moca::MOCA_ISA

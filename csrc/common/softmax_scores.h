// Softmax cross entropy over the scores x . w^T, without the matrix of scores: the common part of
// linear_cross_entropy and info_nce.
//
// Forward: for a chunk of columns (packed once) every block of rows makes its tile of scores and
// folds it into the running peak and sum of its rows. Backward: tiles are made again, turned into
// gradients of the scores, kept for one chunk x region at a time, and multiplied with w and x.
// (common/held_scores.h does both at once for some rows.) Where the processor multiplies bfloat16,
// gradients of bfloat16 scores are rounded to it first, as plain torch does; scores, probabilities
// and all sums are float32. Every output element is summed by one task in a fixed order, whatever
// the number of threads.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/exp.h"
#include "common/gemm.h"
#include "common/parallel.h"

namespace moca::MOCA_ISA {

// Rows (or columns) of one task.
template <typename T>
constexpr int64_t kBlock = kInTiles<WordOf<T>> ? 64 : 48;
constexpr int64_t kDimBlock = 1024;  // dims of one task of the gradient of w

// Most columns whose panels are packed together.
template <typename T>
constexpr int64_t kChunk = 384 * kPerWord<WordOf<T>>;  // a multiple of kDepth words
template <typename T>
constexpr int64_t kPitch = product_pitch(kChunk<T>);  // from row to row of a tile

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

// Columns whose panels are packed together: half of the most where three panels, of which w has
// two, would pass `kSmall` and a 32nd of the array of scores. Products in tile registers are so
// fast that packing and sums of half the width cost more. Sums are cut at the same places whatever
// the region.
template <typename T>
int64_t chunk_width(const Scores<T>& s) {
  constexpr int64_t kSmall = int64_t{kInTiles<WordOf<T>> ? 16 : 4} << 20;  // bytes
  const int64_t panel = kChunk<T> * words<WordOf<T>>(s.dim) * sizeof(WordOf<T>);
  const int64_t scores = s.rows * s.cols * sizeof(T);
  return 3 * panel <= std::max(kSmall, scores / 32) ? kChunk<T> : kChunk<T> / 2;
}

// Rows whose gradients are held together: about as many as columns, or enough for every thread, so
// that no small region is left at the end.
template <typename T>
int64_t region_height(const Scores<T>& s) {
  const int64_t usual = std::max(chunk_width(s), s.threads * kBlock<T>);
  const int64_t regions = std::max<int64_t>(1, (s.rows + usual / 2) / usual);
  constexpr int64_t kStep = kDepth<WordOf<T>> * kPerWord<WordOf<T>>;
  return std::min(s.rows, round_up(ceil_div(s.rows, regions), kStep));
}

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

// What one kernel packs and where it keeps it.
template <typename T>
struct Panels {
  using Word = WordOf<T>;
  explicit Panels(int64_t size) : buffer(size) {}
  Word* operator+(int64_t offset) const { return reinterpret_cast<Word*>(buffer.get()) + offset; }
  Buffer buffer;
};

// Products of row i with `cols` columns from `chunk` become scores; the columns that fill up the
// last panel are masked.
template <typename T>
void finish_scores(const Scores<T>& s, int64_t i, int64_t chunk, int64_t cols, float* scores) {
  const int64_t row = s.source(i);
  if (s.bias)
    for (int64_t j = 0; j < cols; ++j) scores[j] += to_float(s.bias[chunk + j]);
  if (s.divisor != 1.0f)
    for (int64_t j = 0; j < cols; ++j) scores[j] /= s.divisor;
  if (s.row_ids) {
    const int64_t id = s.row_ids[row], own = s.target[row] - chunk;
    for (int64_t j = 0; j < cols; ++j)
      scores[j] = s.col_ids[chunk + j] == id && j != own ? kMasked : scores[j];
  }
  std::fill(scores + cols, scores + round_up(cols, kTileCols), kMasked);
}

// The tile of scores, rows kPitch apart, of `rows` rows from `first` and `cols` columns from
// `chunk`.
template <typename T>
void score_tile(const Scores<T>& s, int64_t first, int64_t rows, int64_t chunk, int64_t cols,
                const WordOf<T>* w_panels, WordOf<T>* x_panels, float* tile) {
  pack_rows<Side::left>(Rows<T>{s.x, s.dim, s.index}, first, rows, s.dim, x_panels);
  multiply(rows, cols, s.dim, x_panels, w_panels, tile, kPitch<T>, false);
  for (int64_t i = 0; i < rows; ++i) finish_scores(s, first + i, chunk, cols, tile + i * kPitch<T>);
}

template <typename T>
void softmax_forward(const Scores<T>& s, std::vector<RowStats>& stats) {
  const int64_t blocks = ceil_div(s.rows, kBlock<T>), depth = words<WordOf<T>>(s.dim);
  const int threads = static_cast<int>(std::min<int64_t>(std::max(s.threads, 1), blocks));
  const int64_t width = std::min(chunk_width(s), s.cols);
  const Panels<T> w_panels(round_up(width, kTileCols) * depth);
  const Panels<T> x_panels(threads * kBlock<T> * depth);
  const Buffer tiles(threads * kBlock<T> * kPitch<T>);
  for (int64_t chunk = 0; chunk < s.cols && s.rows > 0; chunk += width) {
    const int64_t cols = std::min(width, s.cols - chunk);
    parallel_for(ceil_div(cols, kTileCols), s.threads, [&](int64_t panel, int) {
      const int64_t j = panel * kTileCols;
      pack_rows<Side::right>(Rows<T>{s.w, s.dim}, chunk + j, std::min<int64_t>(kTileCols, cols - j),
                             s.dim, w_panels + j * depth);
    });
    parallel_for(blocks, threads, [&](int64_t block, int thread) {
      const TileRegisters registers;
      const int64_t first = block * kBlock<T>, rows = std::min(kBlock<T>, s.rows - first);
      float* const tile = tiles.get() + thread * kBlock<T> * kPitch<T>;
      score_tile(s, first, rows, chunk, cols, w_panels + 0, x_panels + thread * kBlock<T> * depth,
                 tile);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t own = s.target[s.source(first + i)] - chunk;
        const float* scores = tile + i * kPitch<T>;
        if (own >= 0 && own < cols) stats[first + i].own = scores[own];
        fold(stats[first + i], scores, cols);
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
  float* d_x;           // (rows, dim) of the problem, rows d_x_pitch apart; overwritten
  int64_t d_x_pitch;
  T* d_w;               // (cols, dim)
  T* d_bias;            // (cols,)
  double* moment;       // (rows,) sum over columns of (score - anchor) * d_score; added to
  const float* anchor;  // (rows,) of the moments: any value, best one close to the target's score
};

// Gradients of scores are multiplied in bfloat16 where their operands are.
template <typename T>
using ScoreGradient = std::conditional_t<kPerWord<WordOf<T>> == 2, T, float>;

inline void store_gradients(float* to, Lanes low, Lanes high) {
  store(to, low);
  store(to + kLanes, high);
}
#ifdef __AVX512BF16__
inline void store_gradients(bfloat16* to, Lanes low, Lanes high) {
  const Lanes both = neighbours<Bfloat16Pair>(low, high);
  std::memcpy(to, &both, sizeof both);
}
#endif

// Scores of one row become the gradient of their numerators (score * divisor), which may take their
// place.
template <typename T>
void differentiate(const Scores<T>& s, const ScoreGradients<T>& g, int64_t i, int64_t chunk,
                   int64_t cols, const float* scores, ScoreGradient<T>* d_scores) {
  const int64_t row = s.source(i), own = s.target[row] - chunk;
  const Probability probability(g.lse[row]);
  const bool owned = own >= 0 && own < cols;
  const float own_score = owned ? scores[own] : 0.0f, scale = g.d_loss[row] / s.divisor;
  const float anchor = g.moment ? g.anchor[i] : 0.0f;
  Lanes sum = {};
  for (int64_t j = 0; j < cols; j += kTileCols) {
    Lanes d[2];
    for (int part = 0; part < 2; ++part) {
      const Lanes score = load(scores + j + part * kLanes), p = probability(score);
      sum += p == 0.0f ? Lanes{} : p * (score - anchor);  // a masked score is -inf
      d[part] = p * scale;
    }
    store_gradients(d_scores + j, d[0], d[1]);
  }
  double moment = sum_of(sum);
  if (owned) {
    const float minus_one = static_cast<float>(std::expm1(own_score - g.lse[row]));
    d_scores[own] = from_float<ScoreGradient<T>>(minus_one * scale);
    moment -= double{own_score} - anchor;
  }
  if (g.moment) g.moment[i] += g.d_loss[row] * moment;
}

template <typename T>
class SoftmaxBackward {
  using Word = WordOf<T>;

 public:
  SoftmaxBackward(const Scores<T>& scores, const ScoreGradients<T>& gradients)
      : s(scores),
        g(gradients),
        width(std::min(chunk_width(s), s.cols)),
        region(region_height(s)),
        d_w_pitch(kInPlace ? s.dim : product_pitch(s.dim)),
        scratch_size(kBlock<T> *
                     std::max({words<Word>(s.dim), words<Word>(width), words<Word>(region)})),
        w_rows(round_up(width, kTileCols) * words<Word>(s.dim)),
        w_columns(g.d_x ? words<Word>(width) * round_up(s.dim, kTileCols) : 0),
        x_columns(g.d_w ? words<Word>(region) * round_up(s.dim, kTileCols) : 0),
        scratch(std::max(s.threads, 1) * scratch_size),
        d_scores(words<Word>(region * kPitch<T>)),
        tiles(std::max(s.threads, 1) * kBlock<T> * kPitch<T>),
        d_w(g.d_w && !kInPlace ? width * d_w_pitch : 0),
        d_bias(g.d_bias ? width : 0) {}

  void run() {
    for (chunk = 0; chunk < s.cols; chunk += width) {
      cols = std::min(width, s.cols - chunk);
      pack_w();
      for (first = 0; first < s.rows; first += region) {
        rows = std::min(region, s.rows - first);
        parallel_for(ceil_div(rows, kBlock<T>), s.threads,
                     [&](int64_t block, int thread) { row_task(block * kBlock<T>, thread); });
        if (g.d_w || g.d_bias) column_tasks();
      }
      store();
    }
  }

 private:
  static constexpr bool kInPlace = std::is_same_v<T, float>;  // d_w is summed where it belongs

  const ScoreGradient<T>* gradient(int64_t row) const {
    return reinterpret_cast<ScoreGradient<T>*>(d_scores.get()) + row * kPitch<T>;
  }

  float* d_w_row(int64_t j) const {
    if constexpr (kInPlace) return g.d_w + (chunk + j) * d_w_pitch;
    return d_w.get() + j * d_w_pitch;
  }

  void pack_w() {
    const Rows<T> w{s.w, s.dim};
    parallel_for(ceil_div(cols, kTileCols), s.threads, [&](int64_t panel, int) {
      const int64_t j = panel * kTileCols, count = std::min<int64_t>(kTileCols, cols - j);
      pack_rows<Side::right>(w, chunk + j, count, s.dim, w_rows + j * words<Word>(s.dim));
      if (g.d_x) pack_columns<Side::right>(w, chunk + j, count, s.dim, cols, j, w_columns + 0);
    });
  }

  // Gradients of the scores of a block of rows, and what they add to the gradient of x.
  void row_task(int64_t start, int thread) {
    const TileRegisters registers;
    const int64_t count = std::min(kBlock<T>, rows - start);
    float* const tile = tiles.get() + thread * kBlock<T> * kPitch<T>;
    Word* panels = scratch + thread * scratch_size;
    score_tile(s, first + start, count, chunk, cols, w_rows + 0, panels, tile);
    auto* d_tile = const_cast<ScoreGradient<T>*>(gradient(start));
    for (int64_t i = 0; i < count; ++i)
      differentiate(s, g, first + start + i, chunk, cols, tile + i * kPitch<T>,
                    d_tile + i * kPitch<T>);
    if (g.d_x) {
      pack_rows<Side::left>(Rows<ScoreGradient<T>>{d_tile, kPitch<T>}, 0, count, cols, panels);
      multiply(count, s.dim, cols, panels, w_columns + 0, g.d_x + (first + start) * g.d_x_pitch,
               g.d_x_pitch, chunk > 0);
    }
    if (g.d_w)
      pack_columns<Side::right>(Rows<T>{s.x, s.dim, s.index}, first + start, count, s.dim, rows,
                                start, x_columns + 0);
  }

  // What the region's rows add to the gradients of w and bias.
  void column_tasks() {
    const int64_t dim_blocks = g.d_w ? ceil_div(s.dim, kDimBlock) : 1;
    parallel_for(ceil_div(cols, kBlock<T>) * dim_blocks, s.threads, [&](int64_t task, int thread) {
      const int64_t start = task / dim_blocks * kBlock<T>,
                    dim_start = task % dim_blocks * kDimBlock;
      const int64_t count = std::min(kBlock<T>, cols - start);
      if (g.d_bias && dim_start == 0) add_columns(start, count);
      if (!g.d_w) return;
      const TileRegisters registers;
      Word* panels = scratch + thread * scratch_size;
      pack_columns<Side::left>(Rows<ScoreGradient<T>>{gradient(0) + start, kPitch<T>}, 0, rows,
                               count, rows, 0, panels);
      multiply(count, std::min(kDimBlock, s.dim - dim_start), rows, panels,
               x_columns + dim_start * words<Word>(rows), d_w_row(start) + dim_start, d_w_pitch,
               first > 0);
    });
  }

  void add_columns(int64_t start, int64_t count) {
    double* sum = d_bias.data() + start;
    if (first == 0) std::fill(sum, sum + count, 0.0);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < count; ++j) sum[j] += to_float(gradient(i)[start + j]);
  }

  void store() {
    if (g.d_bias)
      for (int64_t j = 0; j < cols; ++j)
        g.d_bias[chunk + j] = from_float<T>(s.rows ? static_cast<float>(d_bias[j]) : 0.0f);
    if (!g.d_w || (kInPlace && s.rows)) return;
    parallel_for(ceil_div(cols, kBlock<T>), s.threads, [&](int64_t block, int) {
      for (int64_t j = block * kBlock<T>; j < std::min(cols, (block + 1) * kBlock<T>); ++j) {
        const float* from = d_w_row(j);
        T* to = g.d_w + (chunk + j) * s.dim;
        for (int64_t d = 0; d < s.dim; ++d) to[d] = from_float<T>(s.rows ? from[d] : 0.0f);
      }
    });
  }

  const Scores<T>& s;
  const ScoreGradients<T>& g;
  const int64_t width, region, d_w_pitch, scratch_size;
  const Panels<T> w_rows, w_columns;  // a chunk of w, for the scores and for d_x
  const Panels<T> x_columns;          // a region of x, for d_w
  const Panels<T> scratch;            // of each thread
  const Buffer d_scores, tiles, d_w;
  std::vector<double> d_bias;
  int64_t chunk = 0, cols = 0, first = 0, rows = 0;
};

template <typename T>
void softmax_backward(const Scores<T>& scores, const ScoreGradients<T>& gradients) {
  SoftmaxBackward<T>(scores, gradients).run();
}

}  // namespace moca::MOCA_ISA

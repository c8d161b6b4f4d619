// Softmax cross entropy and its gradients together, of so few rows that all of their scores are
// held: three products in place of the four of common/softmax_scores.h, and every operand is packed
// by the task that needs it, so that nothing waits but for whole matrices.
//
//   scores       tasks of columns        x . w^T
//   rows         tasks of rows           logsumexp and loss; scores become gradients in place
//   d_w, d_bias  tasks of columns        d_scores^T . x
//   d_x          tasks of dims and rows  d_scores . w
#pragma once

#include "common/softmax_scores.h"

namespace moca::MOCA_ISA {

template <typename T>
class HeldScores {
  using Word = WordOf<T>;
  using Gradient = ScoreGradient<T>;

 public:
  // Room for `rows` of the rows of `s`.
  HeldScores(const Scores<T>& s, int64_t rows)
      : pitch(product_pitch(round_up(s.cols, kTileCols))),
        sums_at(kBlock<T> * words<Word>(rows)),
        scratch_size(std::max({kCols * words<Word>(s.dim), sums_at + kBlock<T> * kSumPitch,
                               (kDims + kBlock<T>)*words<Word>(kSome)})),
        scores(rows * pitch),
        x_rows(round_up(rows, kTileRows<Word>) * words<Word>(s.dim)),
        x_columns(words<Word>(rows) * round_up(s.dim, kTileCols)),
        scratch(std::max(s.threads, 1) * scratch_size) {}

  // Losses and gradients of the rows of `s`. What they give to w and bias is added to what is there
  // if `add` says so: in float32, as other dtypes would round each sum. finish(i, stats) makes row
  // i's loss and g.lse of its statistics.
  template <typename Finish>
  void run(const Scores<T>& s, const ScoreGradients<T>& g, bool add, Finish&& finish) {
    pack_x(s, g);
    make_scores(s);
    parallel_for(s.rows, s.threads, [&](int64_t i, int) {
      RowStats stats;
      stats.own = row(i)[s.target[s.source(i)]];
      for_chunks(s, [&](int64_t chunk, int64_t cols) { fold(stats, row(i) + chunk, cols); });
      finish(i, stats);
      for_chunks(s, [&](int64_t chunk, int64_t cols) {
        differentiate(s, g, i, chunk, cols, row(i) + chunk, gradient(i) + chunk);
      });
    });
    if (g.d_w || g.d_bias) sum_columns(s, g, add);
    if (g.d_x) make_d_x(s, g);
  }

 private:
  static constexpr int64_t kCols = 4 * kTileCols;  // columns of one task of the scores
  static constexpr int64_t kSumPitch = product_pitch(kDimBlock);   // of sums of d_w
  static constexpr int64_t kDims = 512;                            // dims of one task of d_x
  static constexpr int64_t kSome = kDepth<Word> * kPerWord<Word>;  // columns it packs at a time

  // Calls body(chunk, cols) for parts of a row that are short enough to be summed in float32.
  template <typename Body>
  static void for_chunks(const Scores<T>& s, Body&& body) {
    for (int64_t chunk = 0; chunk < s.cols; chunk += kChunk<T>)
      body(chunk, std::min(kChunk<T>, s.cols - chunk));
  }

  float* row(int64_t i) const { return scores.get() + i * pitch; }
  Gradient* gradient(int64_t i) const { return reinterpret_cast<Gradient*>(row(i)); }
  Rows<Gradient> gradients(int64_t column) const {
    return {gradient(0) + column, pitch * int64_t{sizeof(float) / sizeof(Gradient)}};
  }
  Word* panels(int thread) const { return scratch + thread * scratch_size; }

  void pack_x(const Scores<T>& s, const ScoreGradients<T>& g) {
    const Rows<T> x{s.x, s.dim, s.index};
    parallel_for(ceil_div(s.rows, kBlock<T>), s.threads, [&](int64_t block, int) {
      const int64_t first = block * kBlock<T>, count = std::min(kBlock<T>, s.rows - first);
      pack_rows<Side::left>(x, first, count, s.dim, x_rows + first * words<Word>(s.dim));
      if (g.d_w) pack_columns<Side::right>(x, first, count, s.dim, s.rows, first, x_columns + 0);
    });
  }

  void make_scores(const Scores<T>& s) {
    parallel_for(ceil_div(s.cols, kCols), s.threads, [&](int64_t task, int thread) {
      const TileRegisters registers;
      const int64_t first = task * kCols, cols = std::min(kCols, s.cols - first);
      pack_rows<Side::right>(Rows<T>{s.w, s.dim}, first, cols, s.dim, panels(thread));
      multiply(s.rows, cols, s.dim, x_rows + 0, panels(thread), row(0) + first, pitch, false);
      for (int64_t i = 0; i < s.rows; ++i) finish_scores(s, i, first, cols, row(i) + first);
    });
  }

  void sum_columns(const Scores<T>& s, const ScoreGradients<T>& g, bool add) {
    const int64_t parts = g.d_w ? ceil_div(s.dim, kDimBlock) : 1;
    parallel_for(ceil_div(s.cols, kBlock<T>) * parts, s.threads, [&](int64_t task, int thread) {
      const int64_t first = task / parts * kBlock<T>, cols = std::min(kBlock<T>, s.cols - first);
      const int64_t begin = task % parts * kDimBlock, dims = std::min(kDimBlock, s.dim - begin);
      if (g.d_bias && begin == 0) add_to_bias(s, g.d_bias + first, first, cols, add);
      if (!g.d_w) return;
      const TileRegisters registers;
      T* const d_w = g.d_w + first * s.dim + begin;
      pack_columns<Side::left>(gradients(first), 0, s.rows, cols, s.rows, 0, panels(thread));
      const auto multiply_into = [&](float* sums, int64_t stride) {
        multiply(cols, dims, s.rows, panels(thread), x_columns + begin * words<Word>(s.rows), sums,
                 stride, add);
      };
      if constexpr (std::is_same_v<T, float>) {
        multiply_into(d_w, s.dim);
      } else {
        float* const sums = reinterpret_cast<float*>(panels(thread) + sums_at);
        multiply_into(sums, kSumPitch);
        for (int64_t j = 0; j < cols; ++j)
          for (int64_t d = 0; d < dims; ++d)
            d_w[j * s.dim + d] = from_float<T>(sums[j * kSumPitch + d]);
      }
    });
  }

  void add_to_bias(const Scores<T>& s, T* d_bias, int64_t first, int64_t cols, bool add) {
    double sum[kBlock<T>] = {};
    for (int64_t i = 0; i < s.rows; ++i)
      for (int64_t j = 0; j < cols; ++j) sum[j] += to_float(gradient(i)[first + j]);
    for (int64_t j = 0; j < cols; ++j)
      d_bias[j] = from_float<T>(static_cast<float>(add ? sum[j] + to_float(d_bias[j]) : sum[j]));
  }

  void make_d_x(const Scores<T>& s, const ScoreGradients<T>& g) {
    // Every slice packs d_scores again and every part w: no more than give all threads work.
    const int64_t threads = std::max(s.threads, 1), blocks = ceil_div(s.rows, kBlock<T>);
    const int64_t width = std::clamp(round_up(ceil_div(s.dim, threads), 2 * kTileCols),
                                     int64_t{2 * kTileCols}, kDims);
    const int64_t slices = std::max<int64_t>(1, ceil_div(s.dim, width));
    const int64_t parts = std::min(blocks, ceil_div(threads, slices));
    const int64_t height = ceil_div(blocks, parts) * kBlock<T>;
    parallel_for(slices * ceil_div(s.rows, height), s.threads, [&](int64_t task, int thread) {
      const TileRegisters registers;
      const int64_t begin = task % slices * width, dims = std::min(width, s.dim - begin);
      const int64_t top = task / slices * height, end = std::min(s.rows, top + height);
      Word* const w = panels(thread);
      Word* const d_scores = w + kDims * words<Word>(kSome);
      for (int64_t column = 0; column < s.cols; column += kSome) {
        const int64_t cols = std::min(kSome, s.cols - column);
        pack_columns<Side::right>(Rows<T>{s.w + begin, s.dim}, column, cols, dims, cols, 0, w);
        for (int64_t first = top; first < end; first += kBlock<T>) {
          const int64_t count = std::min(kBlock<T>, end - first);
          pack_rows<Side::left>(gradients(column), first, count, cols, d_scores);
          multiply(count, dims, cols, d_scores, w, g.d_x + first * g.d_x_pitch + begin, g.d_x_pitch,
                   column > 0);
        }
      }
    });
  }

  const int64_t pitch;                  // floats from row to row of the scores
  const int64_t sums_at, scratch_size;  // words of a thread
  const Buffer scores;
  const Panels<T> x_rows, x_columns;  // for the scores and for d_w
  const Panels<T> scratch;            // of each thread
};

}  // namespace moca::MOCA_ISA

// The forward pass of a query tile: FlashAttention's recurrence (arXiv 2205.14135).
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "attention/cpu_memory.h"
#include "attention/cpu_spans.h"
#include "common/exp.h"

namespace moca::MOCA_ISA {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kHeads = 4;  // query heads that share one packing of keys

constexpr float kLog2E = 1.44269504088896341f;

// exp(scale * x) of weights that become words. Only what is multiplied in tiles has another scale
// than 1.
template <typename Word>
inline Lanes weight_of(Lanes x, [[maybe_unused]] float scale = 1.0f) {
#ifdef __AVX512BF16__
  if constexpr (kPerWord<Word> == 2) return exp2_for_bfloat16(x * (scale * kLog2E));
#endif
  return exp_lanes(x);
}

// Where scores are multiplied by softmax_scale: in their product, or, made in tiles, which have no
// place for it, in exponentials; those take it if it keeps the order of scores.
template <typename Word>
struct Scale {
  explicit Scale(float scale)
      : in_product(kInTiles<Word> && scale > 0 ? 1.0f : scale),
        later(kInTiles<Word> && scale > 0 ? scale : 1.0f) {}
  float in_product, later;
};

// `from` has whole vectors.
template <typename T>
void store_row(const float* from, float factor, int64_t dim, T* to) {
  for (; dim >= kLanes; dim -= kLanes, from += kLanes, to += kLanes) store(to, load(from) * factor);
  if (dim > 0) store_some(to, load(from) * factor, dim);
}

// A row that will be written soon.
template <typename T>
void fetch_row(const T* row, int64_t dim) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t d = 0; d < dim; d += kLine) __builtin_prefetch(row + d, 1);
}

struct HeadRange {
  int64_t first, last;
};

template <typename T>
class Forward {
 public:
  using Word = WordOf<T>;
  using Memory = ForwardMemory<Word>;

  explicit Forward(const AttentionParams& params)
      : p(params),
        width(round_up(p.dim, kPanel)),
        depth(words<Word>(p.dim)),
        scale(params.softmax_scale) {}

  // Some heads of the queries [begin, end), up to `most` at a time that share a key head.
  void run(int64_t begin, int64_t end, const HeadRange& heads, int64_t most, Memory& m) const {
    const TileRegisters registers;
    const int64_t group = p.heads / p.kv_heads;
    for (int64_t h = heads.first, next; h < heads.last; h = next) {
      next = std::min({h + most, (h / group + 1) * group, heads.last});
      for_each_document(p.queries, begin, end, [&](const Slice& slice) {
        const Head<T> v(p.v, p.v_strides, h / group, slice.key_begin, slice.key_end);
        const int64_t ahead = next < heads.last ? next - h : 0;
        if (!is_masked(p.queries, slice) || all_finite(v, p.dim))
          return run_slice(slice, {h, next}, ahead, m);
        for (int64_t i = slice.begin; i < slice.end; ++i)
          run_slice({i, i + 1, slice.key_begin, p.queries.end[i]}, {h, next}, ahead, m);
      });
    }
  }

  const AttentionParams& p;
  const int64_t width, depth;
  const Scale<Word> scale;

 private:
  // Some heads that share a key head; the thread is expected `ahead` heads on next, if not 0.
  void run_slice(const Slice& slice, const HeadRange& range, int64_t ahead, Memory& m) const {
    const int64_t size = slice.end - slice.begin, heads = range.last - range.first;
    const int64_t rows = round_up(size, kRows<Word>);  // of a head, in memory
    const int64_t group = p.heads / p.kv_heads, kv_head = range.first / group;
    const int64_t seen_begin = p.queries.start[slice.begin], seen_end = slice.key_end;
    if (seen_begin == seen_end) return clear_rows(slice, range);
    const Head<T> k(p.k, p.k_strides, kv_head, seen_begin, seen_end, ahead / group);
    const Head<T> v(p.v, p.v_strides, kv_head, seen_begin, seen_end, ahead / group);
    for (int64_t h = 0; h < heads; ++h)
      pack_left(Head<T>(p.q, p.q_strides, range.first + h, slice.begin, slice.end, ahead),
                slice.begin, slice.end, p.dim, m.queries_at(h * rows));
    std::fill_n(m.peaks.get(), heads * rows, -kInfinity);
    for (int64_t begin = slice.key_begin; begin < slice.key_end; begin += kColumns<Word>) {
      const int64_t end = std::min(begin + kColumns<Word>, slice.key_end);
      pack_dims(k, begin, end, p.dim, m.packed_keys());
      pack_tokens(v, begin, end, p.dim, m.packed_values());
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t r = 0; r < size; r += kRows<Word>)
          add_block(m, slice.begin + r, std::min<int64_t>(kRows<Word>, size - r), range.first + h,
                    h * rows + r, begin, end);
    }
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t r = 0; r < size; r += kLanes)
        finish_rows(m, h * rows + r, slice.begin + r, std::min<int64_t>(kLanes, size - r),
                    range.first + h);
  }

  // Rows that see no keys.
  void clear_rows(const Slice& slice, const HeadRange& range) const {
    for (int64_t i = slice.begin; i < slice.end; ++i)
      for (int64_t at = i * p.heads + range.first; at < i * p.heads + range.last; ++at) {
        std::fill_n(static_cast<T*>(p.out) + at * p.dim, p.dim, T{});
        p.lse[at] = -kInfinity;
        p.lse_rest[at] = 0.0f;
      }
  }

  // Folds keys [begin, end), which are packed, into the sums of `count` rows from `first`, of head
  // h, which are rows `at` .. of the thread's memory.
  void add_block(Memory& m, int64_t first, int64_t count, int64_t h, int64_t at, int64_t begin,
                 int64_t end) const {
    const Columns columns = visible_columns(p.queries, first, first + count - 1, begin, end);
    if (columns.begin >= columns.end) return;
    const bool has_sums = p.queries.start[first] < begin;  // of keys before these
    float* scores = m.scores.get();
    multiply(count, columns.vectors(), depth,
             Product<Word>{m.queries_at(at), m.packed_keys() + columns.begin * depth,
                           kPanel * depth, scores, kPitch, scale.in_product, true},
             false);
    const int64_t size = columns.end - columns.begin, offset = begin + columns.begin;
    for (int64_t r = 0; r < count; r += kLanes) {
      const int64_t rows = std::min<int64_t>(kLanes, count - r);
      Lanes tops[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) tops[i] = broadcast(-kInfinity);
      for (int64_t i = r; i < r + rows; ++i) {
        float* row = scores + i * kPitch;
        mask_row(row, p.queries.start[first + i] - offset, p.queries.end[first + i] - offset, size,
                 -kInfinity);
        tops[i - r] = tops_of(row, size);
      }
      raise_peaks(tops, rows, m, at + r);
    }
    for (int64_t r = 0; r < count; ++r) {
      if (r % kLanes == 0) keep_tiles_awake<Word>();
      soften(scores + r * kPitch, size, m, at + r, has_sums);
      if (p.queries.end[first + r] <= end) fetch_row(out_of(first + r, h), p.dim);
    }
    const int64_t skip = columns.begin / kPerWord<Word>;
    multiply(count, ceil_div(p.dim, kLanes), ceil_div(size, kPerWord<Word>),
             Product<Word>{reinterpret_cast<const Word*>(scores), m.packed_values() + skip * kPanel,
                           words<Word>(end - begin) * kPanel, m.sums.get() + at * width, width,
                           1.0f, true},
             has_sums);
  }

  // Lanes of which the largest is a row's largest score that is not NaN, or -inf.
  static Lanes tops_of(const float* scores, int64_t size) {
    Lanes top[2] = {broadcast(-kInfinity), broadcast(-kInfinity)};
    for (int64_t j = 0; j < size; j += kPanel) {
      top[0] = larger(load(scores + j), top[0]);
      top[1] = larger(load(scores + j + kLanes), top[1]);
    }
    return larger(top[0], top[1]);
  }

  // Online softmax: where a row's largest score is above its peak, it becomes the peak, and what
  // was summed relative to the old one shrinks.
  void raise_peaks(Lanes (&tops)[kLanes], int64_t rows, Memory& m, int64_t at) const {
    transpose(tops);
    Lanes top = tops[0];
#pragma GCC unroll 16
    for (int i = 1; i < kLanes; ++i) top = larger(top, tops[i]);
    const Lanes old = load(m.peaks.get() + at), peak = larger(top, old);
    store(m.peaks.get() + at, peak);
    // Relative to -inf, nothing but weights 0, or NaN, was summed: nothing to shrink.
    const auto shrinks = (peak > old) & (old > -kInfinity);
    const Lanes rise = shrinks ? (peak - old) * scale.later : Lanes{};
    if (largest(rise) == 0.0f) return;
    float shrink[kLanes];
    store(shrink, exp_lanes(-rise));
    int64_t rising[kLanes], count = 0;
    for (int64_t r = 0; r < rows; ++r) {
      rising[count] = r;
      count += shrink[r] < 1.0f;
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t r = rising[i];
      float *total = m.totals.get() + (at + r) * kLanes, *sums = m.sums.get() + (at + r) * width;
      store(total, load(total) * shrink[r]);
      for (int64_t d = 0; d < p.dim; d += kLanes) store(sums + d, load(sums + d) * shrink[r]);
    }
  }

  // Scores of a row become weights exp(score - peak), in words.
  void soften(float* scores, int64_t size, Memory& m, int64_t at, bool has_sums) const {
    const float peak = m.peaks.get()[at];
    const float shift = peak == -kInfinity ? 0.0f : peak;  // only -inf, or NaN, so far
    Lanes sum = {};
    Word* words = reinterpret_cast<Word*>(scores);
    for (int64_t j = 0; j < size; j += kLanes * kPerWord<Word>) {
      const Lanes weight = weight_of<Word>(load(scores + j) - shift, scale.later);
      if constexpr (kPerWord<Word> == 1) {
        sum += weight;
        store_words(words + j, weight);
      } else {
        const Lanes next = weight_of<Word>(load(scores + j + kLanes) - shift, scale.later);
        sum += weight + next;
        store_words(words + j / 2, neighbours<Word>(weight, next));
      }
    }
    float* total = m.totals.get() + at * kLanes;
    store(total, has_sums ? load(total) + sum : sum);
  }

  T* out_of(int64_t i, int64_t h) const {
    return static_cast<T*>(p.out) + (i * p.heads + h) * p.dim;
  }

  // Writes `count` rows from `first`, of head h, which are rows `at` .. of the thread's memory.
  void finish_rows(const Memory& m, int64_t at, int64_t first, int64_t count, int64_t h) const {
    Lanes totals[kLanes];
    for (int64_t r = 0; r < kLanes; ++r) totals[r] = load(m.totals.get() + (at + r) * kLanes);
    transpose(totals);
    for (int r = 1; r < kLanes; ++r) totals[0] += totals[r];
    const Lanes inverse = 1.0f / totals[0];
    double logs[kLanes];
    log_lanes(totals[0], logs);
    for (int64_t r = 0; r < count; ++r) {
      store_row(m.sums.get() + (at + r) * width, inverse[r], p.dim, out_of(first + r, h));
      const int64_t to = (first + r) * p.heads + h;
      const double lse = double{m.peaks.get()[at + r]} * scale.later + logs[r];
      p.lse[to] = static_cast<float>(lse);
      p.lse_rest[to] = static_cast<float>(lse - p.lse[to]);
    }
  }
};

}  // namespace moca::MOCA_ISA

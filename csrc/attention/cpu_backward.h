// The backward pass of a document. The weights are computed again from the scores and lse, once
// for each pair of a query tile and a block of keys, and give all three gradients:
//   dV += P^T dO,  dP = dO V^T,  dS = P (dP - delta),  dQ += dS K,  dK += dS^T Q.
#pragma once

#include "attention/cpu_forward.h"

namespace moca::MOCA_ISA {

constexpr int64_t kKeys = 256;    // keys of a block
constexpr int64_t kQueries = 96;  // queries of a tile: the depth of the sums for dK and dV
static_assert(kQueries <= 2 * kTurnedDepth);

// Working memory of a thread in the backward pass.
template <typename Word>
struct BackwardMemory {
  // Products read so many rows of a left operand, whatever number is asked for.
  static constexpr int64_t kBlockRows = kRows<Word>;
  BackwardMemory(int64_t width, int64_t d_q_size)
      : k_dims(kKeys * width),
        v_dims(kKeys * width),
        k_tokens(kKeys * width),
        q_tokens(kQueries * width),
        d_out_tokens(kQueries * width),
        q_rows((kQueries + kBlockRows) * kPitch),
        d_out_rows((kQueries + kBlockRows) * kPitch),
        weights(kQueries * kPitch),
        d_score_columns(kQueries * kPitch),
        d_score_rows((kQueries + kBlockRows) * kPitch),
        scores(kBlockRows * kPitch),
        d_weights(kBlockRows * kPitch),
        d_k(kKeys * width),
        d_v(kKeys * width),
        d_q(d_q_size) {}
  static Word* words(const Buffer& buffer) { return reinterpret_cast<Word*>(buffer.get()); }
  Buffer k_dims, v_dims, k_tokens, q_tokens, d_out_tokens;  // right operands
  Buffer q_rows, d_out_rows;                                // left operands
  Buffer weights, d_score_columns, d_score_rows;            // left operands of a tile: P^T, dS
  Buffer scores, d_weights;                                 // of a block of rows
  Buffer d_k, d_v;                                          // sums of a block of keys
  Buffer d_q;                                               // of a task
};

template <typename T>
class Backward {
 public:
  using Word = WordOf<T>;
  using Memory = BackwardMemory<Word>;

  explicit Backward(const AttentionParams& params)
      : p(params),
        width(round_up(p.dim, kPanel)),
        depth(words<Word>(p.dim)),
        group(p.heads / p.kv_heads) {}

  // delta = rowsum(out * d_out) of block `block` of kKeys queries and head h. It adds up as the
  // products d_out . v do, so that a query with a single key, whose output is that value, gets
  // gradients of exactly 0.
  void prepare(int64_t block, int64_t h, Memory& m) const {
    const int64_t begin = block * kKeys, end = std::min(begin + kKeys, p.queries.size);
    Word *out = m.words(m.k_dims), *d_out = m.words(m.v_dims);
    pack_dims(head(p.out, h, begin, end), begin, end, p.dim, out);
    pack_dims(head(p.d_out, h, begin, end), begin, end, p.dim, d_out);
    for (int64_t i = 0; i < end - begin; i += kLanes) {
      const int64_t at = i / kPanel * kPanel * depth + i % kPanel;
      const Lanes delta = dot_columns(depth, d_out + at, out + at);
      for (int64_t lane = 0; lane < std::min<int64_t>(kLanes, end - begin - i); ++lane)
        p.delta[(begin + i + lane) * p.heads + h] = delta[lane];
    }
  }

  // Adds to d_q, (group, end - begin, width) of the queries [begin, end) and the heads of kv_head,
  // what comes from every `parts`-th block of keys, and writes d_k and d_v of those keys.
  void run(int64_t begin, int64_t end, int64_t kv_head, int64_t part, int64_t parts, float* d_q,
           Memory& m) const {
    const TileRegisters registers;
    for_each_document(p.queries, begin, end, [&](const Slice& slice) {
      const Document document{slice, kv_head, d_q - begin * width, (end - begin) * width,
                              has_hidden_nan(slice, kv_head)};
      const int64_t stride = parts * kKeys;
      for (int64_t key = slice.key_begin + part * kKeys; key < slice.key_end; key += stride)
        run_keys(document, key, std::min(key + kKeys, slice.key_end), m);
    });
  }

  // Writes d_q of queries [begin, end): the sum of `parts` arrays, one after the other, that `run`
  // made.
  void store_queries(int64_t begin, int64_t end, int64_t kv_head, float* d_q, int64_t parts) const {
    const int64_t stride = group * (end - begin) * width;
    for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h)
      for (int64_t i = begin; i < end; ++i, d_q += width) {
        for (int64_t part = 1; part < parts; ++part)
          for (int64_t d = 0; d < width; d += kLanes)
            store(d_q + d, load(d_q + d) + load(d_q + part * stride + d));
        store_row(d_q, p.softmax_scale, p.dim, static_cast<T*>(p.d_q) + (i * p.heads + h) * p.dim);
      }
  }

  const AttentionParams& p;
  const int64_t width, depth, group;

 private:
  struct Document {
    Slice slice;
    int64_t kv_head;
    float* d_q;  // of query 0 and the first head
    int64_t d_q_head;
    bool row_by_row;
  };

  Head<T> head(const void* base, int64_t h, int64_t begin, int64_t end) const {
    return Head<T>(base, Strides{p.heads * p.dim, p.dim}, h, begin, end);
  }

  bool has_hidden_nan(const Slice& s, int64_t kv_head) const {
    if (!is_masked(p.queries, s)) return false;
    bool finite = all_finite(Head<T>(p.k, p.k_strides, kv_head, s.key_begin, s.key_end), p.dim);
    for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h)
      finite = finite && all_finite(Head<T>(p.q, p.q_strides, h, s.begin, s.end), p.dim) &&
               all_finite(head(p.d_out, h, s.begin, s.end), p.dim);
    return !finite;
  }

  // Everything that keys [begin, end) have to do with.
  void run_keys(const Document& document, int64_t begin, int64_t end, Memory& m) const {
    const Head<T> k(p.k, p.k_strides, document.kv_head, begin, end);
    const Head<T> v(p.v, p.v_strides, document.kv_head, begin, end);
    pack_dims(k, begin, end, p.dim, m.words(m.k_dims));
    pack_dims(v, begin, end, p.dim, m.words(m.v_dims));
    pack_tokens(k, begin, end, p.dim, m.words(m.k_tokens));
    std::fill_n(m.d_k.get(), (end - begin) * width, 0.0f);
    std::fill_n(m.d_v.get(), (end - begin) * width, 0.0f);
    const int64_t step = document.row_by_row ? 1 : kQueries;
    const int64_t last = p.keys.end[end - 1];
    for (int64_t first = p.keys.start[begin]; first < last; first += step) {
      const Slice tile{first, std::min(first + step, last), begin, end};
      if (document.row_by_row) {
        const Head<T> seen(p.k, p.k_strides, document.kv_head, p.queries.start[first],
                           p.queries.end[first]);
        pack_tokens(seen, begin, end, p.dim, m.words(m.k_tokens));
      }
      for (int64_t h = 0; h < group; ++h)
        run_tile(tile, document.kv_head * group + h, document.d_q + h * document.d_q_head, m);
    }
    for (int64_t j = begin; j < end; ++j) {
      const int64_t from = (j - begin) * width, to = (j * p.kv_heads + document.kv_head) * p.dim;
      store_row(m.d_k.get() + from, p.softmax_scale, p.dim, static_cast<T*>(p.d_k) + to);
      store_row(m.d_v.get() + from, 1.0f, p.dim, static_cast<T*>(p.d_v) + to);
    }
  }

  // One head of a tile of queries, with its block of keys.
  void run_tile(const Slice& tile, int64_t h, float* d_q, Memory& m) const {
    const Head<T> q(p.q, p.q_strides, h, tile.begin, tile.end);
    const Head<T> d_out = head(p.d_out, h, tile.begin, tile.end);
    pack_left(q, tile.begin, tile.end, p.dim, m.words(m.q_rows));
    pack_left(d_out, tile.begin, tile.end, p.dim, m.words(m.d_out_rows));
    pack_tokens(q, tile.begin, tile.end, p.dim, m.words(m.q_tokens));
    pack_tokens(d_out, tile.begin, tile.end, p.dim, m.words(m.d_out_tokens));
    for (int64_t row = tile.begin; row < tile.end; row += kRows<Word>)
      run_rows(tile, row, std::min<int64_t>(kRows<Word>, tile.end - row), h, d_q + row * width, m);
    const int64_t first = std::max<int64_t>(p.queries.start[tile.begin], tile.key_begin);
    const int64_t last = std::min<int64_t>(p.queries.end[tile.end - 1], tile.key_end);
    for (int64_t key = first; key < last; key += kRows<Word>)
      add_to_keys(tile, key, std::min<int64_t>(kRows<Word>, last - key), m);
  }

  // Weights and gradients of the scores of `count` rows, and what they add to d_q.
  void run_rows(const Slice& tile, int64_t first, int64_t count, int64_t h, float* d_q,
                Memory& m) const {
    const int64_t at = first - tile.begin;
    const Columns columns =
        visible_columns(p.queries, first, first + count - 1, tile.key_begin, tile.key_end);
    if (columns.begin > 0 || columns.end < tile.key_end - tile.key_begin)
      clear_rows(at, count, tile.key_end - tile.key_begin, m);
    if (columns.begin >= columns.end) return;
    multiply<Left::rows>(
        count, columns.vectors(), depth,
        Product<Word>{m.words(m.q_rows) + at * kPitch, m.words(m.k_dims) + columns.begin * depth,
                      kPanel * depth, m.scores.get(), kPitch, p.softmax_scale},
        false);
    multiply<Left::rows>(count, columns.vectors(), depth,
                         Product<Word>{m.words(m.d_out_rows) + at * kPitch,
                                       m.words(m.v_dims) + columns.begin * depth, kPanel * depth,
                                       m.d_weights.get(), kPitch},
                         false);
    const int64_t size = columns.end - columns.begin, offset = tile.key_begin + columns.begin;
    for (int64_t r = 0; r < round_up(count, kPerWord<Word>); ++r) {
      float *scores = m.scores.get() + r * kPitch, *d_weights = m.d_weights.get() + r * kPitch;
      const int64_t start = r < count ? p.queries.start[first + r] - offset : 0;
      const int64_t end = r < count ? p.queries.end[first + r] - offset : 0;
      if (r < count) {
        mask_row(scores, start, end, size, -kInfinity);
        mask_row(d_weights, start, end, size, 0.0f);
        differentiate(tile, first + r, h, scores, d_weights, size);
      }
      mask_row(scores, start, end, size, 0.0f);  // even if all the row is NaN
      mask_row(d_weights, start, end, size, 0.0f);
    }
    for (int64_t r = 0; r < count; r += kPerWord<Word>) store_operands(r, at + r, columns, m);
    const int64_t skip = columns.begin / kPerWord<Word>;
    multiply<Left::rows>(
        count, ceil_div(p.dim, kLanes), ceil_div(size, kPerWord<Word>),
        Product<Word>{m.words(m.d_score_rows) + at * kPitch + skip,
                      m.words(m.k_tokens) + skip * kPanel,
                      words<Word>(tile.key_end - tile.key_begin) * kPanel, d_q, width},
        true);
  }

  // Rows whose columns are not all written have weight 0 in the rest.
  static void clear_rows(int64_t at, int64_t count, int64_t size, Memory& m) {
    for (int64_t w = at / kPerWord<Word>; w < ceil_div(at + count, kPerWord<Word>); ++w) {
      std::fill_n(m.weights.get() + w * kPitch, size, 0.0f);
      std::fill_n(m.d_score_columns.get() + w * kPitch, size, 0.0f);
    }
  }

  // Scores of a row become weights, and gradients of weights gradients of scores.
  void differentiate(const Slice& tile, int64_t i, int64_t h, float* scores, float* d_weights,
                     int64_t size) const {
    const int64_t at = i * p.heads + h;
    const Lanes lse = broadcast(p.lse[at]), lse_rest = broadcast(p.lse_rest[at]);
    Lanes sum = {};
    for (int64_t j = 0; j < round_up(size, kPanel); j += kLanes) {
      const Lanes weight = weight_of<Word>((load(scores + j) - lse) - lse_rest);
      store(scores + j, weight);
      sum += weight * load(d_weights + j);
    }
    // Where the row's keys are all here, delta is taken from the very numbers that it balances:
    // with few keys a delta from elsewhere would cost digits.
    const bool whole = p.queries.start[i] >= tile.key_begin && p.queries.end[i] <= tile.key_end;
    const Lanes delta = broadcast((whole ? sum_of(sum) : p.delta[at]) - p.d_lse[at]);
    for (int64_t j = 0; j < round_up(size, kPanel); j += kLanes)
      store(d_weights + j, load(scores + j) * (load(d_weights + j) - delta));
  }

  // Weights and gradients of scores, in rows `r` .. of the block, become words, in rows `at` .. of
  // the tile.
  void store_operands(int64_t r, int64_t at, const Columns& columns, Memory& m) const {
    const float *w = m.scores.get() + r * kPitch, *d = m.d_weights.get() + r * kPitch;
    const int64_t to = at / kPerWord<Word> * kPitch + columns.begin;
    const int64_t size = columns.end - columns.begin;
    Word *weights = m.words(m.weights) + to, *d_columns = m.words(m.d_score_columns) + to;
    Word* d_rows = m.words(m.d_score_rows) + at * kPitch + columns.begin / kPerWord<Word>;
    for (int64_t j = 0; j < size; j += kLanes * kPerWord<Word>) {
      if constexpr (kPerWord<Word> == 1) {
        store_words(weights + j, load(w + j));
        store_words(d_columns + j, load(d + j));
        store_words(d_rows + j, load(d + j));
      } else {
        for (int64_t half = j; half < j + kPanel; half += kLanes) {
          store_words(weights + half, interleave<Word>(load(w + half), load(w + half + kPitch)));
          store_words(d_columns + half, interleave<Word>(load(d + half), load(d + half + kPitch)));
        }
        for (int row = 0; row < 2; ++row) {
          const float* from = d + row * kPitch + j;
          store_words(d_rows + row * kPitch + j / 2,
                      neighbours<Word>(load(from), load(from + kLanes)));
        }
      }
    }
  }

  // What the tile adds to d_k and d_v of `count` keys from `key`.
  void add_to_keys(const Slice& tile, int64_t key, int64_t count, Memory& m) const {
    const int64_t begin = std::max<int64_t>(p.keys.start[key], tile.begin) - tile.begin;
    const int64_t end = std::min<int64_t>(p.keys.end[key + count - 1], tile.end) - tile.begin;
    if (begin >= end) return;
    const int64_t skip = begin / kPerWord<Word> / kDepthStep<Word> * kDepthStep<Word>;
    const int64_t depth = ceil_div(end, kPerWord<Word>) - skip;
    const int64_t from = skip * kPitch + key - tile.key_begin, to = (key - tile.key_begin) * width;
    const int64_t pitch = words<Word>(tile.end - tile.begin) * kPanel;
    const int64_t vectors = ceil_div(p.dim, kLanes);
    multiply<Left::columns>(
        count, vectors, depth,
        Product<Word>{m.words(m.weights) + from, m.words(m.d_out_tokens) + skip * kPanel, pitch,
                      m.d_v.get() + to, width},
        true);
    multiply<Left::columns>(
        count, vectors, depth,
        Product<Word>{m.words(m.d_score_columns) + from, m.words(m.q_tokens) + skip * kPanel, pitch,
                      m.d_k.get() + to, width},
        true);
  }
};

}  // namespace moca::MOCA_ISA

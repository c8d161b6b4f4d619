// The backward pass of a document. The weights are computed again from the scores and lse, once
// for each pair of a query tile and a block of keys, and give all three gradients:
//   dV^T += dO^T P,  dP = dO V^T,  dS = P (dP - delta),  dQ += dS K,  dK^T += Q^T dS.
#pragma once

#include "attention/cpu_forward.h"

namespace moca::MOCA_ISA {

template <typename T>
class Backward {
 public:
  using Word = WordOf<T>;
  using Memory = BackwardMemory<Word>;
  using Keys = typename Memory::Keys;
  static constexpr int64_t kKeys = Memory::kKeys, kQueries = Memory::kQueries;
  static constexpr int64_t kKeyPitch = Memory::kKeyPitch;

  explicit Backward(const AttentionParams& params)
      : p(params),
        width(round_up(p.dim, kPanel)),
        depth(words<Word>(p.dim)),
        group(p.heads / p.kv_heads),
        scale(p.softmax_scale),
        most_blocks(std::clamp<int64_t>(kCache / kKeys / (3 * depth + 2 * width), 1, 8)) {}

  // delta = rowsum(out * d_out) of queries [begin, end) and head h.
  void prepare(int64_t begin, int64_t end, int64_t h) const {
    const Head<T> out = head(p.out, h, begin, end), d_out = head(p.d_out, h, begin, end);
    for (int64_t i = begin; i < end; ++i) {
      Lanes sum = {};
      for (int64_t d = 0; d < p.dim; d += kLanes)
        sum += words_of<float>(out[i] + d, p.dim - d) * words_of<float>(d_out[i] + d, p.dim - d);
      p.delta[i * p.heads + h] = sum_of(sum);
    }
  }

  // Adds to d_q, (group, end - begin, width) of the queries [begin, end) and the heads of kv_head,
  // what comes from every `parts`-th run of blocks of keys, and writes d_k and d_v of those keys.
  // The thread is expected `ahead` key heads on next, if not 0.
  void run(int64_t begin, int64_t end, int64_t kv_head, int64_t ahead, int64_t part, int64_t parts,
           float* d_q, Memory& m) const {
    const TileRegisters registers;
    for_each_document(p.queries, begin, end, [&](const Slice& slice) {
      const Document document{slice,
                              kv_head,
                              ahead,
                              d_q - begin * width,
                              (end - begin) * width,
                              has_hidden_nan(slice, kv_head)};
      const int64_t blocks = std::max<int64_t>(1, ceil_div(slice.key_end - slice.key_begin, kKeys));
      const int64_t runs = parts * ceil_div(blocks, parts * most_blocks);
      const int64_t keys = kKeys * ceil_div(blocks, runs);
      for (int64_t key = slice.key_begin + part * keys; key < slice.key_end; key += parts * keys)
        run_keys(document, key, std::min(key + keys, slice.key_end), m);
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
  const Scale<Word> scale;
  const int64_t most_blocks;  // of keys, that are packed together and meet each tile of queries

 private:
  static constexpr int64_t kCache = (kInTiles<Word> ? 448 : 128) * 1024;  // floats

  struct Document {
    Slice slice;
    int64_t kv_head, ahead;
    float* d_q;  // of query 0 and the first head
    int64_t d_q_head;
    bool row_by_row;
  };

  void fetch_to_write(void* base, int64_t row) const {
    fetch_row(static_cast<T*>(base) + row * p.dim, p.dim);
  }

  Head<T> head(const void* base, int64_t h, int64_t begin, int64_t end, int64_t ahead = 0) const {
    return Head<T>(base, Strides{p.heads * p.dim, p.dim}, h, begin, end, ahead);
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
    const auto for_each_block = [&](auto&& body) {
      for (int64_t key = begin, block = 0; key < end; key += kKeys, ++block)
        body(key, std::min(key + kKeys, end), m.keys(block));
    };
    for_each_block([&](int64_t key, int64_t key_end, const auto& keys) {
      const Head<T> k(p.k, p.k_strides, document.kv_head, key, key_end, document.ahead);
      const Head<T> v(p.v, p.v_strides, document.kv_head, key, key_end, document.ahead);
      pack_dims(k, key, key_end, p.dim, keys.k_dims);
      pack_dims(v, key, key_end, p.dim, keys.v_dims);
      pack_tokens(k, key, key_end, p.dim, keys.k_tokens);
      std::fill_n(keys.d_k, width * kKeyPitch, 0.0f);
      std::fill_n(keys.d_v, width * kKeyPitch, 0.0f);
    });
    const int64_t step = document.row_by_row ? 1 : kQueries;
    const int64_t last = p.keys.end[end - 1];
    for (int64_t first = p.keys.start[begin]; first < last; first += step)
      for (int64_t head = 0; head < group; ++head) {
        const Slice queries{first, std::min(first + step, last), begin, end};
        const int64_t h = document.kv_head * group + head;
        pack_queries(queries, h, document.ahead * group, m);
        for_each_block([&](int64_t key, int64_t key_end, const auto& keys) {
          const Slice tile{queries.begin, queries.end, key, key_end};
          if (document.row_by_row) {
            const Head<T> seen(p.k, p.k_strides, document.kv_head, p.queries.start[first],
                               p.queries.end[first]);
            pack_tokens(seen, key, key_end, p.dim, keys.k_tokens);
          }
          run_tile(tile, h, document.d_q + head * document.d_q_head, keys, m);
        });
      }
    for_each_block([&](int64_t key, int64_t key_end, const auto& keys) {
      const int64_t at = (key * p.kv_heads + document.kv_head) * p.dim;
      store_keys(keys.d_k, p.softmax_scale, key_end - key, static_cast<T*>(p.d_k) + at);
      store_keys(keys.d_v, 1.0f, key_end - key, static_cast<T*>(p.d_v) + at);
    });
  }

  // Writes `count` rows of a gradient, of one head, from its turned sums.
  void store_keys(const float* sums, float factor, int64_t count, T* to) const {
    float rows[kLanes * kMaxDim];
    for (int64_t j = 0; j < count; j += kLanes, sums += kLanes) {
      for (int64_t d = 0; d < p.dim; d += kLanes) {
        Lanes x[kLanes];
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) x[r] = load(sums + (d + r) * kKeyPitch);
        transpose(x);
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) store(rows + r * kMaxDim + d, x[r]);
      }
      for (int64_t r = 0; r < std::min<int64_t>(kLanes, count - j); ++r, to += p.kv_heads * p.dim)
        store_row(rows + r * kMaxDim, factor, p.dim, to);
    }
  }

  void pack_queries(const Slice& tile, int64_t h, int64_t ahead, Memory& m) const {
    const Head<T> q(p.q, p.q_strides, h, tile.begin, tile.end, ahead);
    const Head<T> d_out = head(p.d_out, h, tile.begin, tile.end, ahead);
    pack_left(q, tile.begin, tile.end, p.dim, m.words(m.q_rows));
    pack_left(d_out, tile.begin, tile.end, p.dim, m.words(m.d_out_rows));
    pack_left_tokens(q, tile.begin, tile.end, p.dim, m.words(m.q_tokens));
    pack_left_tokens(d_out, tile.begin, tile.end, p.dim, m.words(m.d_out_tokens));
  }

  // One head of a tile of queries, which are packed, with a block of keys.
  void run_tile(const Slice& tile, int64_t h, float* d_q, const Keys& keys, Memory& m) const {
    const int64_t first = std::max<int64_t>(p.queries.start[tile.begin], tile.key_begin);
    const int64_t last = std::min<int64_t>(p.queries.end[tile.end - 1], tile.key_end);
    if (first >= last) return;
    for (int64_t row = tile.begin; row < tile.end; row += kRows<Word>)
      run_rows(tile, row, std::min<int64_t>(kRows<Word>, tile.end - row), h, d_q + row * width,
               keys, m);
    const int64_t count = tile.end - tile.begin;
    if (count == 1) return add_query(tile, h, first, last, keys, m);
    clear_words(ceil_div(count, kPerWord<Word>), words<Word>(count), tile.key_end - tile.key_begin,
                m);
    for (int64_t key = tile.key_begin; key < last; key += kPanel)
      if (key + kPanel > first) add_to_keys(tile, h, key, std::min(key + kPanel, last), keys, m);
  }

  // Weights and gradients of the scores of `count` rows, and what they add to d_q.
  void run_rows(const Slice& tile, int64_t first, int64_t count, int64_t h, float* d_q,
                const Keys& keys, Memory& m) const {
    const int64_t at = first - tile.begin;
    const Columns columns =
        visible_columns(p.queries, first, first + count - 1, tile.key_begin, tile.key_end);
    if (columns.begin > 0 || columns.end < tile.key_end - tile.key_begin)
      clear_words(at / kPerWord<Word>, ceil_div(at + count, kPerWord<Word>),
                  tile.key_end - tile.key_begin, m);
    if (columns.begin >= columns.end) return;
    multiply(count, columns.vectors(), depth,
             Product<Word>{m.words(m.q_rows) + at * kPitch, keys.k_dims + columns.begin * depth,
                           kPanel * depth, m.score_block.get(), kPitch, scale.in_product, true},
             false);
    multiply(count, columns.vectors(), depth,
             Product<Word>{m.words(m.d_out_rows) + at * kPitch, keys.v_dims + columns.begin * depth,
                           kPanel * depth, m.d_weight_block.get(), kPitch, 1.0f, true},
             false);
    for (int64_t r = 0; r < count; r += kPerWord<Word>) {
      if (r % kLanes == 0) keep_tiles_awake<Word>();
      Row rows[kPerWord<Word>];
      bool weighed = false;
      for (int64_t i = r; i < r + kPerWord<Word>; ++i) {
        rows[i - r] = make_row(tile, i < count ? first + i : -1, h, columns, i, m);
        weighed = weighed || rows[i - r].whole || rows[i - r].is_masked();
        if (i < count && p.queries.end[first + i] <= tile.key_end)
          fetch_to_write(p.d_q, (first + i) * p.heads + h);
      }
      if (weighed) {
        for (Row& row : rows) weigh(row);
        store_operands<true>(rows, at + r, columns, m);
      } else {
        store_operands<false>(rows, at + r, columns, m);
      }
    }
    const int64_t skip = columns.begin / kPerWord<Word>;
    multiply(
        count, ceil_div(p.dim, kLanes), ceil_div(columns.end - columns.begin, kPerWord<Word>),
        Product<Word>{m.words(m.d_score_rows) + at * kPitch + skip, keys.k_tokens + skip * kPanel,
                      words<Word>(tile.key_end - tile.key_begin) * kPanel, d_q, width},
        true);
  }

  // Words [begin, end) of queries get weight 0 for all keys of a block: those that are not there,
  // and those of which not all columns are written.
  static void clear_words(int64_t begin, int64_t end, int64_t keys, Memory& m) {
    for (int64_t key = 0; key < keys && begin < end; key += kPanel) {
      std::fill_n(m.panel(m.weights, key, begin), (end - begin) * kPanel, Word{});
      std::fill_n(m.panel(m.d_scores, key, begin), (end - begin) * kPanel, Word{});
    }
  }

  // A row of scores and of gradients of weights, of which columns [start, end) of `size` are seen.
  struct Row {
    float *scores, *d_weights;
    int64_t start, end, size;
    bool whole;  // all keys of the row are here
    float lse, lse_rest, delta, d_lse;
    bool is_masked() const { return start > 0 || end < round_up(size, kPanel); }
  };

  // Row `r` of the block, of query i; if that is negative, a row that sees nothing.
  Row make_row(const Slice& tile, int64_t i, int64_t h, const Columns& columns, int64_t r,
               Memory& m) const {
    float *scores = m.score_block.get() + r * kPitch,
          *d_weights = m.d_weight_block.get() + r * kPitch;
    const int64_t size = columns.end - columns.begin, offset = tile.key_begin + columns.begin;
    if (i < 0) return {scores, d_weights, 0, 0, size, false, 0.0f, 0.0f, 0.0f, 0.0f};
    const int64_t start = p.queries.start[i], end = p.queries.end[i], at = i * p.heads + h;
    const bool whole = start >= tile.key_begin && end <= tile.key_end;
    return {scores, d_weights, start - offset, end - offset, size,
            whole,  p.lse[at], p.lse_rest[at], p.delta[at],  p.d_lse[at]};
  }

  // A scale that comes later is multiplied and subtracted from in one rounding, as lse expects.
  Lanes weight_at(const Row& row, int64_t j) const {
    return weight_of<Word>((load(row.scores + j) * scale.later - row.lse) - row.lse_rest);
  }

  // Scores become weights, 0 where they are hidden, even if all the row is NaN. Where the row's
  // keys are all here, delta is taken from the very numbers that it balances: with few keys a delta
  // from elsewhere would cost digits.
  void weigh(Row& row) const {
    mask_row(row.d_weights, row.start, row.end, row.size, 0.0f);
    for (int64_t j = 0; j < round_up(row.size, kPanel); j += kLanes)
      store(row.scores + j, weight_at(row, j));
    mask_row(row.scores, row.start, row.end, row.size, 0.0f);
    if (!row.whole) return;
    Lanes sum = {};
    for (int64_t j = 0; j < round_up(row.size, kPanel); j += kLanes)
      sum += load(row.scores + j) * load(row.d_weights + j);
    row.delta = sum_of(sum);
  }

  // Weights, made of scores unless that is done, and gradients of scores become words, in rows `at`
  // .. of the tile.
  template <bool kWeighed>
  void store_operands(const Row (&rows)[kPerWord<Word>], int64_t at, const Columns& columns,
                      Memory& m) const {
    Word* d_rows = m.words(m.d_score_rows) + at * kPitch + columns.begin / kPerWord<Word>;
    for (int64_t j = 0; j < columns.end - columns.begin; j += kPanel) {
      Lanes weight[kPerWord<Word>][2], d_score[kPerWord<Word>][2];
#pragma GCC unroll 2
      for (int r = 0; r < kPerWord<Word>; ++r)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const int64_t column = j + half * kLanes;
          weight[r][half] = kWeighed ? load(rows[r].scores + column) : weight_at(rows[r], column);
          const Lanes d = load(rows[r].d_weights + column) - (rows[r].delta - rows[r].d_lse);
          d_score[r][half] = weight[r][half] * d;
          if (kWeighed)  // what is hidden gets 0, even if delta is NaN
            d_score[r][half] = weight[r][half] == 0.0f ? Lanes{} : d_score[r][half];
        }
      Word* weights = m.panel(m.weights, columns.begin + j, at / kPerWord<Word>);
      Word* d_scores = m.panel(m.d_scores, columns.begin + j, at / kPerWord<Word>);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int64_t to = half * kLanes;
        if constexpr (kPerWord<Word> == 1) {
          store_words(weights + to, weight[0][half]);
          store_words(d_scores + to, d_score[0][half]);
          store_words(d_rows + j + to, d_score[0][half]);
        } else {
          store_words(weights + to, interleave<Word>(weight[0][half], weight[1][half]));
          store_words(d_scores + to, interleave<Word>(d_score[0][half], d_score[1][half]));
          store_words(d_rows + half * kPitch + j / 2,
                      neighbours<Word>(d_score[half][0], d_score[half][1]));
        }
      }
    }
  }

  // What the tile adds to d_k and d_v of the keys [key, key_end) of a panel.
  void add_to_keys(const Slice& tile, int64_t h, int64_t key, int64_t key_end, const Keys& keys,
                   Memory& m) const {
    const int64_t begin = std::max<int64_t>(p.keys.start[key], tile.begin) - tile.begin;
    const int64_t end = std::min<int64_t>(p.keys.end[key_end - 1], tile.end) - tile.begin;
    if (begin >= end) return;
    const int64_t skip = begin / kPerWord<Word> / kDepthStep<Word> * kDepthStep<Word>;
    const int64_t depth = ceil_div(end, kPerWord<Word>) - skip, column = key - tile.key_begin;
    const auto add = [&](const Buffer& left, const Buffer& right, float* sums) {
      for (int64_t d = 0; d < p.dim; d += kRows<Word>)
        multiply(std::min<int64_t>(kRows<Word>, p.dim - d), ceil_div(key_end - key, kLanes), depth,
                 Product<Word>{m.words(left) + d * kPitch + skip, m.panel(right, column, skip), 0,
                               sums + d * kKeyPitch + column, kKeyPitch, 1.0f, true},
                 true);
    };
    for (int64_t j = key; j < key_end && p.keys.end[key_end - 1] <= tile.end; ++j) {
      fetch_to_write(p.d_k, j * p.kv_heads + h / group);
      fetch_to_write(p.d_v, j * p.kv_heads + h / group);
    }
    add(m.d_out_tokens, m.weights, keys.d_v);
    add(m.q_tokens, m.d_scores, keys.d_k);
  }

  // What a tile of one query adds to the keys [first, last), and to no others: it may hold NaN.
  void add_query(const Slice& tile, int64_t h, int64_t first, int64_t last, const Keys& keys,
                 Memory& m) const {
    const auto add = [&](const T* query, const Buffer& right, float* sums) {
      for (int64_t d = 0; d < p.dim; ++d, sums += kKeyPitch)
        for (int64_t j = first - tile.key_begin; j < last - tile.key_begin; ++j)
          sums[j] += to_float(query[d]) * first_of(m.panel(right, j, 0)[j % kPanel]);
    };
    add(head(p.d_out, h, tile.begin, tile.end)[tile.begin], m.weights, keys.d_v);
    add(Head<T>(p.q, p.q_strides, h, tile.begin, tile.end)[tile.begin], m.d_scores, keys.d_k);
  }
};

}  // namespace moca::MOCA_ISA

// Attention on the CPU (FlashAttention's recurrence, arXiv 2205.14135). A task is a query tile and
// up to kHeads query heads that share a key head: keys are packed once, kColumns at a time, and
// every row block computes its scores only where its own rows look. The backward recomputes the
// scores in two passes, one over query tiles for d_q and one over key tiles for d_k and d_v, so no
// two tasks write one element and all results repeat bit by bit on any number of threads.
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <type_traits>

#include "attention/attention.h"
#include "attention/cpu_tile.h"
#include "common/parallel.h"

namespace moca::MOCA_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The tasks of one side: every tile with every group of heads that share a packing.
struct Tasks {
  Tasks(const AttentionParams& p, const Spans& spans)
      : tiles(count_tiles(spans)),
        group(p.heads / p.kv_heads),
        heads(std::min(group, kHeads)),
        per_kv_head(ceil_div(group, heads)),
        count(tiles * p.kv_heads * per_kv_head) {}

  int64_t tile(int64_t task) const { return task % tiles; }
  int64_t kv_head(int64_t task) const { return task / tiles / per_kv_head; }
  int64_t first_head(int64_t task) const {
    return kv_head(task) * group + task / tiles % per_kv_head * heads;
  }
  int64_t last_head(int64_t task) const {
    return std::min(first_head(task) + heads, (kv_head(task) + 1) * group);
  }

  int64_t tiles, group, heads, per_kv_head, count;
};

template <typename T>
void store_row(const float* from, float factor, int64_t dim, T* to) {
#pragma omp simd
  for (int64_t d = 0; d < dim; ++d) to[d] = from_float<T>(from[d] * factor);
}

// Working memory of a thread in the forward pass.
struct ForwardMemory {
  ForwardMemory(int64_t rows, int64_t heads, int64_t width)
      : keys(width * kPitch),
        values(kColumns * width),
        queries(heads * rows * width),
        sums(heads * rows * width),
        peaks(heads * rows),
        totals(heads * rows),
        scores(kRows * kPitch) {}
  Buffer keys, values, queries, sums, peaks, totals, scores;
  std::vector<RowBlock> blocks;
};

// Scores of one row to weights exp(score - peak), `size` of them padded with -inf to whole vectors;
// updates the row's peak and total, and returns the factor for what was summed before.
inline float soften(float* scores, int64_t size, float& peak, float& total) {
  Lanes top = broadcast(-kInfinity);
  for (int64_t j = 0; j < size; j += kLanes) {
    const Lanes x = load(scores + j);
    top = x > top ? x : top;
  }
  const float new_peak = std::max(peak, largest(top));
  const float shift = new_peak == -kInfinity ? 0.0f : new_peak;  // nothing but -inf, or NaN, so far
  Lanes sum = {};
  for (int64_t j = 0; j < size; j += kLanes) {
    const Lanes weight = exp_lanes(load(scores + j) - shift);
    store(scores + j, weight);
    sum += weight;
  }
  const float shrink = peak == -kInfinity ? 1.0f : std::exp(peak - shift);  // nothing to shrink yet
  total = total * shrink + sum_of(sum);
  peak = new_peak;
  return shrink;
}

template <typename T>
class Forward {
 public:
  explicit Forward(const AttentionParams& params)
      : p(params), width(round_up(p.dim, kLanes)), rows(longest_tile(p.queries)) {}

  void run(const Tasks& tasks, int64_t task, ForwardMemory& m) const {
    const Tile& tile = p.queries.tiles[tasks.tile(task)];
    const Head<T> k(p.k, p.k_strides, tasks.kv_head(task));
    const Head<T> v(p.v, p.v_strides, tasks.kv_head(task));
    const int64_t first = tasks.first_head(task), heads = tasks.last_head(task) - first;
    split_rows(p.queries, tile, m.blocks);
    for (int64_t h = 0; h < heads; ++h)
      pack_rows(Head<T>(p.q, p.q_strides, first + h), tile.row_begin, tile.row_end, p.dim,
                m.queries.get() + h * rows * width, width);
    std::fill_n(m.sums.get(), heads * rows * width, 0.0f);
    std::fill_n(m.totals.get(), heads * rows, 0.0f);
    std::fill_n(m.peaks.get(), heads * rows, -kInfinity);
    for (int64_t begin = tile.key_begin; begin < tile.key_end; begin += kColumns) {
      const int64_t end = std::min<int64_t>(begin + kColumns, tile.key_end);
      pack_columns(k, begin, end, p.dim, m.keys.get());
      pack_rows(v, begin, end, p.dim, m.values.get(), width);
      for (int64_t h = 0; h < heads; ++h)
        for (const RowBlock& block : m.blocks) {
          const Overlap overlap(block, begin, end);
          if (overlap.size() > 0)
            add_block(m, block, overlap, overlap.begin - begin,
                      h * rows + block.first - tile.row_begin);
        }
    }
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = tile.row_begin; i < tile.row_end; ++i)
        finish_row(m, h * rows + i - tile.row_begin, i, first + h);
  }

  const AttentionParams& p;
  const int64_t width, rows;

 private:
  // Folds columns `overlap` (packed from column `offset` on) into the sums of a row block, whose
  // first row is row `at` of the thread's memory.
  void add_block(ForwardMemory& m, const RowBlock& block, const Overlap& overlap, int64_t offset,
                 int64_t at) const {
    const int64_t size = overlap.size(), vectors = ceil_div(size, kLanes);
    float* scores = m.scores.get();
    multiply(block.count, vectors, p.dim,
             {m.queries.get() + at * width, width, m.keys.get() + offset, kPitch, scores, kPitch,
              p.softmax_scale},
             false);
    float* sums = m.sums.get() + at * width;
    for (int64_t r = 0; r < block.count; ++r) {
      float* row = scores + r * kPitch;
      const int64_t start = p.queries.start[block.first + r] - overlap.begin;
      const int64_t end = p.queries.end[block.first + r] - overlap.begin;
      for (int64_t j = 0; j < std::min(start, size); ++j) row[j] = -kInfinity;
      for (int64_t j = std::max<int64_t>(end, 0); j < vectors * kLanes; ++j) row[j] = -kInfinity;
      for (int64_t j = size; j < std::min(end, vectors * kLanes); ++j) row[j] = -kInfinity;
      const float shrink = soften(row, size, m.peaks.get()[at + r], m.totals.get()[at + r]);
      if (shrink != 1.0f)
        for (int64_t d = 0; d < width; d += kLanes)
          store(sums + r * width + d, load(sums + r * width + d) * shrink);
    }
    accumulate_visible(p.queries, block, overlap, scores, m.values.get() + offset * width, width,
                       sums);
  }

  void finish_row(const ForwardMemory& m, int64_t at, int64_t i, int64_t h) const {
    const bool empty = p.queries.start[i] == p.queries.end[i];
    const float total = m.totals.get()[at];
    float* sums = m.sums.get() + at * width;
    for (int64_t d = 0; d < width; d += kLanes)
      store(sums + d, load(sums + d) / (empty ? 1.0f : total));
    store_row(sums, 1.0f, p.dim, static_cast<T*>(p.out) + (i * p.heads + h) * p.dim);
    const double lse = m.peaks.get()[at] + std::log(static_cast<double>(total));
    p.lse[i * p.heads + h] = empty ? -kInfinity : static_cast<float>(lse);
    p.lse_rest[i * p.heads + h] = empty ? 0.0f : static_cast<float>(lse - static_cast<float>(lse));
  }
};

// Working memory of a thread in one pass of the backward. `first` and `second` are q and d_out
// or k and v: rows of one pair meet columns of the other.
struct BackwardMemory {
  BackwardMemory(int64_t rows, int64_t width)
      : first_columns(width * kPitch),
        second_columns(width * kPitch),
        first_rows(kColumns * width),
        second_rows(kColumns * width),
        first(rows * width),
        second(rows * width),
        d_first(rows * width),
        d_second(rows * width),
        lse(kPitch),
        lse_rest(kPitch),
        delta(kPitch),
        d_lse(kPitch),
        scores(kRows * kPitch),
        d_scores(kRows * kPitch) {}
  Buffer first_columns, second_columns;  // the column side, transposed
  Buffer first_rows, second_rows;        // the column side, as it is
  Buffer first, second;                  // the row side
  Buffer d_first, d_second;              // its gradients
  Buffer lse, lse_rest, delta, d_lse;    // of the column side, where that is the queries
  Buffer scores, d_scores;
  std::vector<RowBlock> blocks;
};

template <typename T>
class Backward {
 public:
  explicit Backward(const AttentionParams& params)
      : p(params), width(round_up(p.dim, kLanes)), contiguous{p.heads * p.dim, p.dim} {}

  // delta = rowsum(out * d_out) of the queries of block `task % blocks` and one head. It adds up in
  // the order of the products d_out . v, so that a query with a single key, whose output is that
  // value, gets gradients of exactly 0.
  void prepare(int64_t blocks, int64_t task, BackwardMemory& m) const {
    const int64_t h = task / blocks, begin = task % blocks * kColumns;
    const int64_t end = std::min(begin + kColumns, p.queries.size);
    float *out = m.first_columns.get(), *d_out = m.second_columns.get();
    pack_columns(Head<T>(p.out, contiguous, h), begin, end, p.dim, out);
    pack_columns(Head<T>(p.d_out, contiguous, h), begin, end, p.dim, d_out);
    for (int64_t i = 0; i < end - begin; i += kLanes) {
      Lanes total = {};
      for (int64_t first = 0; first < p.dim; first += kChain) {
        Lanes sum = {};
        for (int64_t d = first; d < std::min(first + kChain, p.dim); ++d)
          sum += load(out + d * kPitch + i) * load(d_out + d * kPitch + i);
        total += sum;
      }
      store(m.delta.get() + i, total);
    }
    for (int64_t i = begin; i < end; ++i) p.delta[i * p.heads + h] = m.delta.get()[i - begin];
  }

  // d_q of a query tile and the heads of the task.
  void queries(const Tasks& tasks, int64_t task, int64_t rows, BackwardMemory& m) const {
    const Tile& tile = p.queries.tiles[tasks.tile(task)];
    const Head<T> k(p.k, p.k_strides, tasks.kv_head(task));
    const Head<T> v(p.v, p.v_strides, tasks.kv_head(task));
    const int64_t first = tasks.first_head(task), heads = tasks.last_head(task) - first;
    split_rows(p.queries, tile, m.blocks);
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t at = h * rows * width;
      pack_rows(Head<T>(p.q, p.q_strides, first + h), tile.row_begin, tile.row_end, p.dim,
                m.first.get() + at, width);
      pack_rows(Head<T>(p.d_out, contiguous, first + h), tile.row_begin, tile.row_end, p.dim,
                m.second.get() + at, width);
    }
    std::fill_n(m.d_first.get(), heads * rows * width, 0.0f);
    for (int64_t begin = tile.key_begin; begin < tile.key_end; begin += kColumns) {
      const int64_t end = std::min<int64_t>(begin + kColumns, tile.key_end);
      pack_columns(k, begin, end, p.dim, m.first_columns.get());
      pack_columns(v, begin, end, p.dim, m.second_columns.get());
      pack_rows(k, begin, end, p.dim, m.first_rows.get(), width);
      for (int64_t h = 0; h < heads; ++h)
        for (const RowBlock& block : m.blocks)
          add_block<false>(m, p.queries, block, begin, end, h * rows + block.first - tile.row_begin,
                           first + h);
    }
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = tile.row_begin; i < tile.row_end; ++i)
        store_row(m.d_first.get() + (h * rows + i - tile.row_begin) * width, p.softmax_scale, p.dim,
                  static_cast<T*>(p.d_q) + (i * p.heads + first + h) * p.dim);
  }

  // d_k and d_v of a key tile and one key head, over all query heads that share it.
  void keys(int64_t tiles, int64_t task, BackwardMemory& m) const {
    const Tile& tile = p.keys.tiles[task % tiles];
    const int64_t kv_head = task / tiles, group = p.heads / p.kv_heads;
    const int64_t rows = tile.row_end - tile.row_begin;
    split_rows(p.keys, tile, m.blocks);
    pack_rows(Head<T>(p.k, p.k_strides, kv_head), tile.row_begin, tile.row_end, p.dim,
              m.first.get(), width);
    pack_rows(Head<T>(p.v, p.v_strides, kv_head), tile.row_begin, tile.row_end, p.dim,
              m.second.get(), width);
    std::fill_n(m.d_first.get(), rows * width, 0.0f);
    std::fill_n(m.d_second.get(), rows * width, 0.0f);
    for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h)
      for (int64_t begin = tile.key_begin; begin < tile.key_end; begin += kColumns) {
        const int64_t end = std::min<int64_t>(begin + kColumns, tile.key_end);
        pack_queries(m, h, begin, end);
        for (const RowBlock& block : m.blocks)
          add_block<true>(m, p.keys, block, begin, end, block.first - tile.row_begin, h);
      }
    for (int64_t j = tile.row_begin; j < tile.row_end; ++j) {
      const int64_t from = (j - tile.row_begin) * width, to = (j * p.kv_heads + kv_head) * p.dim;
      store_row(m.d_first.get() + from, p.softmax_scale, p.dim, static_cast<T*>(p.d_k) + to);
      store_row(m.d_second.get() + from, 1.0f, p.dim, static_cast<T*>(p.d_v) + to);
    }
  }

  const AttentionParams& p;
  const int64_t width;
  const Strides contiguous;

 private:
  void pack_queries(BackwardMemory& m, int64_t h, int64_t begin, int64_t end) const {
    const Head<T> q(p.q, p.q_strides, h), d_out(p.d_out, contiguous, h);
    pack_columns(q, begin, end, p.dim, m.first_columns.get());
    pack_columns(d_out, begin, end, p.dim, m.second_columns.get());
    pack_rows(q, begin, end, p.dim, m.first_rows.get(), width);
    pack_rows(d_out, begin, end, p.dim, m.second_rows.get(), width);
    for (int64_t i = begin; i < end; ++i) {
      m.lse.get()[i - begin] = p.lse[i * p.heads + h];
      m.lse_rest.get()[i - begin] = p.lse_rest[i * p.heads + h];
      m.delta.get()[i - begin] = p.delta[i * p.heads + h];
      m.d_lse.get()[i - begin] = p.d_lse[i * p.heads + h];
    }
  }

  // Adds what columns [begin, end) give to the gradients of a row block, whose first row is row
  // `at` of the thread's memory. kTransposed: rows are keys and columns queries of head h.
  template <bool kTransposed>
  void add_block(BackwardMemory& m, const Spans& spans, const RowBlock& block, int64_t begin,
                 int64_t end, int64_t at, int64_t h) const {
    const Overlap overlap(block, begin, end);
    if (overlap.size() <= 0) return;
    const int64_t vectors = ceil_div(overlap.size(), kLanes), offset = overlap.begin - begin;
    float *scores = m.scores.get(), *d_scores = m.d_scores.get();
    multiply(block.count, vectors, p.dim,
             {m.first.get() + at * width, width, m.first_columns.get() + offset, kPitch, scores,
              kPitch, p.softmax_scale},
             false);
    multiply(block.count, vectors, p.dim,
             {m.second.get() + at * width, width, m.second_columns.get() + offset, kPitch, d_scores,
              kPitch},
             false);
    for (int64_t r = 0; r < block.count; ++r) {
      const int64_t query = kTransposed ? 0 : (block.first + r) * p.heads + h;
      Lanes lse = broadcast(p.lse[query]), lse_rest = broadcast(p.lse_rest[query]);
      Lanes delta = broadcast(p.delta[query]), d_lse = broadcast(p.d_lse[query]);
      for (int64_t j = 0; j < vectors * kLanes; j += kLanes) {
        if constexpr (kTransposed) {
          lse = load(m.lse.get() + offset + j);
          lse_rest = load(m.lse_rest.get() + offset + j);
          delta = load(m.delta.get() + offset + j);
          d_lse = load(m.d_lse.get() + offset + j);
        }
        float *score = scores + r * kPitch + j, *d_score = d_scores + r * kPitch + j;
        const Lanes weight = exp_lanes((load(score) - lse) - lse_rest);
        store(d_score, weight * (load(d_score) - delta + d_lse));
        store(score, weight);
      }
    }
    accumulate_visible(spans, block, overlap, d_scores, m.first_rows.get() + offset * width, width,
                       m.d_first.get() + at * width);
    if constexpr (kTransposed)
      accumulate_visible(spans, block, overlap, scores, m.second_rows.get() + offset * width, width,
                         m.d_second.get() + at * width);
  }
};

// One Memory a thread, made by the thread when it gets its first task.
template <typename Memory>
class MemoryPool {
 public:
  template <typename Make>
  MemoryPool(int threads, Make make) : memory_(std::max(threads, 1)), make_(make) {}

  // Runs body(task, memory) for all tasks.
  template <typename Body>
  void run(int64_t tasks, Body&& body) {
    parallel_for(tasks, static_cast<int>(memory_.size()), [&](int64_t task, int thread) {
      if (!memory_[thread]) memory_[thread] = make_();
      body(task, *memory_[thread]);
    });
  }

 private:
  std::vector<std::unique_ptr<Memory>> memory_;
  std::function<std::unique_ptr<Memory>()> make_;
};

}  // namespace

void attention_forward(const AttentionParams& p) {
  visit(p.dtype, [&](auto* type) {
    const Forward<std::remove_pointer_t<decltype(type)>> forward(p);
    const Tasks tasks(p, p.queries);
    MemoryPool<ForwardMemory> pool(p.threads, [&] {
      return std::make_unique<ForwardMemory>(forward.rows, tasks.heads, forward.width);
    });
    pool.run(tasks.count,
             [&](int64_t task, ForwardMemory& memory) { forward.run(tasks, task, memory); });
  });
}

void attention_backward(const AttentionParams& p) {
  visit(p.dtype, [&](auto* type) {
    const Backward<std::remove_pointer_t<decltype(type)>> backward(p);
    const Tasks tasks(p, p.queries);
    const int64_t rows = longest_tile(p.queries), key_tiles = count_tiles(p.keys);
    const int64_t blocks = ceil_div(p.queries.size, kColumns);
    const auto make = [&] {
      const int64_t size = std::max(rows * tasks.heads, longest_tile(p.keys));
      return std::make_unique<BackwardMemory>(size, backward.width);
    };
    MemoryPool<BackwardMemory> pool(p.threads, make);
    pool.run(blocks * p.heads,
             [&](int64_t task, BackwardMemory& m) { backward.prepare(blocks, task, m); });
    pool.run(tasks.count,
             [&](int64_t task, BackwardMemory& m) { backward.queries(tasks, task, rows, m); });
    pool.run(key_tiles * p.kv_heads,
             [&](int64_t task, BackwardMemory& m) { backward.keys(key_tiles, task, m); });
  });
}

}  // namespace moca::MOCA_ISA

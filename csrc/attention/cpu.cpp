// Attention on the CPU: tasks and threads. What a task computes is in cpu_forward.h and
// cpu_backward.h.
#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <vector>

#include "attention/cpu_backward.h"
#include "common/parallel.h"

namespace moca::MOCA_ISA {
namespace {

// Consecutive tiles whose keys no other unit sees: several short documents, or a long one.
struct Unit {
  int64_t first_tile, last_tile;  // one past
  int64_t begin, end;             // queries
  double cost;                    // pairs of a query and a key
  bool is_short() const { return last_tile - first_tile == 1; }
};

std::vector<Unit> split_units(const Spans& spans) {
  std::vector<Unit> units;
  for (int64_t t = 0; t < spans.max_tiles; ++t) {
    const Tile& tile = spans.tiles[t];
    if (tile.row_begin == tile.row_end) break;
    if (t == 0 || tile.key_begin >= spans.tiles[t - 1].key_end)
      units.push_back({t, t, tile.row_begin, tile.row_begin, 0.0});
    units.back().last_tile = t + 1;
    units.back().end = tile.row_end;
    units.back().cost += double(tile.row_end - tile.row_begin) * (tile.key_end - tile.key_begin);
  }
  return units;
}

// Queries of a unit and some of their heads.
struct ForwardTask {
  int64_t begin, end;
  HeadRange heads;
};

// Up to `step` heads share the packing of their keys: a run. A task has several runs of short
// documents, whose memory is neighbouring, or neighbouring tiles of a long one that begin at the
// same key, as long as their queries and sums, `floats` for each query and head, stay in cache; but
// no more than an eighth of a thread's share.
std::vector<ForwardTask> split_forward(const AttentionParams& p, int64_t step, int64_t floats) {
  constexpr int64_t kCache = 192 * 1024;  // floats
  const Spans& spans = p.queries;
  const std::vector<Unit> units = split_units(spans);
  const int64_t group = p.heads / p.kv_heads, runs_of_group = ceil_div(group, step);
  const int64_t runs = p.kv_heads * runs_of_group;
  const int64_t tiles = units.empty() ? 0 : units.back().last_tile;
  const int64_t share = std::max<int64_t>(1, tiles * runs / (8 * p.threads));
  const auto first_head = [&](int64_t run) {
    return run / runs_of_group * group + run % runs_of_group * step;
  };
  std::vector<ForwardTask> tasks;
  for (const Unit& unit : units) {
    const int64_t together = unit.is_short() ? ceil_div(runs, ceil_div(runs, share)) : 1;  // runs
    const Tile& first = spans.tiles[unit.first_tile];
    const int64_t fitting = kCache / (step * floats * (first.row_end - first.row_begin));
    const int64_t most = std::max<int64_t>(1, std::min(share, fitting));  // tiles
    for (int64_t run = 0; run < runs; run += together) {
      const HeadRange heads{first_head(run), first_head(std::min(run + together, runs))};
      for (int64_t tile = unit.first_tile, last; tile < unit.last_tile; tile = last) {
        const auto alike = [&](const Tile& t) {
          return t.key_begin == spans.tiles[tile].key_begin;
        };
        for (last = tile + 1; last < std::min(tile + most, unit.last_tile); ++last)
          if (!alike(spans.tiles[last])) break;
        tasks.push_back({spans.tiles[tile].row_begin, spans.tiles[last - 1].row_end, heads});
      }
    }
  }
  return tasks;
}

// A unit and some key heads in the backward pass. A long unit has one head a task, and may be cut
// in parts, which take turns at blocks of keys; each part then has sums for d_q of its own, `sums`
// floats into a shared buffer.
struct BackwardTask {
  Unit unit;
  HeadRange kv_heads;
  int64_t part, parts, sums;
  double cost() const { return unit.cost * (kv_heads.last - kv_heads.first) / parts; }
};

// So many parts that no task is more than half of a thread's share, and no more heads in a task
// than an eighth of it; the longest tasks first.
std::vector<BackwardTask> split_backward(const AttentionParams& p, int64_t floats_per_query,
                                         int64_t block) {
  const std::vector<Unit> units = split_units(p.queries);
  double total = 0.0;
  for (const Unit& unit : units) total += unit.cost * p.kv_heads;
  std::vector<BackwardTask> tasks;
  int64_t sums = 0;
  for (const Unit& unit : units) {
    const int64_t keys = p.queries.end[unit.end - 1] - p.queries.start[unit.begin];
    const double wanted = unit.cost > 0.0 ? std::ceil(2 * p.threads * unit.cost / total) : 1.0;
    const int64_t parts = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, keys / block));
    const bool has_share = unit.is_short() && unit.cost > 0.0;
    const double fitting = has_share ? total / (8 * p.threads * unit.cost) : 1.0;
    const int64_t together = std::clamp<int64_t>(fitting, 1, p.kv_heads);
    for (int64_t head = 0; head < p.kv_heads; head += together)
      for (int64_t part = 0; part < parts; ++part) {
        const HeadRange heads{head, std::min(head + together, p.kv_heads)};
        tasks.push_back({unit, heads, part, parts, sums});
        if (parts > 1) sums += (unit.end - unit.begin) * floats_per_query;
      }
  }
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const auto& a, const auto& b) { return a.cost() > b.cost(); });
  return tasks;
}

// Documents of more keys than a block has, in tiles. For others the backward needs no delta: where
// all keys of a row meet it at once, it comes from them.
std::vector<Slice> need_delta(const Spans& spans, int64_t block) {
  std::vector<Slice> slices;
  for (const Unit& unit : split_units(spans))
    for (int64_t t = unit.first_tile; t < unit.last_tile; ++t)
      for_each_document(spans, spans.tiles[t].row_begin, spans.tiles[t].row_end,
                        [&](const Slice& slice) {
                          if (!unit.is_short() || slice.key_end - slice.key_begin > block)
                            slices.push_back(slice);
                        });
  return slices;
}

template <typename T>
void clear_unseen_keys(const AttentionParams& p) {
  const int64_t size = p.kv_heads * p.dim;
  for (int64_t j = 0; j < p.keys.size; ++j)
    if (p.keys.start[j] == p.keys.end[j]) {
      std::fill_n(static_cast<T*>(p.d_k) + j * size, size, T{});
      std::fill_n(static_cast<T*>(p.d_v) + j * size, size, T{});
    }
}

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
    using T = std::remove_pointer_t<decltype(type)>;
    using Pass = Forward<T>;
    const Pass forward(p);
    const int64_t step = std::min(p.heads / p.kv_heads, kHeads);
    const auto tasks = split_forward(p, step, forward.width + forward.depth);
    int64_t rows = 0;
    for (const ForwardTask& task : tasks)
      rows = std::max<int64_t>(rows, round_up(task.end - task.begin, kRows<typename Pass::Word>));
    MemoryPool<typename Pass::Memory> pool(p.threads, [&] {
      return std::make_unique<typename Pass::Memory>(rows, step, forward.width);
    });
    pool.run(tasks.size(), [&](int64_t t, auto& memory) {
      forward.run(tasks[t].begin, tasks[t].end, tasks[t].heads, step, memory);
    });
  });
}

void attention_backward(const AttentionParams& p) {
  visit(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Pass = Backward<T>;
    const Pass backward(p);
    const int64_t floats = backward.group * backward.width;  // of d_q, for a query
    const std::vector<BackwardTask> tasks = split_backward(p, floats, Pass::kKeys);
    int64_t alone = 0, shared = 0;  // floats for d_q: of a task without parts, of all with parts
    for (const BackwardTask& task : tasks) {
      const int64_t size = (task.unit.end - task.unit.begin) * floats;
      if (task.parts > 1)
        shared = std::max(shared, task.sums + size);
      else
        alone = std::max(alone, size);
    }
    const Buffer sums(shared);
    MemoryPool<typename Pass::Memory> pool(p.threads, [&] {
      return std::make_unique<typename Pass::Memory>(backward.width, backward.most_blocks, alone);
    });
    const std::vector<Slice> slices = need_delta(p.queries, Pass::kKeys);
    parallel_for(slices.size() * p.heads, p.threads, [&](int64_t task, int) {
      const Slice& slice = slices[task / p.heads];
      backward.prepare(slice.begin, slice.end, task % p.heads);
    });
    clear_unseen_keys<T>(p);
    const auto run = [&](const BackwardTask& task, auto& memory) {
      const Unit& unit = task.unit;
      float* d_q = task.parts > 1 ? sums.get() + task.sums : memory.d_q.get();
      for (int64_t head = task.kv_heads.first; head < task.kv_heads.last; ++head) {
        const int64_t ahead = head + 1 < task.kv_heads.last ? 1 : 0;
        std::fill_n(d_q, (unit.end - unit.begin) * floats, 0.0f);
        backward.run(unit.begin, unit.end, head, ahead, task.part, task.parts, d_q, memory);
        if (task.parts == 1) backward.store_queries(unit.begin, unit.end, head, d_q, 1);
      }
    };
    pool.run(tasks.size(), [&](int64_t task, auto& memory) { run(tasks[task], memory); });
    parallel_for(tasks.size(), p.threads, [&](int64_t t, int) {
      const BackwardTask& task = tasks[t];
      if (task.parts > 1 && task.part == 0)
        backward.store_queries(task.unit.begin, task.unit.end, task.kv_heads.first,
                               sums.get() + task.sums, task.parts);
    });
  });
}

}  // namespace moca::MOCA_ISA

// A task turns some tokens. The cosines and sines of a token are brought to float32 once, for all
// of its heads; every element of q and k is read and written once.
#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "common/simd.h"
#include "mrope/mrope.h"

namespace moca::MOCA_ISA {
namespace {

constexpr int64_t kTokens = 32;  // of one task

// The angles of one token, for the first and the second dim of each pair.
struct Angles {
  float *cos1, *cos2, *sin1, *sin2;
};

template <typename T>
Lanes load_upto(const T* from, int64_t count) {
  return count == kLanes ? load(from) : load_some(from, count);
}

template <typename T>
void store_upto(T* to, Lanes x, int64_t count) {
  count == kLanes ? store(to, x) : store_some(to, x, count);
}

// The row of the tables that each pair turns by; with lanes to spare.
std::vector<int32_t> rows_of_pairs(const MropeParams& p) {
  const int64_t pairs = p.dim / 2;
  std::vector<int32_t> rows(round_up(pairs, kLanes));
  for (int64_t i = 0; i < pairs; ++i) {
    if (p.interleaved)
      rows[i] = i % 3 == 1 && i < 3 * p.height ? 1 : i % 3 == 2 && i < 3 * p.width ? 2 : 0;
    else
      rows[i] = i < p.time ? 0 : i < p.time + p.height ? 1 : 2;
  }
  return rows;
}

// Entries of a table at `from` in its first row, each taken out of its own row.
template <typename T>
Lanes pick(const MropeParams& p, const T* from, const int32_t* rows, int64_t count) {
  const Lanes time = load_upto(from, count);
  if (!p.sections) return time;
  const int64_t row = p.tokens * p.dim;
  const Lanes height = load_upto(from + row, count), width = load_upto(from + 2 * row, count);
  IntLanes code;
  std::memcpy(&code, rows, sizeof code);
  return code == 0 ? time : code == 1 ? height : width;
}

template <typename T>
void read_angles(const MropeParams& p, const int32_t* rows, int64_t token, const Angles& angles) {
  const int64_t pairs = p.dim / 2;
  const T* cos = static_cast<const T*>(p.cos) + token * p.dim;
  const T* sin = static_cast<const T*>(p.sin) + token * p.dim;
  for (int64_t i = 0; i < pairs; i += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, pairs - i);
    store(angles.cos1 + i, pick(p, cos + i, rows + i, count));
    store(angles.cos2 + i, pick(p, cos + pairs + i, rows + i, count));
    const Lanes sin1 = pick(p, sin + i, rows + i, count);
    const Lanes sin2 = pick(p, sin + pairs + i, rows + i, count);
    store(angles.sin1 + i, p.inverse ? -sin2 : sin1);
    store(angles.sin2 + i, p.inverse ? -sin1 : sin2);
  }
}

template <typename T>
void turn_heads(const T* x, T* out, int64_t heads, int64_t pairs, const Angles& angles) {
  for (int64_t head = 0; head < heads; ++head, x += 2 * pairs, out += 2 * pairs)
    for (int64_t i = 0; i < pairs; i += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, pairs - i);
      const Lanes x1 = load_upto(x + i, count), x2 = load_upto(x + pairs + i, count);
      store_upto(out + i, x1 * load(angles.cos1 + i) - x2 * load(angles.sin1 + i), count);
      store_upto(out + pairs + i, x2 * load(angles.cos2 + i) + x1 * load(angles.sin2 + i), count);
    }
}

template <typename T>
void turn_tokens(const MropeParams& p, const int32_t* rows, int64_t begin, int64_t end) {
  const int64_t width = round_up(p.dim / 2, kLanes);
  const Buffer buffer(4 * width);
  float* f = buffer.get();
  const Angles angles{f, f + width, f + 2 * width, f + 3 * width};
  const T *q = static_cast<const T*>(p.q), *k = static_cast<const T*>(p.k);
  T *q_out = static_cast<T*>(p.q_out), *k_out = static_cast<T*>(p.k_out);
  for (int64_t t = begin; t < end; ++t) {
    visit(p.table_dtype, [&](auto* type) {
      read_angles<std::remove_pointer_t<decltype(type)>>(p, rows, t, angles);
    });
    turn_heads(q + t * p.q_stride, q_out + t * p.heads * p.dim, p.heads, p.dim / 2, angles);
    turn_heads(k + t * p.k_stride, k_out + t * p.kv_heads * p.dim, p.kv_heads, p.dim / 2, angles);
  }
}

}  // namespace

void mrope_rotate(const MropeParams& p) {
  const std::vector<int32_t> rows = rows_of_pairs(p);
  visit(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(ceil_div(p.tokens, kTokens), p.threads, [&](int64_t task, int) {
      turn_tokens<T>(p, rows.data(), task * kTokens, std::min(p.tokens, (task + 1) * kTokens));
    });
  });
}

}  // namespace moca::MOCA_ISA

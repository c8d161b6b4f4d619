// Products of small matrices out of packed panels, the building block of the losses.
//
// An operand is packed into panels as wide as the register tile, stored depth-major: word k
// (common/words.h) of element i of a panel of width W lies at k * W + i, padded with zeros to full
// width and whole steps of depth. (Where products are made in tile registers, those want the left
// operand by rows: a step of a left panel is then stored so, one row after the other.) The tile is
// kTileRows x kTileCols; its float32 sums stay in registers for kDepth words. Sums run in a fixed
// order that depends on neither blocking nor threads, as long as depth is cut at multiples of
// kDepth words.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/amx.h"

namespace moca::MOCA_ISA {

// Sums fill 24 of 32 registers with AVX-512, 12 of 16 with AVX2, or four of eight tiles.
constexpr int kTileCols = 2 * kLanes;
template <typename Word>
constexpr int kTileRows = kInTiles<Word> ? kTileCols
                          : kLanes == 16 ? 12
                          : kLanes == 8  ? 6
                                         : 4;
// Panels of both operands of this depth fit the first cache.
template <typename Word>
constexpr int64_t kDepth = kInTiles<Word> ? 128 : 192;

// Floats from row to row of a product of `cols` columns: an odd number of vectors. Rows a power of
// two apart would drive each other out of the caches.
constexpr int64_t product_pitch(int64_t cols) { return (ceil_div(cols, kLanes) | 1) * kLanes; }

enum class Side { left, right };
template <Side kSide, typename Word>
constexpr int kPanelWidth = kSide == Side::left ? kTileRows<Word> : kTileCols;
// Whether a step of a panel is stored by rows.
template <Side kSide, typename Word>
constexpr bool kByRows = kSide == Side::left && kInTiles<Word>;

// Rows of a matrix, taken in order or through an index.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
  const int64_t* index = nullptr;
  const T* operator[](int64_t i) const { return data + (index ? index[i] : i) * stride; }
};

// Writes the first W lanes. More may be written where the panel goes on: panels are written in
// order.
template <int W, typename Word>
void store_step(Word* to, Lanes x, bool last) {
  if (W == kLanes || !last)
    store_words(to, x);
  else
    std::memcpy(to, &x, W * sizeof(Word));
}

template <typename Word>
void store_square(Word* to, const Lanes (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store_words(to + i * kLanes, rows[i]);
}

// `count` rows from `first` become panels whose width runs over rows and whose depth is `depth`.
template <Side kSide, typename Word, typename T>
void pack_rows(const Rows<T>& source, int64_t first, int64_t count, int64_t depth, Word* out) {
  constexpr int W = kPanelWidth<kSide, Word>, kWidth = std::min(W, kLanes);
  constexpr int64_t kSquare = kLanes * kPerWord<Word>;
  static_assert(W % kWidth == 0, "a panel is whole vectors wide, or narrower than one");
  const int64_t steps = words<Word>(depth);
  for (int64_t start = 0; start < count; start += W, out += W * steps)
    for (int part = 0; part < W; part += kWidth) {
      const int64_t rows = std::clamp<int64_t>(count - start - part, 0, kWidth);
      for (int64_t k = 0; k < depth; k += kSquare) {
        Lanes square[kLanes] = {};
#pragma GCC unroll 16
        for (int64_t i = 0; i < kWidth; ++i)
          if (i < rows) square[i] = words_of<Word>(source[first + start + part + i] + k, depth - k);
        const int64_t begin = k / kPerWord<Word>, some = std::min<int64_t>(kLanes, steps - begin);
        if constexpr (kByRows<kSide, Word>) {
          store_square(out + begin * W + part * kLanes, square);
        } else {
          transpose(square);
#pragma GCC unroll 16
          for (int64_t step = 0; step < kLanes; ++step)
            if (step < some)
              store_step<kWidth>(out + (begin + step) * W + part, square[step],
                                 begin + step + 1 == steps);
        }
      }
    }
}

// kLanes words, each made of the elements of one column in the rows `first` and (for pairs)
// `second`, which may be null for zeros; `count` columns are left.
template <typename Word, typename T>
Lanes words_down(const T* first, const T* second, int64_t count) {
  if constexpr (kPerWord<Word> == 1) {
    return words_of<Word>(first, count);
  } else {
    const T zeros[kLanes] = {};
    return interleave<Word>(first, second ? second : zeros, count);
  }
}

// `count` rows from `first` become the depth from `offset` (in whole steps) on of panels of total
// depth `depth`, whose width runs over the `size` columns.
template <Side kSide, typename Word, typename T>
void pack_columns(const Rows<T>& source, int64_t first, int64_t count, int64_t size, int64_t depth,
                  int64_t offset, Word* out) {
  constexpr int W = kPanelWidth<kSide, Word>, kWidth = std::min(W, kLanes);
  const int64_t panel = W * words<Word>(depth), steps = words<Word>(count);
  const auto row = [&](int64_t k) { return k < count ? source[first + k] : nullptr; };
  const auto word = [&](const T* row, const T* next, int64_t column) {
    if (!row || column >= size) return Lanes{};
    return words_down<Word>(row + column, next ? next + column : next, size - column);
  };
  out += offset / kPerWord<Word> * W;
  if constexpr (kByRows<kSide, Word>) {
    for (int64_t step = 0; step < steps; step += kLanes)
      for (int64_t start = 0; start < size; start += W)
        for (int part = 0; part < W; part += kLanes) {
          Lanes square[kLanes];
          for (int64_t i = 0, k = step * kPerWord<Word>; i < kLanes; ++i, k += kPerWord<Word>)
            square[i] = word(row(k), row(k + 1), start + part);
          transpose(square);
          store_square(out + start / W * panel + step * W + part * kLanes, square);
        }
  } else {
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t k = step * kPerWord<Word>;
      const T *above = row(k), *below = kPerWord<Word> == 2 ? row(k + 1) : nullptr;
      Word* to = out + step * W;
      for (int64_t start = 0; start < size; start += W, to += panel)
        for (int part = 0; part < W; part += kWidth)
          store_step<kWidth>(to + part, word(above, below, start + part), step + 1 == steps);
    }
  }
}

// One register tile: sums of a[k][i] * b[k][j] into (or onto) rows x cols of c.
template <typename Word>
inline void multiply_tile(int64_t steps, const Word* a, const Word* b, float* c, int64_t stride,
                          int64_t rows, int64_t cols, bool accumulate) {
  constexpr int kRows = kTileRows<Word>;
  if (accumulate)  // c is needed last, and comes from far
    for (int64_t i = 0; i < rows; ++i) {
      __builtin_prefetch(c + i * stride, 1);
      __builtin_prefetch(c + i * stride + kLanes, 1);
    }
  Lanes sum[kRows][2] = {};
  for (int64_t k = 0; k < steps; ++k, a += kRows, b += kTileCols) {
    const Lanes left = load_words(b), right = load_words(b + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Lanes factor = broadcast_word(a[i]);
      sum[i][0] = multiply_add<Word>(sum[i][0], factor, left);
      sum[i][1] = multiply_add<Word>(sum[i][1], factor, right);
    }
  }
  if (rows == kRows && cols == kTileCols) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i, c += stride) {
      store(c, accumulate ? load(c) + sum[i][0] : sum[i][0]);
      store(c + kLanes, accumulate ? load(c + kLanes) + sum[i][1] : sum[i][1]);
    }
    return;
  }
  alignas(64) float spill[kRows][kTileCols];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    store(spill[i], sum[i][0]);
    store(spill[i] + kLanes, sum[i][1]);
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j)
      c[i * stride + j] = accumulate ? c[i * stride + j] + spill[i][j] : spill[i][j];
}

#ifdef __AMX_BF16__
inline void multiply_tile(int64_t steps, const Bfloat16Pair* a, const Bfloat16Pair* b, float* c,
                          int64_t stride, int64_t rows, int64_t cols, bool accumulate) {
  constexpr int64_t kStep = kTileRows<Bfloat16Pair> * kLanes;
  multiply_tiles(rows, cols, {a, kLanes, kStep, b, steps / kLanes}, c, stride, accumulate);
}
#endif

// c (rows, cols), rows `stride` apart, = or += a . b over `depth`; a is packed in left panels, b in
// right ones. Its thread has TileRegisters.
template <typename Word>
void multiply(int64_t rows, int64_t cols, int64_t depth, const Word* a, const Word* b, float* c,
              int64_t stride, bool accumulate) {
  constexpr int kRows = kTileRows<Word>;
  const int64_t total = words<Word>(depth);
  if (total == 0 && !accumulate)
    for (int64_t i = 0; i < rows; ++i) std::fill_n(c + i * stride, cols, 0.0f);
  for (int64_t k = 0; k < total; k += kDepth<Word>) {
    const int64_t steps = std::min(kDepth<Word>, total - k);
    for (int64_t j = 0; j < cols; j += kTileCols)
      for (int64_t i = 0; i < rows; i += kRows)
        multiply_tile(steps, a + i * total + k * kRows, b + j * total + k * kTileCols,
                      c + i * stride + j, stride, std::min<int64_t>(kRows, rows - i),
                      std::min<int64_t>(kTileCols, cols - j), accumulate || k > 0);
  }
}

}  // namespace moca::MOCA_ISA

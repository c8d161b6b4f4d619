// Products of small matrices out of packed operands, the building block of attention.
//
// The left operand keeps its rows, kPitch words apart. The right operand is packed into panels of
// kPanel columns, each panel stored depth-major: word k of column j of a panel is panel[k * kPanel
// + j]. Depth runs over words (common/words.h): along D for scores, along tokens for sums over
// tokens. The sums of a register tile of kRows x kPanel stay in registers. Operands are filled with
// zeros to whole steps of depth; what lies past the rows asked for is read, too, and may be
// anything.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/attention.h"
#include "common/amx.h"

namespace moca::MOCA_ISA {

// Sums fill 24 of 32 registers, or 12 of 16, or four of eight tiles.
template <typename Word>
constexpr int kRows = kInTiles<Word> ? 2 * kLanes
                      : kLanes == 16 ? 12
                                     : 6;
constexpr int kPanel = 2 * kLanes;
constexpr int64_t kPitch = 384 + 16;  // words; holds kColumns or D, and is no power of two
constexpr int64_t kMaxDim = 256;
constexpr int64_t kChain = 32;  // longest plain sum of floats: longer ones lose digits

template <typename Word>
constexpr int64_t kLongest = kPerWord<Word> == 1 ? kChain : INT64_MAX / 2;

// c = factor * a . b, or c += a . b. Rows of c are c_pitch floats apart, panels of b b_pitch words.
template <typename Word>
struct Product {
  const Word* a;
  const Word* b;
  int64_t b_pitch;
  float* c;
  int64_t c_pitch;
  float factor = 1.0f;
  bool roomy = false;  // c has rows up to a whole register tile, which may be written
};

// One register tile of R rows (of which the first `rows` are wanted) and N vectors.
template <int R, int N, typename Word>
inline void multiply_tile(int64_t rows, int64_t depth, const Product<Word>& x, bool accumulate) {
  const Word *a = x.a, *b = x.b;
  for (int64_t begin = 0; begin < depth; begin += kLongest<Word>) {
    const int64_t end = std::min(begin + kLongest<Word>, depth);
    Lanes sum[R][N] = {};
    for (int64_t k = begin; k < end; ++k, b += kPanel) {
      Lanes right[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) right[n] = load_words(b + n * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Lanes left = broadcast_word(a[r * kPitch]);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) sum[r][n] = multiply_add<Word>(sum[r][n], left, right[n]);
      }
      ++a;
    }
    const float factor = end == depth ? x.factor : 1.0f;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      if (r >= rows) break;
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) {
        float* to = x.c + r * x.c_pitch + n * kLanes;
        store(to, (accumulate || begin > 0 ? load(to) + sum[r][n] : sum[r][n]) * factor);
      }
    }
  }
}

#ifdef __AMX_BF16__

// The product in tile registers.
inline void multiply(int64_t rows, int64_t vectors, int64_t depth, Product<Bfloat16Pair> x,
                     bool accumulate) {
  TileProduct product{x.a, kPitch, kLanes, x.b, ceil_div(depth, kLanes)};
  for (; vectors > 0; vectors -= 2, product.b += x.b_pitch, x.c += kPanel) {
    const int64_t cols = std::min<int64_t>(vectors * kLanes, kPanel);
    multiply_tiles(x.roomy ? round_up(rows, kTileSide) : rows, cols, product, x.c, x.c_pitch,
                   accumulate);
    for (int64_t r = 0; r < rows && x.factor != 1.0f; ++r)
      for (int64_t j = 0; j < cols; j += kLanes)
        store(x.c + r * x.c_pitch + j, load(x.c + r * x.c_pitch + j) * x.factor);
  }
}

#endif

// The product for up to kRows rows and any number of vectors of columns. Its thread has
// TileRegisters.
template <typename Word>
inline void multiply(int64_t rows, int64_t vectors, int64_t depth, Product<Word> x,
                     bool accumulate) {
  constexpr int kRows = moca::MOCA_ISA::kRows<Word>, kThird = kRows / 3;
  const auto tiles = [&](auto height) {
    constexpr int R = decltype(height)::value;
    for (int64_t left = vectors; left > 0; left -= 2, x.b += x.b_pitch, x.c += kPanel)
      if (left > 1)
        multiply_tile<R, 2>(rows, depth, x, accumulate);
      else
        multiply_tile<R, 1>(rows, depth, x, accumulate);
  };
  if (rows > 2 * kThird)
    tiles(std::integral_constant<int, kRows>());
  else if (rows > kThird)
    tiles(std::integral_constant<int, 2 * kThird>());
  else
    tiles(std::integral_constant<int, kThird>());
}

// One (tokens, D) head of a packed tensor. Tokens outside [begin, end) read as zeros. What is read
// of a token is fetched `ahead` heads on, too, if the caller will come there next.
template <typename T>
struct Head {
  Head(const void* base, Strides strides, int64_t head, int64_t begin, int64_t end,
       int64_t ahead = 0)
      : data(static_cast<const T*>(base) + head * strides.head),
        stride(strides.token),
        ahead(ahead * strides.head),
        begin(begin),
        end(end) {}
  const T* operator[](int64_t token) const {
    static const T kZeros[kMaxDim] = {};
    return token >= begin && token < end ? data + token * stride : kZeros;
  }
  template <typename Word>
  Lanes words(int64_t token, int64_t d, int64_t dim) const {
    const T* row = (*this)[token];
    __builtin_prefetch(row + ahead + d);
    return words_of<Word>(row + d, dim - d);
  }
  const T* data;
  int64_t stride, ahead, begin, end;
};

// Tokens [begin, end) as rows of a left operand, with depth along D.
template <typename Word, typename T>
void pack_left(const Head<T>& head, int64_t begin, int64_t end, int64_t dim, Word* to) {
  constexpr int64_t kStep = kLanes * kPerWord<Word>;
  for (int64_t i = begin; i < end; ++i, to += kPitch)
    for (int64_t d = 0; d < dim; d += kStep)
      store_words(to + d / kPerWord<Word>, head.template words<Word>(i, d, dim));
}

// Tokens [begin, end) as columns of a right operand, with depth along D; whole panels are filled.
template <typename Word, typename T>
void pack_dims(const Head<T>& head, int64_t begin, int64_t end, int64_t dim, Word* to) {
  constexpr int64_t kStep = kLanes * kPerWord<Word>;
  const int64_t depth = words<Word>(dim);
  for (int64_t i = begin; i < end; i += kPanel, to += depth * kPanel)
    for (int part = 0; part < kPanel; part += kLanes)
      for (int64_t d = 0; d < dim; d += kStep) {
        Lanes x[kLanes];
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) x[r] = head.template words<Word>(i + part + r, d, dim);
        transpose(x);
        const int64_t first = d / kPerWord<Word>;
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r)
          if (first + r < depth) store_words(to + (first + r) * kPanel + part, x[r]);
      }
}

// kLanes elements from `d` of a token, or of each of the tokens of a word, as words.
template <typename Word, typename T>
Lanes token_words(const Head<T>& head, int64_t token, int64_t d, int64_t dim) {
  for (int next = 0; next < kPerWord<Word>; ++next)
    __builtin_prefetch(head[token + next] + head.ahead + d);
  if constexpr (kPerWord<Word> == 1)
    return words_of<Word>(head[token] + d, dim - d);
  else
    return interleave<Word>(head[token] + d, head[token + 1] + d, dim - d);
}

// Tokens [begin, end) as depth of a right operand whose columns run over D.
template <typename Word, typename T>
void pack_tokens(const Head<T>& head, int64_t begin, int64_t end, int64_t dim, Word* to) {
  const int64_t depth = words<Word>(end - begin), pitch = depth * kPanel;
  const int64_t last = begin + depth * kPerWord<Word>;
  for (int64_t i = begin; i < last; i += kPerWord<Word>, to += kPanel)
    for (int64_t d = 0; d < dim; d += kLanes)
      store_words(to + d / kPanel * pitch + d % kPanel, token_words<Word>(head, i, d, dim));
}

// Tokens [begin, end) as depth of a left operand whose rows run over D.
template <typename Word, typename T>
void pack_left_tokens(const Head<T>& head, int64_t begin, int64_t end, int64_t dim, Word* to) {
  for (int64_t i = begin; i < end; i += kLanes * kPerWord<Word>, to += kLanes)
    for (int64_t d = 0; d < dim; d += kLanes) {
      Lanes x[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r)
        x[r] = token_words<Word>(head, i + r * kPerWord<Word>, d, dim);
      transpose(x);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) store_words(to + (d + r) * kPitch, x[r]);
    }
}

}  // namespace moca::MOCA_ISA

// Pieces of a tile that forward and backward share. A tile has rows (queries; in the transposed
// pass keys) and columns (the other side), and its rows are taken in register blocks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention/attention.h"
#include "common/exp.h"
#include "common/simd.h"

namespace moca::MOCA_ISA {

constexpr int kRows = 6;                        // rows of a register block
constexpr int kVectors = kLanes == 16 ? 4 : 2;  // vectors of a register block
constexpr int64_t kColumns = 128;               // columns packed at a time
constexpr int64_t kPitch = kColumns + 16;       // one vector of slack; no power of two
constexpr int64_t kChain = 16;                  // longest plain sum: longer ones lose digits
constexpr int64_t kHeads = 4;                   // heads that share one packing of keys

// c = factor * a . b, or c += a . b: rows of a, b and c are `pitch` floats apart.
struct Product {
  const float* a;
  int64_t a_pitch;
  const float* b;
  int64_t b_pitch;
  float* c;
  int64_t c_pitch;
  float factor = 1.0f;
};

// R rows and N vectors of a product over `depth`, the sums held in registers.
template <int R, int N>
inline void multiply_block(int64_t depth, const Product& x, bool accumulate) {
  for (int64_t begin = 0; begin < depth; begin += kChain) {
    const int64_t end = std::min(begin + kChain, depth);
    Lanes sum[R][N] = {};
    for (int64_t k = begin; k < end; ++k) {
      Lanes right[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) right[n] = load(x.b + k * x.b_pitch + n * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Lanes left = broadcast(x.a[r * x.a_pitch + k]);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sum[r][n] += left * right[n];
      }
    }
    const float factor = end == depth ? x.factor : 1.0f;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        float* to = x.c + r * x.c_pitch + n * kLanes;
        store(to, (accumulate || begin > 0 ? load(to) + sum[r][n] : sum[r][n]) * factor);
      }
  }
}

template <int R>
void multiply_rows(int64_t vectors, int64_t depth, Product x, bool accumulate) {
  for (; vectors >= kVectors; vectors -= kVectors) {
    multiply_block<R, kVectors>(depth, x, accumulate);
    x.b += kVectors * kLanes;
    x.c += kVectors * kLanes;
  }
  if (vectors == 1) multiply_block<R, 1>(depth, x, accumulate);
  if constexpr (kVectors > 2) {
    if (vectors == 2) multiply_block<R, 2>(depth, x, accumulate);
    if (vectors == 3) multiply_block<R, 3>(depth, x, accumulate);
  }
}

// The product of a (rows, depth) and b (depth, vectors), for up to kRows rows.
inline void multiply(int64_t rows, int64_t vectors, int64_t depth, const Product& x,
                     bool accumulate) {
  switch (rows) {
    case 1: return multiply_rows<1>(vectors, depth, x, accumulate);
    case 2: return multiply_rows<2>(vectors, depth, x, accumulate);
    case 3: return multiply_rows<3>(vectors, depth, x, accumulate);
    case 4: return multiply_rows<4>(vectors, depth, x, accumulate);
    case 5: return multiply_rows<5>(vectors, depth, x, accumulate);
    case 6: return multiply_rows<6>(vectors, depth, x, accumulate);
  }
}

// Rows [first, first + count) of one document, and the columns that some and that all of them see.
struct RowBlock {
  int64_t first, count;
  int64_t begin, end;
  int64_t shared_begin, shared_end;
};

// Neighbours join a block as long as they share columns and their ends are near each other, so
// that almost all of what a block computes is seen by all of its rows.
inline void split_rows(const Spans& spans, const Tile& tile, std::vector<RowBlock>& blocks) {
  blocks.clear();
  for (int64_t row = tile.row_begin; row < tile.row_end;) {
    const int64_t start = spans.start[row], end = spans.end[row];
    int64_t stop = row + 1;
    while (stop < tile.row_end && stop < row + kRows && spans.start[stop] < end &&
           spans.start[stop] - start <= kLanes && spans.end[stop] - end <= kLanes)
      ++stop;
    blocks.push_back({row, stop - row, start, spans.end[stop - 1], spans.start[stop - 1], end});
    row = stop;
  }
}

// The part of a row block that lies in columns [begin, end).
struct Overlap {
  Overlap(const RowBlock& block, int64_t begin, int64_t end)
      : begin(std::max(block.begin, begin)),
        end(std::min(block.end, end)),
        shared_begin(std::max(block.shared_begin, begin)),
        shared_end(std::max(shared_begin, std::min(block.shared_end, end))) {}
  int64_t size() const { return end - begin; }
  int64_t begin, end, shared_begin, shared_end;
};

// One (tokens, D) head of a packed tensor.
template <typename T>
struct Head {
  Head(const void* base, Strides strides, int64_t head)
      : data(static_cast<const T*>(base) + head * strides.head), stride(strides.token) {}
  const T* operator[](int64_t token) const { return data + token * stride; }
  const T* data;
  int64_t stride;
};

// Rows [begin, end) in float32, `pitch` apart; D is padded with zeros to whole vectors.
template <typename T>
void pack_rows(const Head<T>& head, int64_t begin, int64_t end, int64_t dim, float* to,
               int64_t pitch) {
  const int64_t whole = dim / kLanes * kLanes;
  for (int64_t i = begin; i < end; ++i, to += pitch) {
    const T* from = head[i];
    for (int64_t d = 0; d < whole; d += kLanes) store(to + d, load(from + d));
    if (whole < dim) store(to + whole, load_some(from + whole, dim - whole));
  }
}

// Rows [begin, end) become columns: to[d * kPitch + i]. Slack up to a whole vector is zero.
template <typename T>
void pack_columns(const Head<T>& head, int64_t begin, int64_t end, int64_t dim, float* to) {
  for (int64_t i = begin; i < end; i += kLanes, to += kLanes)
    for (int64_t d = 0; d < dim; d += kLanes) {
      Lanes x[kLanes];
      const int64_t rows = std::min<int64_t>(kLanes, end - i);
      const bool whole = dim - d >= kLanes;
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        const T* from = r < rows ? head[i + r] + d : nullptr;
        x[r] = !from ? Lanes{} : whole ? load(from) : load_some(from, dim - d);
      }
      transpose(x);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) store(to + (d + r) * kPitch, x[r]);
    }
}

// sum (rows of the block, dim vectors) += weights . columns, over exactly the columns that each
// row sees: a hidden column adds nothing, even if it holds NaN. weights[r * kPitch] is the weight
// of column overlap.begin, columns + j * pitch is column overlap.begin + j.
inline void accumulate_visible(const Spans& spans, const RowBlock& block, const Overlap& overlap,
                               const float* weights, const float* columns, int64_t pitch,
                               float* sum) {
  const auto add = [&](int64_t row, int64_t rows, int64_t begin, int64_t end) {
    if (begin >= end) return;
    const int64_t skip = begin - overlap.begin;
    multiply(rows, pitch / kLanes, end - begin,
             {weights + row * kPitch + skip, kPitch, columns + skip * pitch, pitch,
              sum + row * pitch, pitch},
             true);
  };
  add(0, block.count, overlap.shared_begin, overlap.shared_end);
  if (overlap.shared_begin == overlap.begin && overlap.shared_end == overlap.end) return;
  for (int64_t r = 0; r < block.count; ++r) {
    const int64_t start = std::max<int64_t>(spans.start[block.first + r], overlap.begin);
    const int64_t end = std::min<int64_t>(spans.end[block.first + r], overlap.end);
    add(r, 1, start, std::min(end, overlap.shared_begin));
    add(r, 1, std::max(start, overlap.shared_end), end);
  }
}

inline int64_t count_tiles(const Spans& spans) {
  int64_t used = 0;
  while (used < spans.max_tiles && spans.tiles[used].row_begin < spans.tiles[used].row_end) ++used;
  return used;
}

inline int64_t longest_tile(const Spans& spans) {
  int64_t rows = 0;
  for (int64_t t = 0; t < spans.max_tiles; ++t)
    rows = std::max<int64_t>(rows, spans.tiles[t].row_end - spans.tiles[t].row_begin);
  return rows;
}

}  // namespace moca::MOCA_ISA

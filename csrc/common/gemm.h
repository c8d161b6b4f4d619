// Products of small float32 matrices out of packed panels, the building block of the losses.
//
// An operand is packed into panels as wide as the register tile, stored depth-major: element
// (i, k) of a panel of width W lies at k * W + i, padded with zeros to full width. The tile is
// kTileRows x kTileCols; its sums stay in registers for kDepth steps. Sums run in a fixed order
// that depends on neither blocking nor threads, as long as depth is cut at multiples of kDepth.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/simd.h"

namespace moca::MOCA_ISA {

// Sums fill 24 of 32 registers with AVX-512, 12 of 16 with AVX2.
constexpr int kTileRows = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 4;
constexpr int kTileCols = 2 * kLanes;
constexpr int64_t kDepth = 256;  // a panel of this depth and kTileCols fits the first cache

// Rows of a matrix, taken in order or through an index.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
  const int64_t* index = nullptr;
  const T* operator[](int64_t i) const { return data + (index ? index[i] : i) * stride; }
};

// `count` rows from `first` become panels whose width runs over rows and whose depth is `depth`.
template <int W, typename T>
void pack_rows(const Rows<T>& source, int64_t first, int64_t count, int64_t depth, float* out) {
  constexpr int kWidth = std::min(W, kLanes);
  static_assert(W % kWidth == 0, "a panel is whole vectors wide, or narrower than one");
  for (int64_t start = 0; start < count; start += W, out += W * depth)
    for (int part = 0; part < W; part += kWidth) {
      const int64_t rows = std::clamp<int64_t>(count - start - part, 0, kWidth);
      for (int64_t k = 0; k < depth; k += kLanes) {
        const int64_t steps = std::min<int64_t>(kLanes, depth - k);
        Lanes square[kLanes] = {};
        for (int64_t i = 0; i < rows; ++i) {
          const T* from = source[first + start + part + i] + k;
          square[i] = steps == kLanes ? load(from) : load_some(from, steps);
        }
        transpose(square);
        for (int64_t step = 0; step < steps; ++step)
          std::memcpy(out + (k + step) * W + part, &square[step], kWidth * sizeof(float));
      }
    }
}

// `count` rows from `first` become steps `offset` .. of panels of total depth `depth`, whose width
// runs over the `size` columns.
template <int W, typename T>
void pack_columns(const Rows<T>& source, int64_t first, int64_t count, int64_t size, int64_t depth,
                  int64_t offset, float* out) {
  for (int64_t k = 0; k < count; ++k) {
    const T* row = source[first + k];
    float* to = out + (offset + k) * W;
    int64_t start = 0;
    for (; start + W <= size; start += W, to += W * depth)
      for (int i = 0; i < W; ++i) to[i] = to_float(row[start + i]);
    if (start < size)
      for (int i = 0; i < W; ++i) to[i] = start + i < size ? to_float(row[start + i]) : 0.0f;
  }
}

// One register tile: sums of a[k][i] * b[k][j] into (or onto) rows x cols of c.
inline void multiply_tile(int64_t depth, const float* a, const float* b, float* c, int64_t stride,
                          int64_t rows, int64_t cols, bool accumulate) {
  Lanes sum[kTileRows][2] = {};
  for (int64_t k = 0; k < depth; ++k, a += kTileRows, b += kTileCols) {
    const Lanes left = load(b), right = load(b + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      sum[i][0] += a[i] * left;
      sum[i][1] += a[i] * right;
    }
  }
  if (rows == kTileRows && cols == kTileCols) {
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i, c += stride) {
      store(c, accumulate ? load(c) + sum[i][0] : sum[i][0]);
      store(c + kLanes, accumulate ? load(c + kLanes) + sum[i][1] : sum[i][1]);
    }
    return;
  }
  alignas(64) float spill[kTileRows][kTileCols];
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
    store(spill[i], sum[i][0]);
    store(spill[i] + kLanes, sum[i][1]);
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j)
      c[i * stride + j] = accumulate ? c[i * stride + j] + spill[i][j] : spill[i][j];
}

// c (rows, cols), rows `stride` apart, = or += a . b over `depth`; a is packed in panels of
// kTileRows, b in panels of kTileCols.
inline void multiply(int64_t rows, int64_t cols, int64_t depth, const float* a, const float* b,
                     float* c, int64_t stride, bool accumulate) {
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t steps = std::min(kDepth, depth - k);
    for (int64_t j = 0; j < cols; j += kTileCols)
      for (int64_t i = 0; i < rows; i += kTileRows)
        multiply_tile(steps, a + i * depth + k * kTileRows, b + j * depth + k * kTileCols,
                      c + i * stride + j, stride, std::min<int64_t>(kTileRows, rows - i),
                      std::min<int64_t>(kTileCols, cols - j), accumulate || k > 0);
  }
}

}  // namespace moca::MOCA_ISA

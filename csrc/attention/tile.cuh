// Tiles of q, k and v: in shared memory, in the fragments of a warp, and which of them are needed.
#pragma once

#include "attention/cuda.h"
#include "common/cuda.h"
#include "common/ptx.cuh"

namespace moca::attention {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();

// kRows rows of kDim 16-bit values in shared memory, in chunks of 16 bytes. Rows lie an odd number
// of chunks apart, so that the eight rows that a matrix load reads at one column are in different
// banks.
template <int kRows_, int kDim>
struct SharedTile {
  static_assert(kDim % 16 == 0);
  static constexpr int kRows = kRows_;
  static constexpr int kChunks = kDim / 8;
  static constexpr int kPitch = (kChunks + 1) * 16;
  static constexpr int kBytes = kRows * kPitch;

  uint32_t base;

  __device__ uint32_t address(int row, int chunk) const { return base + row * kPitch + chunk * 16; }

  // Of 16 rows from `row`: the operand a whose columns are chunks 2 step and 2 step + 1.
  __device__ void load_a(uint32_t (&a)[4], int row, int step) const {
    const int lane = threadIdx.x % 32;
    ptx::load_matrices(a, address(row + lane % 16, 2 * step + lane / 16));
  }

  // Of 16 rows from `row`, as columns of b: (b0, b1) of rows 0 to 7, then of rows 8 to 15.
  __device__ void load_b(uint32_t (&b)[4], int row, int step) const {
    const int lane = threadIdx.x % 32;
    ptx::load_matrices(b, address(row + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
  }

  // Of 16 rows from `row`, as rows of b: (b0, b1) of the columns of chunk 2 step, then of the next.
  __device__ void load_b_transposed(uint32_t (&b)[4], int row, int step) const {
    const int lane = threadIdx.x % 32;
    ptx::load_matrices_transposed(b, address(row + lane % 16, 2 * step + lane / 16));
  }
};

// One head of a (tokens, heads, D) tensor.
struct Head {
  const uint16_t* data;
  int64_t token;  // stride
  int dim;

  __device__ Head(const void* tensor, int64_t token_stride, int64_t head_stride, int64_t head,
                  int64_t dim)
      : data(static_cast<const uint16_t*>(tensor) + head * head_stride),
        token(token_stride),
        dim(static_cast<int>(dim)) {}
};

// Starts the copy of rows from `first`, as one group; rows from `end` on and columns from D on
// become 0.
template <int kThreads, typename Tile>
__device__ void copy_rows(const Tile& tile, const Head& head, int first, int end) {
  for (int i = threadIdx.x; i < Tile::kRows * Tile::kChunks; i += kThreads) {
    const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
    const bool valid = first + row < end && chunk * 8 < head.dim;
    const int64_t offset = valid ? (first + row) * head.token + chunk * 8 : 0;
    ptx::copy_async(tile.address(row, chunk), head.data + offset, valid);
  }
  ptx::copy_async_commit();
}

// What one block of threads does: `rows` rows from `row` of one head, against the columns
// [begin, end) of the other side in blocks of kColumns. Blocks [full_begin, full_end) are seen
// whole by every row.
struct Work {
  int head, row, rows, begin, end, blocks, full_begin, full_end;
};

// The index-th piece of work: a part of at most kRows rows of a tile, of one head. Heads of a tile
// are neighbours, since those that share k and v find them in the cache; the plan has tiles with
// the most keys first and unused ones last. `rows` is 0 where there is nothing to do.
template <int kRows, int kColumns>
__device__ Work find_work(const Spans& spans, int64_t tile_rows, int64_t heads, int index) {
  const int parts = ceil_div(static_cast<int>(tile_rows), kRows);
  const int part = index / static_cast<int>(heads) % parts;
  const Tile tile = spans.tiles[index / static_cast<int>(heads) / parts];
  Work work{};
  work.head = index % static_cast<int>(heads);
  work.row = tile.row_begin + part * kRows;
  work.rows = min(tile.row_end - work.row, kRows);
  if (work.rows <= 0) {
    work.rows = 0;
    return work;
  }
  const int last = work.row + work.rows - 1;
  // Rows at either end that see nothing take part in nothing: what lies between their empty spans
  // and the others' may be NaN that nobody sees.
  int from = work.row, to = last;
  while (from < to && spans.start[from] == spans.end[from]) ++from;
  while (from < to && spans.start[to] == spans.end[to]) --to;
  work.begin = spans.start[from];
  work.end = spans.end[to];
  work.blocks = ceil_div(work.end - work.begin, kColumns);
  work.full_begin = ceil_div(spans.start[last] - work.begin, kColumns);
  work.full_end = (spans.end[work.row] - work.begin) / kColumns;
  return work;
}

// How many pieces of work find_work knows.
inline int64_t count_work(const Spans& spans, int64_t tile_rows, int rows, int64_t heads) {
  return spans.max_tiles * ceil_div(tile_rows, rows) * heads;
}

template <typename... Arguments, typename... More>
void launch_kernel(const char* name, void (*kernel)(Arguments...), int64_t blocks, int threads,
                   int shared, const AttentionCudaParams& p, Queue queue, const More&... more) {
  launch({name,
          {{"T", p.queries.size},
           {"K", p.keys.size},
           {"H", p.heads},
           {"Hkv", p.kv_heads},
           {"D", p.dim}},
          queue,
          dim3(static_cast<unsigned>(blocks)),
          dim3(threads),
          static_cast<size_t>(shared)},
         kernel, p, more...);
}

// scores = a b^T, of 16 kTiles rows of `a` from `row` and all rows of b. A lane holds of tile t of
// 16 rows, in scores[t][n], rows `group` and `group` + 8, columns 8 n + 2 pair and the next.
template <DType type, int kTiles, int kColumns, typename A, typename B>
__device__ void multiply_rows(float (&scores)[kTiles][kColumns][4], const A& a, int row,
                              const B& b) {
  static_assert(8 * kColumns == B::kRows && A::kChunks == B::kChunks);
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[t][n][i] = 0;
#pragma unroll
  for (int step = 0; step < A::kChunks / 2; ++step) {
    uint32_t left[kTiles][4];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) a.load_a(left[t], row + 16 * t, step);
#pragma unroll
    for (int n = 0; n < kColumns / 2; ++n) {
      uint32_t right[4];
      b.load_b(right, 16 * n, step);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        ptx::multiply_add<type>(scores[t][2 * n], left[t], right[0], right[1]);
        ptx::multiply_add<type>(scores[t][2 * n + 1], left[t], right[2], right[3]);
      }
    }
  }
}

// output += weights b, of b's columns from chunk `first` on; weights and output as lanes hold
// scores. Two neighbouring tiles of weights are, in their lanes, one operand a.
template <DType type, int kTiles, int kColumns, int kRows, typename B>
__device__ void multiply_weights(float (&output)[kTiles][kColumns][4],
                                 const float (&weights)[kTiles][kRows][4], const B& b,
                                 int first = 0) {
  static_assert(8 * kRows == B::kRows && kColumns <= B::kChunks);
#pragma unroll
  for (int step = 0; step < kRows / 2; ++step) {
    uint32_t left[kTiles][4];
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &weights[t][2 * step + i / 2][i % 2 * 2];
        left[t][i] = ptx::pack<type>(pair[0], pair[1]);
      }
#pragma unroll
    for (int n = 0; n < kColumns / 2; ++n) {
      uint32_t right[4];
      b.load_b_transposed(right, 16 * step, first / 2 + n);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        ptx::multiply_add<type>(output[t][2 * n], left[t], right[0], right[1]);
        ptx::multiply_add<type>(output[t][2 * n + 1], left[t], right[2], right[3]);
      }
    }
  }
}

// Writes a warp's 16 kTiles rows of output, each times its factor, to `target` (its first row and
// column), through the warp's own rows of `tile`: `row` is the first, `rows` and `chunks` say how
// many of the tile's rows and of the output's chunks are wanted.
template <DType type, int kTiles, int kColumns, typename Tile>
__device__ void store_rows(uint16_t* target, int64_t token, const Tile& tile, int row, int rows,
                           int chunks, const float (&output)[kTiles][kColumns][4],
                           const float (&factor)[kTiles][2]) {
  const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
        ptx::store_shared(tile.address(row + 16 * t + 8 * r + group, n) + 4 * pair,
                          ptx::pack<type>(output[t][n][2 * r] * factor[t][r],
                                          output[t][n][2 * r + 1] * factor[t][r]));
  __syncwarp();
  for (int i = lane; i < 16 * kTiles * kColumns; i += 32) {
    const int at = row + i / kColumns, chunk = i % kColumns;
    if (at < rows && chunk < chunks)
      *reinterpret_cast<uint4*>(target + at * token + chunk * 8) =
          ptx::load_shared(tile.address(at, chunk));
  }
  __syncwarp();  // before others are stored there
}

// Calls body(integral constant) for the smallest compiled dim that holds D; columns past D are 0.
template <int kDim>
struct Dim {
  static constexpr int value = kDim;
};

template <typename Body>
void visit_dim(int64_t dim, Body&& body) {
  if (dim <= 32) return body(Dim<32>{});
  if (dim <= 64) return body(Dim<64>{});
  if (dim <= 80) return body(Dim<80>{});
  if (dim <= 96) return body(Dim<96>{});
  if (dim <= 128) return body(Dim<128>{});
  if (dim <= 192) return body(Dim<192>{});
  return body(Dim<256>{});
}

}  // namespace moca::attention

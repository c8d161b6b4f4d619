// Tiles of q, k and v: in shared memory, in the fragments of a warp, and which of them are needed.
#pragma once

#include "attention/cuda.h"
#include "common/ptx.cuh"

namespace moca::attention {

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

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

// The work of block blockIdx.x: a part of at most kRows rows of a tile. Tiles of one head are
// neighbours, since they share k and v in the cache; the last tiles come first, since under a
// causal mask they take longest. `rows` is 0 where there is nothing to do.
template <int kRows, int kColumns>
__device__ Work find_work(const Spans& spans, int64_t tile_rows) {
  const int parts = ceil_div(static_cast<int>(tile_rows), kRows);
  const int tiles = static_cast<int>(spans.max_tiles);
  const int part = blockIdx.x % parts, rest = blockIdx.x / parts;
  const Tile tile = spans.tiles[rest % tiles];
  Work work{};
  work.head = rest / tiles;
  work.row = tile.row_begin + part * kRows;
  work.rows = min(tile.row_end - work.row, kRows);
  if (work.rows <= 0) {
    work.rows = 0;
    return work;
  }
  const int last = work.row + work.rows - 1;
  work.begin = spans.start[work.row];
  work.end = spans.end[last];
  work.blocks = ceil_div(work.end - work.begin, kColumns);
  work.full_begin = ceil_div(spans.start[last] - work.begin, kColumns);
  work.full_end = (spans.end[work.row] - work.begin) / kColumns;
  return work;
}

inline int64_t count_work(const Spans& spans, int64_t tile_rows, int rows, int64_t heads) {
  return spans.max_tiles * ((tile_rows + rows - 1) / rows) * heads;
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

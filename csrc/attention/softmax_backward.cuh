// The derivative of the softmax, on scores as the lanes of a warp hold them: rows `group` and
// `group` + 8 (r = 0, 1), columns 8 n + 2 pair and the next (c = 0, 1). Queries are the rows, or
// the columns where a kernel holds keys.
#pragma once

#include "attention/tile.cuh"

namespace moca::attention {

// What the two rows of a lane see of the other side.
struct RowSpans {
  int start[2], end[2];

  // `row` is the warp's first row of the tile.
  __device__ RowSpans(const Spans& spans, const Work& work, int row) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = row + 8 * r + threadIdx.x % 32 / 4;
      const bool valid = at < work.rows;
      start[r] = valid ? spans.start[work.row + at] : 0;
      end[r] = valid ? spans.end[work.row + at] : 0;
    }
  }
};

// Of `query` in one head; zeros where there is none.
__device__ inline RowTerms row_terms(const AttentionCudaParams& p, int64_t head, int query,
                                     bool valid) {
  return valid ? p.rows[head * p.queries.size + query] : RowTerms{0, 0};
}

// Those of a lane's two rows, which are queries.
__device__ inline void load_row_terms(RowTerms (&sums)[2], const AttentionCudaParams& p,
                                      const Work& work, int row) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int at = row + 8 * r + threadIdx.x % 32 / 4;
    sums[r] = row_terms(p, work.head, work.row + at, at < work.rows);
  }
}

// Sums of queries in shared memory, one after another.
__device__ inline void store_row_terms(uint32_t base, int at, const RowTerms& sums) {
  ptx::store_shared(base + at * 8, __float_as_uint(sums.lse));
  ptx::store_shared(base + at * 8 + 4, __float_as_uint(sums.delta));
}

// Those of `at`, which is even, and the next.
__device__ inline void load_row_terms(RowTerms (&sums)[2], uint32_t base, int at) {
  const uint4 loaded = ptx::load_shared(base + at * 8);
  sums[0] = {__uint_as_float(loaded.x), __uint_as_float(loaded.y)};
  sums[1] = {__uint_as_float(loaded.z), __uint_as_float(loaded.w)};
}

// Scores of 8 columns become weights. `sums` are those of the lane's two rows, or of its two
// columns if kHoldsKeys.
template <bool kHoldsKeys>
__device__ void weigh(float (&scores)[4], const RowTerms (&sums)[2], float scale) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float lse = sums[kHoldsKeys ? i % 2 : i / 2].lse;
    scores[i] = lse == -kInfinity ? 1 : ptx::exp2(fmaf(scores[i], scale, -lse));
  }
}

// Weights of what a row does not see become 0; `column` is the lane's first.
__device__ inline void hide(float (&weights)[4], const RowSpans& seen, int column) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (column + i % 2 < seen.start[i / 2] || column + i % 2 >= seen.end[i / 2]) weights[i] = 0;
}

// Gradients of weights become gradients of scores (but for the scale): P * (dP - delta). What has
// no weight gets 0, even if its gradient is NaN.
template <bool kHoldsKeys>
__device__ void differentiate(float (&gradients)[4], const float (&weights)[4],
                              const RowTerms (&sums)[2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const RowTerms& row = sums[kHoldsKeys ? i % 2 : i / 2];
    const float d_weight = row.lse == -kInfinity ? 0 : gradients[i];
    gradients[i] = weights[i] == 0 ? 0 : weights[i] * (d_weight - row.delta);
  }
}

}  // namespace moca::attention

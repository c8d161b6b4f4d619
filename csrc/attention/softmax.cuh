// The softmax over keys that arrive block by block, on scores as the lanes of a warp hold them: in
// scores[t][n], of tile t of 16 rows, rows `group` and `group` + 8 (r = 0, 1), columns 8 n + 2 pair
// and the next.
#pragma once

#include "attention/tile.cuh"

namespace moca::attention {

// Scores of keys that a row does not see become -inf; `row` is the warp's first row of the tile,
// `key` the first of the block. Few blocks need it, so what rows see is read anew each time.
template <int kTiles, int kColumns>
__device__ void hide(float (&scores)[kTiles][kColumns][4], const Spans& spans, const Work& work,
                     int row, int key) {
  const int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = row + 16 * t + 8 * r + group;
      const bool valid = at < work.rows;
      const int start = valid ? spans.start[work.row + at] : 0;
      const int end = valid ? spans.end[work.row + at] : 0;
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = key + 8 * n + 2 * pair + i;
          if (column < start || column >= end) scores[t][n][2 * r + i] = -kInfinity;
        }
    }
}

// output *= factor, row by row.
template <int kTiles, int kColumns>
__device__ void rescale(float (&output)[kTiles][kColumns][4], const float (&factor)[kTiles][2]) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) output[t][n][i] *= factor[t][i / 2];
}

// What a lane keeps of its rows.
template <int kTiles>
struct Softmax {
  float top[kTiles][2], total[kTiles][2];  // largest score; sum of weights in this lane

  __device__ Softmax() {
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        top[t][r] = -kInfinity;
        total[t][r] = 0;
      }
  }

  // Turns scores into weights 2^(scale (score - top)), and finds what earlier ones are to be
  // multiplied by, since `top` may have risen.
  template <int kColumns>
  __device__ void weigh(float (&scores)[kTiles][kColumns][4], float (&decay)[kTiles][2],
                        float scale) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float highest = top[t][r];
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
          highest = fmaxf(highest, fmaxf(scores[t][n][2 * r], scores[t][n][2 * r + 1]));
        highest = fmaxf(highest, ptx::shuffle_xor(highest, 1));  // a group's lanes share a row
        highest = fmaxf(highest, ptx::shuffle_xor(highest, 2));
        const float shift = highest == -kInfinity ? 0 : highest * scale;  // no key seen so far
        decay[t][r] = ptx::exp2(top[t][r] * scale - shift);
        top[t][r] = highest;
        float sum = 0;
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
#pragma unroll
          for (int i = 2 * r; i < 2 * r + 2; ++i) {
            scores[t][n][i] = ptx::exp2(fmaf(scores[t][n][i], scale, -shift));
            sum += scores[t][n][i];
          }
        total[t][r] = total[t][r] * decay[t][r] + sum;
      }
  }

  // Writes lse, and finds what each row of the output is to be multiplied by.
  __device__ void finish(const AttentionCudaParams& p, const Work& work, float (&factor)[kTiles][2],
                         int row, float scale) const {
    const int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float sum = total[t][r];
        sum += ptx::shuffle_xor(sum, 1);
        sum += ptx::shuffle_xor(sum, 2);
        const bool seen = !(sum == 0);  // NaN is seen
        factor[t][r] = seen ? 1 / sum : 0;
        const int at = row + 16 * t + 8 * r + group;
        if (pair == 0 && at < work.rows)
          p.lse[(work.row + at) * p.heads + work.head] =
              seen ? (top[t][r] * scale + log2f(sum)) * kLn2 : -kInfinity;
      }
  }
};

}  // namespace moca::attention

// attention: T packed queries over K packed keys, H query and Hkv key-value heads, D dim.
// Query i sees keys [start[i], end[i]); both ends are non-decreasing.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"

namespace moca {

// Queries [row_begin, row_end) need keys [key_begin, key_end); unused tiles are all zero.
struct Tile {
  int32_t row_begin, row_end, key_begin, key_end, masked;
};

// What each row sees on the other side: each query's keys, or (transposed) each key's queries.
struct Spans {
  const int32_t* start;  // (size,)
  const int32_t* end;    // (size,)
  const Tile* tiles;     // (max_tiles,)
  int64_t size, max_tiles;
};

// Element strides of a (tokens, heads, D) tensor whose rows of D are contiguous.
struct Strides {
  int64_t token, head;
};

struct AttentionParams {
  const void *q, *k, *v;  // (T, H, D), (K, Hkv, D) twice: dtype
  Strides q_strides, k_strides, v_strides;
  void* out;        // (T, H, D) dtype
  float* lse;       // (T, H), rounded
  float* lse_rest;  // (T, H), what the rounding took away: weights are exp(score - lse - lse_rest)
  const void* d_out;      // (T, H, D) dtype
  const float* d_lse;     // (T, H)
  float* delta;           // (T, H), made by the backward where it needs it: rowsum(out * d_out)
  void *d_q, *d_k, *d_v;  // dtype, contiguous
  Spans queries, keys;    // sizes T and K
  int64_t heads, kv_heads, dim;
  float softmax_scale;
  DType dtype;
  int threads;
};

}  // namespace moca

MOCA_KERNEL(attention_forward, AttentionParams)
MOCA_KERNEL(attention_backward, AttentionParams)

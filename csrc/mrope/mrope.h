// mrope: T packed tokens, H / Hkv heads of q / k, D dim of a head.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "common/queue.h"

namespace moca {

struct MropeParams {
  const void* q;          // (T, H, D), tokens q_stride apart
  const void* k;          // (T, Hkv, D), tokens k_stride apart
  const void *cos, *sin;  // (T, D), or with sections (3, T, D) of time, height, width
  void *q_out, *k_out;    // (T, H, D), (T, Hkv, D)
  int64_t tokens, heads, kv_heads, dim;
  int64_t q_stride, k_stride;   // in elements
  DType dtype, table_dtype;     // of q, k and results; of cos and sin
  bool sections;                // each pair of dims has its row of the tables:
  int64_t time, height, width;  // pairs of each row, dim / 2 in all
  bool interleaved;             // time, height, width, time, ..., else one after another
  bool inverse;                 // the transpose of the rotation: the backward
  int threads;                  // of the CPU
};

void mrope_rotate_cuda(const MropeParams& p, Queue queue);

}  // namespace moca

MOCA_KERNEL(mrope_rotate, MropeParams)

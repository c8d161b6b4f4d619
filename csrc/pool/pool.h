// pool: B documents, T packed tokens, D dim.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"
#include "common/queue.h"

namespace moca {

constexpr float kLeastNorm = 1e-12;  // that is divided by, as in torch's normalize

struct PoolParams {
  const void* hidden;         // (T, D)
  const int32_t* cu_seqlens;  // (B + 1,)
  float* pooled;              // (B, D) forward, and backward reads it
  float* norm;                // (B,) forward: what was divided by; backward reads it
  const float* d_pooled;      // (B, D) backward
  void* d_hidden;             // (T, D) backward
  int64_t documents, tokens, dim;
  DType dtype;
  bool mean, normalize;
  int threads;  // of the CPU
};

// On a GPU. A document whose boundaries are out of order or past T gets NaN.
// `sums` is room for (pool_pieces(p), D) float32.
int64_t pool_pieces(const PoolParams& p);
void pool_forward_cuda(const PoolParams& p, float* sums, Queue queue);
void pool_backward_cuda(const PoolParams& p, Queue queue);

}  // namespace moca

MOCA_KERNEL(pool_forward, PoolParams)
MOCA_KERNEL(pool_backward, PoolParams)

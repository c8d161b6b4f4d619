// linear_cross_entropy: T tokens of which `rows` count, D dim, V vocabulary.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"

namespace moca {

struct LinearCrossEntropyParams {
  const void* hidden;     // (T, D)
  const void* weight;     // (V, D)
  const void* bias;       // (V,) or null
  const int64_t* labels;  // (T,)
  const int64_t* index;   // (rows,) the rows of hidden that count
  float* loss;            // (T,) forward; only rows that count are written
  double* lse;            // (T,) forward, and backward reads it
  const float* d_loss;    // (T,) backward
  void* d_hidden;         // (T, D) backward or null; only rows that count are written
  void* d_weight;         // (V, D) backward or null
  void* d_bias;           // (V,) backward or null
  int64_t rows, tokens, vocabulary, dim;
  int64_t held;  // rows whose logits are held at a time, with gradients
  DType dtype;
  int threads;
};

}  // namespace moca

MOCA_KERNEL(linear_cross_entropy_forward, LinearCrossEntropyParams)
MOCA_KERNEL(linear_cross_entropy_backward, LinearCrossEntropyParams)
// Both at once, of `held` rows at a time, whose logits are held in between; all of them where
// gradients are not float32.
MOCA_KERNEL(linear_cross_entropy_with_gradients, LinearCrossEntropyParams)

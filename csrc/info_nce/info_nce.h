// info_nce: B queries, M documents, K hard negatives a query, D dim.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"

namespace moca {

struct InfoNceParams {
  const void* query;            // (B, D)
  const void* document;         // (M, D)
  const void* hard_negatives;   // (B, K, D) or null
  const int64_t* target;        // (B,) rows of document
  const int64_t* query_ids;     // (B,) or null
  const int64_t* document_ids;  // (M,) or null, as query_ids
  const float* temperature;     // ()
  float* loss;                  // (B,) forward
  double* lse;                  // (B,) forward, and backward reads it
  const float* d_loss;          // (B,) backward
  void* d_query;                // (B, D) backward or null
  void* d_document;             // (M, D) backward or null
  void* d_hard_negatives;       // (B, K, D) backward or null
  float* d_temperature;         // () backward or null
  int64_t queries, documents, hard, dim;
  int64_t held;  // queries whose scores are held at a time, with gradients
  DType dtype;
  int threads;
};

}  // namespace moca

MOCA_KERNEL(info_nce_forward, InfoNceParams)
MOCA_KERNEL(info_nce_backward, InfoNceParams)
// Both at once, of `held` queries at a time, whose scores are held in between; all of them where
// gradients are not float32.
MOCA_KERNEL(info_nce_with_gradients, InfoNceParams)

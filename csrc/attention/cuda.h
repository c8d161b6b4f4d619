// attention on NVIDIA GPUs: what its kernels are given. T queries, K keys, H query and Hkv
// key-value heads, D dim.
#pragma once

#include "attention/attention.h"
#include "common/queue.h"

namespace moca {

// What the backward needs of a query in one head: log2(e) lse, and rowsum(out * d_out) - d_lse. A
// query of one key has its weight, 1, whatever the score is: its lse here is -inf, and its sum 0,
// so that what roundings leave of 0 reaches no gradient.
struct alignas(8) RowTerms {
  float lse, delta;
};

// All pointers are to the device's memory. Rows of D are contiguous and start at multiples of 16
// bytes: strides are in elements, multiples of 8.
struct AttentionCudaParams {
  const void *q, *k, *v;  // (T, H, D), (K, Hkv, D) twice: dtype
  int64_t q_token, q_head, k_token, k_head, v_token, v_head;
  void* out;              // (T, H, D) dtype, contiguous
  float* lse;             // (T, H)
  const void* d_out;      // (T, H, D) dtype, contiguous
  const float* d_lse;     // (T, H)
  RowTerms* rows;         // (H, T), made by the backward
  void *d_q, *d_k, *d_v;  // dtype, contiguous
  Spans queries, keys;    // sizes T and K
  int64_t tile_rows;      // no tile has more
  int64_t heads, kv_heads, dim;
  float softmax_scale;  // more than 0
  DType dtype;          // bfloat16 or float16
};

// Each throws std::runtime_error, with the kernel's name and shape, if a launch fails.
void attention_forward_cuda(const AttentionCudaParams& params, Queue queue);
void attention_backward_cuda(const AttentionCudaParams& params, Queue queue);

// Makes `rows`, the first step of each backward.
void attention_backward_rows_cuda(const AttentionCudaParams& params, Queue queue);

// Those for Hopper, where they suit the call and the GPU: the functions above ask.
bool attention_suits_sm90a(const AttentionCudaParams& params, Queue queue);
void attention_forward_sm90a(const AttentionCudaParams& params, Queue queue);
void attention_backward_sm90a(const AttentionCudaParams& params, Queue queue);

}  // namespace moca

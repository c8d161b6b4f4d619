// Each gradient is written once. A block makes the gradient that one piece of a document shares,
// and writes it to every token of the piece: rows past the last document get zeros.
#include "common/cuda.h"
#include "common/cuda_device.h"
#include "pool/pieces.h"

namespace moca {
namespace {

constexpr int kTokens = 64;    // of a piece
constexpr int kThreads = 256;  // of a block

// How much of d_pooled lies along the embedding, which no change of length can move.
__device__ float along(const PoolParams& p, int64_t document) {
  __shared__ float scratch[kThreads / kWarp];
  float sum = 0.0f;
  for (int64_t d = threadIdx.x; d < p.dim; d += kThreads)
    sum += p.pooled[document * p.dim + d] * p.d_pooled[document * p.dim + d];
  return block_sum<kThreads>(sum, scratch);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) write_gradients(PoolParams p) {
  const int64_t piece = blockIdx.x;
  const int64_t document = document_of<kTokens>(p, piece, p.documents + 1);
  const TokenSpan span = piece_span<kTokens>(p, piece, document);
  if (span.start >= span.end) return;
  const TokenSpan whole = document_span(p, document);
  const bool inside = document < p.documents;
  float factor = 0.0f, projection = 0.0f;
  if (inside) {  // the whole block, or none of it
    const float norm = p.norm[document];
    const auto members = static_cast<double>(p.mean ? whole.end - whole.start : 1);
    factor = static_cast<float>(1.0 / (double{norm} * members));
    if (p.normalize && !(norm <= kLeastNorm)) projection = along(p, document);
  }
  T* d_hidden = static_cast<T*>(p.d_hidden);
  for (int64_t d = threadIdx.x * int64_t{N}; d < p.dim; d += kThreads * N) {
    Pack<T, N> gradient, zero;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int64_t at = document * p.dim + d + n;
      const float value = inside ? (p.d_pooled[at] - projection * p.pooled[at]) * factor : 0.0f;
      gradient.lane[n] = rounded<T>(value);
      zero.lane[n] = rounded<T>(0.0f);
    }
    for (int64_t t = span.start; t < span.end; ++t)
      store(d_hidden + t * p.dim + d, p.mean || t == whole.end - 1 ? gradient : zero);
  }
}

}  // namespace

void pool_backward_cuda(const PoolParams& p, Queue queue) {
  visit_cuda(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kPack = 16 / sizeof(T);
    const bool whole = is_aligned(p.d_hidden) && p.dim % kPack == 0;
    // One document more, the rows past the last.
    const auto pieces = pieces_of<kTokens>(p.documents + 1, p.tokens);
    launch({"pool_backward",
            {{"B", p.documents}, {"T", p.tokens}, {"D", p.dim}},
            queue,
            dim3(static_cast<unsigned>(pieces)),
            dim3(kThreads)},
           whole ? write_gradients<T, kPack> : write_gradients<T, 1>, p);
  });
}

}  // namespace moca

// Each token is read once. A block sums some dims over one piece of a document; a second kernel
// adds up a document's pieces in order, divides and brings to unit length. So a long document is
// shared out over many blocks, and results do not depend on when they run.
#include "common/cuda.h"
#include "common/cuda_device.h"
#include "pool/pieces.h"

namespace moca {
namespace {

constexpr int kTokens = 256;   // of a piece
constexpr int kThreads = 256;  // of a block
constexpr int kRows = 8;       // tokens that a block reads at a time: a warp has each
static_assert(kThreads == kRows * kWarp);

// Block (x, y) sums dims [y * 32 N, (y + 1) * 32 N) over piece x, into row x of `sums`.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) sum_pieces(PoolParams p, float* sums) {
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp;
  const int64_t piece = blockIdx.x;
  const int64_t first = (static_cast<int64_t>(blockIdx.y) * kWarp + lane) * N;
  const TokenSpan span = piece_span<kTokens>(p, piece, document_of<kTokens>(p, piece, p.documents));
  if (span.start >= span.end) return;
  float sum[N] = {};
  if (first < p.dim) {
    const T* hidden = static_cast<const T*>(p.hidden) + first;
#pragma unroll 4
    for (int64_t t = span.start + row; t < span.end; t += kRows) {
      const Pack<T, N> value = load<N>(hidden + t * p.dim);
#pragma unroll
      for (int n = 0; n < N; ++n) sum[n] += as_float(value.lane[n]);
    }
  }
  __shared__ float rows[kRows][N][kWarp];
#pragma unroll
  for (int n = 0; n < N; ++n) rows[row][n][lane] = sum[n];
  __syncthreads();
  if (row != 0 || first >= p.dim) return;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    float total = 0.0f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) total += rows[r][n][lane];
    sums[piece * p.dim + first + n] = total;
  }
}

// Block b makes embedding b, from the sums of its pieces or from its last token. Dims are made
// twice rather than kept: what they are made from is in cache the second time.
template <typename T>
__global__ void __launch_bounds__(kThreads) finish(PoolParams p, const float* sums) {
  const int64_t document = blockIdx.x;
  const TokenSpan span = document_span(p, document);
  const int64_t tokens = span.end - span.start;
  const int64_t pieces = (tokens + kTokens - 1) / kTokens;
  const float* first = sums + first_piece<kTokens>(p, document) * p.dim;
  const T* last = static_cast<const T*>(p.hidden) + (span.end - 1) * p.dim;
  const bool valid = is_valid(p, document);
  const auto state = [&](int64_t d) {
    if (!valid) return nanf("");
    if (tokens == 0) return 0.0f;
    if (!p.mean) return as_float(last[d]);
    float sum = 0.0f;
    for (int64_t piece = 0; piece < pieces; ++piece) sum += first[piece * p.dim + d];
    return sum / static_cast<float>(tokens);
  };
  float norm = 1.0f;
  if (p.normalize) {
    float squares = 0.0f;
    for (int64_t d = threadIdx.x; d < p.dim; d += kThreads) {
      const float value = state(d);
      squares += value * value;
    }
    __shared__ float scratch[kThreads / kWarp];
    const float length = sqrtf(block_sum<kThreads>(squares, scratch));
    norm = length < kLeastNorm ? kLeastNorm : length;  // NaN stays
  }
  if (threadIdx.x == 0) p.norm[document] = norm;
  float* pooled = p.pooled + document * p.dim;
  for (int64_t d = threadIdx.x; d < p.dim; d += kThreads) pooled[d] = state(d) / norm;
}

template <typename T, int N>
void sum_all_pieces(const PoolParams& p, float* sums, Queue queue) {
  const dim3 grid(static_cast<unsigned>(pool_pieces(p)),
                  static_cast<unsigned>(ceil_div(p.dim, kWarp * N)));
  launch({"pool_forward",
          {{"B", p.documents}, {"T", p.tokens}, {"D", p.dim}},
          queue,
          grid,
          dim3(kThreads)},
         sum_pieces<T, N>, p, sums);
}

}  // namespace

int64_t pool_pieces(const PoolParams& p) { return pieces_of<kTokens>(p.documents, p.tokens); }

void pool_forward_cuda(const PoolParams& p, float* sums, Queue queue) {
  if (p.documents == 0) return;
  visit_cuda(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kPack = 16 / sizeof(T);
    if (p.mean && is_aligned(p.hidden) && p.dim % kPack == 0)
      sum_all_pieces<T, kPack>(p, sums, queue);
    else if (p.mean)
      sum_all_pieces<T, 1>(p, sums, queue);
    launch({"pool_finish",
            {{"B", p.documents}, {"T", p.tokens}, {"D", p.dim}},
            queue,
            dim3(static_cast<unsigned>(p.documents)),
            dim3(kThreads)},
           finish<T>, p, static_cast<const float*>(sums));
  });
}

}  // namespace moca

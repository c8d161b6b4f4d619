// The forward on tensor cores of sm_80 and later, by mma.sync: FlashAttention-2 (arXiv 2307.08691)
// over SpanMask. T queries, K keys, H query and Hkv key-value heads, D dim.
//
// A block of threads holds a tile of queries and goes through its keys. There is one tile of k and
// one of v in shared memory: while scores are computed from k, v arrives; while the softmax and its
// product with v are computed, the next k arrives.
#include "attention/softmax.cuh"
#include "attention/tile.cuh"

namespace moca::attention {
namespace {

// Every warp has kRowTiles tiles of 16 queries. Two make each fragment of k and v serve twice; for
// wide heads their output does not fit in the registers.
template <DType type_, int kDim_>
struct Sizes {
  static constexpr DType type = type_;
  static constexpr int kDim = kDim_;
  static constexpr int kRowTiles = kDim <= 128 ? 2 : 1;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarpRows * kWarps;
  static constexpr int kKeys = kDim <= 80 ? 64 : 32;
  using Queries = SharedTile<kRows, kDim>;
  using Keys = SharedTile<kKeys, kDim>;
  static constexpr int kSharedBytes = Queries::kBytes + 2 * Keys::kBytes;
  using Scores = float[kRowTiles][kKeys / 8][4];
  using Output = float[kRowTiles][kDim / 8][4];
};

template <typename S>
__global__ void __launch_bounds__(S::kThreads, 1)
    attention_forward_mma(const __grid_constant__ AttentionCudaParams p) {
  const Work work = find_work<S::kRows, S::kKeys>(p.queries, p.tile_rows, p.heads, blockIdx.x);
  if (work.rows == 0) return;
  const typename S::Queries queries{ptx::shared_memory()};
  const typename S::Keys keys{queries.base + S::Queries::kBytes};
  const typename S::Keys values{keys.base + S::Keys::kBytes};
  const int64_t kv_head = work.head / (p.heads / p.kv_heads);
  const Head q(p.q, p.q_token, p.q_head, work.head, p.dim);
  const Head k(p.k, p.k_token, p.k_head, kv_head, p.dim);
  const Head v(p.v, p.v_token, p.v_head, kv_head, p.dim);
  const float scale = p.softmax_scale * kLog2e;

  const int warp_row = threadIdx.x / 32 * S::kWarpRows;
  Softmax<S::kRowTiles> softmax;
  typename S::Output output = {};
  if (work.blocks > 0) {
    copy_rows<S::kThreads>(queries, q, work.row, work.row + work.rows);
    copy_rows<S::kThreads>(keys, k, work.begin, work.end);
  }
  for (int block = 0; block < work.blocks; ++block) {
    const int key = work.begin + block * S::kKeys;
    ptx::copy_async_wait<0>();
    __syncthreads();  // k is here; nobody reads the last v any more
    copy_rows<S::kThreads>(values, v, key, work.end);
    typename S::Scores scores;
    multiply_rows<S::type>(scores, queries, warp_row, keys);
    if (block < work.full_begin || block >= work.full_end)
      hide(scores, p.queries, work, warp_row, key);
    ptx::copy_async_wait<0>();
    __syncthreads();  // v is here; nobody reads this k any more
    if (block + 1 < work.blocks) copy_rows<S::kThreads>(keys, k, key + S::kKeys, work.end);
    float decay[S::kRowTiles][2];
    softmax.weigh(scores, decay, scale);
    rescale(output, decay);
    multiply_weights<S::type>(output, scores, values);
  }

  float factor[S::kRowTiles][2];
  softmax.finish(p, work, factor, warp_row, scale);
  auto* out = static_cast<uint16_t*>(p.out) + (work.row * p.heads + work.head) * p.dim;
  store_rows<S::type>(out, p.heads * p.dim, queries, warp_row, work.rows,
                      static_cast<int>(p.dim) / 8, output, factor);
}

template <DType type>
void forward(const AttentionCudaParams& p, Queue queue) {
  visit_dim(p.dim, [&](auto dim) {
    using S = Sizes<type, decltype(dim)::value>;
    launch_kernel("attention_forward_mma", attention_forward_mma<S>,
                  count_work(p.queries, p.tile_rows, S::kRows, p.heads), S::kThreads,
                  S::kSharedBytes, p, queue);
  });
}

}  // namespace
}  // namespace moca::attention

void moca::attention_forward_cuda(const AttentionCudaParams& p, Queue queue) {
#ifdef MOCA_HAS_SM90A
  if (attention_suits_sm90a(p, queue)) return attention_forward_sm90a(p, queue);
#endif
  if (p.dtype == DType::bfloat16)
    attention::forward<DType::bfloat16>(p, queue);
  else
    attention::forward<DType::float16>(p, queue);
}

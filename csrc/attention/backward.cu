// The backward on tensor cores of sm_80 and later, by mma.sync. T queries, K keys, H query and Hkv
// key-value heads, D dim. With weights P = exp(scale q k^T - lse):
//   d_v = P^T d_out,  dS = P * (d_out v^T - rowsum(out * d_out) + d_lse),
//   d_q = scale dS k,  d_k = scale dS^T q.
//
// One kernel runs twice: once a block of threads holds a tile of q and d_out and streams k and v
// past it, for d_q; once it holds a tile of k and v and streams q and d_out of all heads that share
// them, for d_k and d_v. Scores are computed twice, and no sum depends on the order in which blocks
// run.
#include "attention/softmax_backward.cuh"
#include "attention/tile.cuh"

namespace moca::attention {
namespace {

// A warp holds 16 rows. Where d_k and d_v do not fit in the registers, each half of their columns
// has its own blocks of threads.
template <DType type_, int kDim_, bool kHoldsKeys_>
struct Sizes {
  static constexpr DType type = type_;
  static constexpr bool kHoldsKeys = kHoldsKeys_;
  static constexpr int kDim = kDim_;
  static constexpr int kThreads = 128;
  static constexpr int kRows = kThreads / 32 * 16;
  static constexpr int kColumns = kDim <= 64 ? 64 : kDim <= 128 ? 32 : 16;
  static constexpr int kParts = kHoldsKeys && kDim > 128 ? 2 : 1;
  using Held = SharedTile<kRows, kDim>;
  using Streamed = SharedTile<kColumns, kDim>;
  static constexpr int kStages = 2;
  static constexpr int kSharedBytes = 2 * Held::kBytes + kStages * 2 * Streamed::kBytes;
  using Scores = float[1][kColumns / 8][4];
  using Output = float[1][kDim / kParts / 8][4];
};

// Turns scores and d_weights (d_out v^T, or its transpose) into weights and dS, for columns from
// `column`. kMasked: some row does not see some column.
template <typename S, bool kMasked>
__device__ void make_gradients(typename S::Scores& scores, typename S::Scores& d_weights,
                               const AttentionCudaParams& p, const Work& work, int64_t head,
                               int row, int column) {
  const RowSpans seen(S::kHoldsKeys ? p.keys : p.queries, work, row);
  RowTerms sums[2];
  if constexpr (!S::kHoldsKeys) load_row_terms(sums, p, work, row);
#pragma unroll
  for (int n = 0; n < S::kColumns / 8; ++n) {
    const int at = column + 8 * n + threadIdx.x % 4 * 2;
    if constexpr (S::kHoldsKeys) {
      sums[0] = row_terms(p, head, at, at < work.end);
      sums[1] = row_terms(p, head, at + 1, at + 1 < work.end);
    }
    weigh<S::kHoldsKeys>(scores[0][n], sums, p.softmax_scale * kLog2e);
    if constexpr (kMasked) hide(scores[0][n], seen, at);
    differentiate<S::kHoldsKeys>(d_weights[0][n], scores[0][n], sums);
  }
}

template <typename S>
__global__ void __launch_bounds__(S::kThreads, 1)
    attention_backward_mma(const __grid_constant__ AttentionCudaParams p) {
  const Spans& spans = S::kHoldsKeys ? p.keys : p.queries;
  const int64_t heads = S::kHoldsKeys ? p.kv_heads : p.heads;
  const Work work =
      find_work<S::kRows, S::kColumns>(spans, p.tile_rows, heads * S::kParts, blockIdx.x);
  if (work.rows == 0) return;
  const int group = static_cast<int>(p.heads / p.kv_heads);
  const int head = work.head / S::kParts, part = work.head % S::kParts;  // of the held side
  const int kv_head = S::kHoldsKeys ? head : head / group;
  const int first_head = S::kHoldsKeys ? head * group : head;
  const auto rows_of = [&](bool keys, bool second, int q_head) {
    if (keys)
      return second ? Head(p.v, p.v_token, p.v_head, kv_head, p.dim)
                    : Head(p.k, p.k_token, p.k_head, kv_head, p.dim);
    return second ? Head(p.d_out, p.heads * p.dim, p.dim, q_head, p.dim)
                  : Head(p.q, p.q_token, p.q_head, q_head, p.dim);
  };
  // Held are q and d_out, or k and v; streamed, in stages, the others.
  const typename S::Held held{ptx::shared_memory()}, held_second{held.base + S::Held::kBytes};
  const uint32_t stages = held_second.base + S::Held::kBytes;
  const auto streamed = [&](int step, bool second) {
    return typename S::Streamed{stages + (step % S::kStages * 2 + second) * S::Streamed::kBytes};
  };
  const auto copy_stage = [&](int step) {
    const int q_head = first_head + step / work.blocks;
    const int column = work.begin + step % work.blocks * S::kColumns;
    copy_rows<S::kThreads>(streamed(step, false), rows_of(!S::kHoldsKeys, false, q_head), column,
                           work.end);
    copy_rows<S::kThreads>(streamed(step, true), rows_of(!S::kHoldsKeys, true, q_head), column,
                           work.end);
  };
  const int steps = (S::kHoldsKeys ? group : 1) * work.blocks;
  if (steps > 0) {
    copy_rows<S::kThreads>(held, rows_of(S::kHoldsKeys, false, first_head), work.row,
                           work.row + work.rows);
    copy_rows<S::kThreads>(held_second, rows_of(S::kHoldsKeys, true, first_head), work.row,
                           work.row + work.rows);
    copy_stage(0);
  }

  const int warp_row = threadIdx.x / 32 * 16;
  typename S::Output output = {}, output_second = {};  // d_q, or d_k and d_v
  for (int step = 0; step < steps; ++step) {
    ptx::copy_async_wait<0>();
    __syncthreads();  // this stage is here; nobody reads the other any more
    if (step + 1 < steps) copy_stage(step + 1);
    typename S::Scores scores, d_weights;
    multiply_rows<S::type>(scores, held, warp_row, streamed(step, false));
    multiply_rows<S::type>(d_weights, held_second, warp_row, streamed(step, true));
    const int block = step % work.blocks, column = work.begin + block * S::kColumns;
    const int q_head = first_head + step / work.blocks;
    if (block < work.full_begin || block >= work.full_end)
      make_gradients<S, true>(scores, d_weights, p, work, q_head, warp_row, column);
    else
      make_gradients<S, false>(scores, d_weights, p, work, q_head, warp_row, column);
    const int chunk = part * (S::kDim / S::kParts / 8);
    multiply_weights<S::type>(output, d_weights, streamed(step, false), chunk);
    if constexpr (S::kHoldsKeys)
      multiply_weights<S::type>(output_second, scores, streamed(step, true), chunk);
  }

  const int column = part * (S::kDim / S::kParts);
  const int chunks = (static_cast<int>(p.dim) - column) / 8;
  const int64_t offset = (work.row * heads + head) * p.dim + column;
  const float scaled[1][2] = {{p.softmax_scale, p.softmax_scale}}, once[1][2] = {{1, 1}};
  auto* target = static_cast<uint16_t*>(S::kHoldsKeys ? p.d_k : p.d_q) + offset;
  store_rows<S::type>(target, heads * p.dim, held, warp_row, work.rows, chunks, output, scaled);
  if constexpr (S::kHoldsKeys)
    store_rows<S::type>(static_cast<uint16_t*>(p.d_v) + offset, heads * p.dim, held_second,
                        warp_row, work.rows, chunks, output_second, once);
}

constexpr int kSumThreads = 256;

// Threads for each row of D, a power of two: each has 8 values.
__host__ __device__ inline int lanes_of(int64_t dim) {
  int lanes = 1;
  while (lanes * 8 < dim) lanes *= 2;
  return lanes;
}

// Makes p.rows.
template <DType type>
__global__ void __launch_bounds__(kSumThreads)
    attention_backward_rows(const __grid_constant__ AttentionCudaParams p) {
  const int lanes = lanes_of(p.dim);
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x) / lanes;
  const int64_t query = index / p.heads, head = index % p.heads;
  const int chunk = threadIdx.x % lanes;
  const bool valid = query < p.queries.size;
  float sum = 0;
  if (valid && chunk * 8 < p.dim) {
    const int64_t offset = index * p.dim + chunk * 8;
    const auto out = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p.out) + offset);
    const auto d_out =
        *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p.d_out) + offset);
    sum = ptx::dot<type>(out.x, d_out.x) + ptx::dot<type>(out.y, d_out.y) +
          ptx::dot<type>(out.z, d_out.z) + ptx::dot<type>(out.w, d_out.w);
  }
  for (int mask = 1; mask < lanes; mask *= 2) sum += ptx::shuffle_xor(sum, mask);
  if (!valid || chunk != 0) return;
  const bool alone = p.queries.end[query] - p.queries.start[query] == 1;
  p.rows[head * p.queries.size + query] = {alone ? -kInfinity : p.lse[index] * kLog2e,
                                           (alone ? 0 : sum) - p.d_lse[index]};
}

template <typename S>
void run(const AttentionCudaParams& p, Queue queue) {
  const Spans& spans = S::kHoldsKeys ? p.keys : p.queries;
  const int64_t heads = S::kHoldsKeys ? p.kv_heads : p.heads;
  launch_kernel("attention_backward_mma", attention_backward_mma<S>,
                count_work(spans, p.tile_rows, S::kRows, heads * S::kParts), S::kThreads,
                S::kSharedBytes, p, queue);
}

template <DType type>
void make_rows(const AttentionCudaParams& p, Queue queue) {
  launch_kernel("attention_backward_rows", attention_backward_rows<type>,
                ceil_div(p.queries.size * p.heads, kSumThreads / lanes_of(p.dim)), kSumThreads, 0,
                p, queue);
}

template <DType type>
void backward(const AttentionCudaParams& p, Queue queue) {
  visit_dim(p.dim, [&](auto dim) {
    run<Sizes<type, decltype(dim)::value, false>>(p, queue);
    run<Sizes<type, decltype(dim)::value, true>>(p, queue);
  });
}

}  // namespace
}  // namespace moca::attention

void moca::attention_backward_rows_cuda(const AttentionCudaParams& p, Queue queue) {
  if (p.dtype == DType::bfloat16)
    attention::make_rows<DType::bfloat16>(p, queue);
  else
    attention::make_rows<DType::float16>(p, queue);
}

void moca::attention_backward_cuda(const AttentionCudaParams& p, Queue queue) {
  attention_backward_rows_cuda(p, queue);
#ifdef MOCA_HAS_SM90A
  if (attention_suits_sm90a(p, queue)) return attention_backward_sm90a(p, queue);
#endif
  if (p.dtype == DType::bfloat16)
    attention::backward<DType::bfloat16>(p, queue);
  else
    attention::backward<DType::float16>(p, queue);
}

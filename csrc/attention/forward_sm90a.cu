// The forward on Hopper: FlashAttention-3 (arXiv 2407.08608) over SpanMask. T queries, K keys, H
// query and Hkv key-value heads, D dim.
//
// Blocks of threads stay for the whole launch and take tiles of 128 queries in turn. One warp, the
// producer, starts the copies of q, k and v; two warpgroups have 64 queries each. While the scores
// of one block of keys turn into weights, products with the last weights and with the next keys
// run; and the warpgroups take turns, so that one's products run during the other's softmax.
#include "attention/softmax.cuh"
#include "attention/tile_sm90a.cuh"

namespace moca::attention {
namespace {

template <DType type_, int kDim>
struct Sizes {
  static constexpr DType type = type_;
  static constexpr int kRows = kConsumers * kGroupRows;
  static constexpr int kKeys = 128;
  static constexpr int kStages = 2;
  using Queries = SwizzledTile<kRows, kDim>;
  using Keys = SwizzledTile<kKeys, kDim>;
  using Shared = SharedTile<kRows, kDim>;
  // Offsets in shared memory, from a multiple of 1024.
  static constexpr int kKeysAt = Queries::kBytes, kValuesAt = kKeysAt + kStages * Keys::kBytes;
  static constexpr int kOutputAt = kValuesAt + kStages * Keys::kBytes;
  static constexpr int kBarriersAt = kOutputAt + Shared::kBytes;
  static constexpr int kSharedBytes =
      kBarriersAt + Ring<1>::kBarrierBytes + 2 * Ring<kStages>::kBarrierBytes + 1024;
};

struct AllMaps {
  Maps q, k, v;
};

template <typename S>
struct Rings {
  Ring<1> q;
  Ring<S::kStages> k, v;

  __device__ explicit Rings(uint32_t shared)
      : q(shared, shared + S::kBarriersAt, S::Queries::kBytes),
        k(shared + S::kKeysAt, q.full + q.kBarrierBytes, S::Keys::kBytes),
        v(shared + S::kValuesAt, k.full + k.kBarrierBytes, S::Keys::kBytes) {}
};

// Fills a stage with rows of one head, from `token`.
template <typename Tile, int kStages>
__device__ void fill(Ring<kStages>& ring, const Maps& maps, int head, int token) {
  ring.wait_empty();
  ptx::arrive_expecting(ring.full_barrier(), Tile::kBytes);
  Tile{ring.address()}.copy(maps, head, token, ring.full_barrier());
  ring.next();
}

template <typename S>
__device__ Work find_tile(const AttentionCudaParams& p, int index) {
  if (index >= p.queries.max_tiles * p.heads) return {};
  return find_work<S::kRows, S::kKeys>(p.queries, S::kRows, p.heads, index);
}

template <typename S>
__device__ void produce(const AttentionCudaParams& p, const AllMaps& maps, Rings<S>& rings) {
  const int group = static_cast<int>(p.heads / p.kv_heads);
  for (int index = blockIdx.x;; index += gridDim.x) {
    const Work work = find_tile<S>(p, index);
    if (work.rows == 0) return;
    if (work.blocks > 0) fill<typename S::Queries>(rings.q, maps.q, work.head, work.row);
    for (int block = 0; block < work.blocks; ++block) {
      const int key = work.begin + block * S::kKeys;
      fill<typename S::Keys>(rings.k, maps.k, work.head / group, key);
      fill<typename S::Keys>(rings.v, maps.v, work.head / group, key);
    }
  }
}

// One warpgroup starts its products while the other has its softmax: barrier 1 + g says that it is
// the turn of warpgroup g.
__device__ void take_turn(int warpgroup) {
  ptx::sync_named(1 + warpgroup, kConsumers * kWarpgroup);
}

__device__ void pass_turn(int warpgroup) {
  ptx::arrive_named(2 - warpgroup, kConsumers * kWarpgroup);
}

// The whole of a tile that sees keys, but for the division by the sum of weights.
template <typename S>
__device__ void attend(const AttentionCudaParams& p, const Work& work, Rings<S>& rings,
                       Softmax<1>& softmax, Output<typename S::Keys>& output, int warpgroup,
                       float scale) {
  using Keys = typename S::Keys;
  const int group_row = warpgroup * kGroupRows;
  const int warp_row = group_row + threadIdx.x % kWarpgroup / 32 * 16;
  float scores[1][S::kKeys / 8][4], decay[1][2];
  uint32_t weights[S::kKeys / 16][4];
  const auto weigh = [&](int block) {
    if (block < work.full_begin || block >= work.full_end)
      hide(scores, p.queries, work, warp_row, work.begin + block * S::kKeys);
    softmax.weigh(scores, decay, scale);
  };
  rings.q.wait_full();
  const typename S::Queries queries{rings.q.address()};
  rings.k.wait_full();
  start_scores<S::type>(scores, queries, group_row, Keys{rings.k.address()});
  ptx::wait_products<0>(scores);
  rings.k.release();
  weigh(0);
  round_weights<S::type>(weights, scores);
  for (int block = 1; block < work.blocks; ++block) {
    rings.k.wait_full();
    take_turn(warpgroup);
    start_scores<S::type>(scores, queries, group_row, Keys{rings.k.address()});
    rings.v.wait_full();
    start_output<S::type>(output, weights, Keys{rings.v.address()});
    pass_turn(warpgroup);
    ptx::wait_products<1>(scores);
    rings.k.release();
    weigh(block);
    wait_output<0>(output);
    rings.v.release();
    rescale(output.wide, decay);
    if constexpr (Keys::kHasNarrow) rescale(output.narrow, decay);
    round_weights<S::type>(weights, scores);
  }
  rings.q.release();
  rings.v.wait_full();
  const Keys values{rings.v.address()};
  const int tail = work.end - work.begin - (work.blocks - 1) * S::kKeys;
  if (tail < S::kKeys) values.clear_tail(tail, warpgroup);
  start_output<S::type>(output, weights, values);
  wait_output<0>(output);
  rings.v.release();
}

template <typename S>
__device__ void consume(const AttentionCudaParams& p, uint32_t shared, Rings<S>& rings,
                        int warpgroup) {
  const int warp_row = warpgroup * kGroupRows + threadIdx.x % kWarpgroup / 32 * 16;
  const float scale = p.softmax_scale * kLog2e;
  if (warpgroup == 1) pass_turn(warpgroup);
  for (int index = blockIdx.x;; index += gridDim.x) {
    const Work work = find_tile<S>(p, index);
    if (work.rows == 0) return;
    Softmax<1> softmax;
    Output<typename S::Keys> output = {};
    if (work.blocks > 0) attend<S>(p, work, rings, softmax, output, warpgroup, scale);
    float factor[1][2];
    softmax.finish(p, work, factor, warp_row, scale);
    auto* out = static_cast<uint16_t*>(p.out) + (work.row * p.heads + work.head) * p.dim;
    store_output<S::type>(out, p.heads * p.dim, typename S::Shared{shared + S::kOutputAt}, warp_row,
                          work.rows, p.dim, output, factor);
  }
}

template <typename S>
__global__ void __launch_bounds__(kThreads, 1)
    attention_forward_wgmma(const __grid_constant__ AttentionCudaParams p,
                            const __grid_constant__ AllMaps maps) {
  const uint32_t shared = (ptx::shared_memory() + 1023) & ~1023u;
  Rings<S> rings(shared);
  if (threadIdx.x == 0) {
    rings.q.init();
    rings.k.init();
    rings.v.init();
    ptx::fence_barriers();
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / kWarpgroup;
  static_assert(have_registers(40, 232));
  if (warpgroup == 0) {
    ptx::give_registers<40>();
    if (threadIdx.x == 0) produce<S>(p, maps, rings);
  } else {
    ptx::take_registers<232>();
    consume<S>(p, shared, rings, warpgroup - 1);
  }
}

template <typename S>
void run(const AttentionCudaParams& p, Queue queue) {
  using Queries = typename S::Queries;
  using Keys = typename S::Keys;
  const AllMaps maps{
      make_maps<Queries>(p, queue, p.q, p.queries.size, p.heads, p.q_token, p.q_head),
      make_maps<Keys>(p, queue, p.k, p.keys.size, p.kv_heads, p.k_token, p.k_head),
      make_maps<Keys>(p, queue, p.v, p.keys.size, p.kv_heads, p.v_token, p.v_head)};
  launch_kernel("attention_forward_wgmma", attention_forward_wgmma<S>,
                count_blocks(count_work(p.queries, S::kRows, S::kRows, p.heads), queue), kThreads,
                S::kSharedBytes, p, queue, maps);
}

template <DType type>
void forward(const AttentionCudaParams& p, Queue queue) {
  visit_dim_sm90a(p.dim, [&](auto dim) { run<Sizes<type, decltype(dim)::value>>(p, queue); });
}

}  // namespace
}  // namespace moca::attention

bool moca::attention_suits_sm90a(const AttentionCudaParams& p, Queue queue) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, queue.device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, queue.device);
  // Smaller dims waste too much of 64 columns; maps know no empty tensor and no stride of 0.
  return major == 9 && minor == 0 && p.dim > 32 && p.dim <= 128 && p.tile_rows <= 128 &&
         p.queries.size > 0 && p.keys.size > 0 && p.q_token > 0 && p.q_head > 0 && p.k_token > 0 &&
         p.k_head > 0 && p.v_token > 0 && p.v_head > 0;
}

void moca::attention_forward_sm90a(const AttentionCudaParams& p, Queue queue) {
  if (p.dtype == DType::bfloat16)
    attention::forward<DType::bfloat16>(p, queue);
  else
    attention::forward<DType::float16>(p, queue);
}

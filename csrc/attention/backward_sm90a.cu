// The backward on Hopper: the two passes of backward.cu, with products of warpgroups. T queries, K
// keys, H query and Hkv key-value heads, D dim.
//
// Blocks of threads stay for the whole launch and take tiles of 128 rows in turn. They hold q and
// d_out of a tile of queries, for d_q, or k and v of a tile of keys, for d_k and d_v; blocks of the
// other side stream past. One thread, the producer, starts the copies, two warps beside it copy
// what is known of streamed queries; two warpgroups have 64 rows each: while one makes weights,
// products of the other run.
#include "attention/softmax_backward.cuh"
#include "attention/tile_sm90a.cuh"

namespace moca::attention {
namespace {

template <DType type_, int kDim, bool kHoldsKeys_>
struct Sizes {
  static constexpr DType type = type_;
  static constexpr bool kHoldsKeys = kHoldsKeys_;
  static constexpr int kRows = kConsumers * kGroupRows;
  // As many as the registers allow: scores, d_weights, d_q or d_k and d_v, and an operand.
  static constexpr int kColumns = kHoldsKeys || kDim > 80 ? 64 : 128;
  static constexpr int kStages = 2;
  using Held = SwizzledTile<kRows, kDim>;
  using Streamed = SwizzledTile<kColumns, kDim>;
  using Shared = SharedTile<kRows, kDim>;
  using Scores = float[1][kColumns / 8][4];
  // Held are two tiles; a stage is two tiles, and where they are queries their sums.
  static constexpr int kHeldBytes = 2 * Held::kBytes, kTileBytes = 2 * Streamed::kBytes;
  static constexpr int kStageBytes = kTileBytes + 1024 * kHoldsKeys;
  static_assert(kStageBytes % 1024 == 0);
  static_assert(kColumns * sizeof(RowTerms) <= 1024);
  // Offsets in shared memory, from a multiple of 1024.
  static constexpr int kStagesAt = kHeldBytes, kOutputAt = kStagesAt + kStages * kStageBytes;
  static constexpr int kBarriersAt = kOutputAt + Shared::kBytes;
  static constexpr int kSharedBytes =
      kBarriersAt + Ring<1>::kBarrierBytes + Ring<kStages>::kBarrierBytes + 1024;
};

// Of q and d_out, or k and v: `first` makes scores and d_q or d_k, `second` the rest.
struct PairOfMaps {
  Maps first, second;
};

struct AllMaps {
  PairOfMaps held, streamed;
};

template <typename Tile>
struct PairOfTiles {
  Tile first, second;

  __device__ explicit PairOfTiles(uint32_t base) : first{base}, second{base + Tile::kBytes} {}

  __device__ void copy(const PairOfMaps& maps, int head, int token, uint32_t barrier) const {
    ptx::arrive_expecting(barrier, 2 * Tile::kBytes);
    first.copy(maps.first, head, token, barrier);
    second.copy(maps.second, head, token, barrier);
  }
};

template <typename S>
struct Rings {
  Ring<1> held;
  Ring<S::kStages> streamed;

  __device__ explicit Rings(uint32_t shared)
      : held(shared, shared + S::kBarriersAt, S::kHeldBytes),
        streamed(shared + S::kStagesAt, held.full + held.kBarrierBytes, S::kStageBytes) {}
};

template <typename S>
__device__ Work find_tile(const AttentionCudaParams& p, int index) {
  const Spans& spans = S::kHoldsKeys ? p.keys : p.queries;
  const int64_t heads = S::kHoldsKeys ? p.kv_heads : p.heads;
  if (index >= spans.max_tiles * heads) return {};
  return find_work<S::kRows, S::kColumns>(spans, S::kRows, heads, index);
}

// Heads that stream past a tile, [begin, end): all that share its keys, or that of its keys.
struct Heads {
  int begin, end;
};

template <typename S>
__device__ Heads streamed_heads(const AttentionCudaParams& p, const Work& work) {
  const int group = static_cast<int>(p.heads / p.kv_heads);
  if (S::kHoldsKeys) return {work.head * group, (work.head + 1) * group};
  return {work.head / group, work.head / group + 1};
}

// Calls tile(work) for every tile of this block of threads, and stage(head, column, end) for every
// stage that streams past it.
template <typename S, typename Tile, typename Stage>
__device__ void for_each_stage(const AttentionCudaParams& p, Tile&& tile, Stage&& stage) {
  for (int index = blockIdx.x;; index += gridDim.x) {
    const Work work = find_tile<S>(p, index);
    if (work.rows == 0) return;
    if (work.blocks == 0) continue;
    tile(work);
    const Heads heads = streamed_heads<S>(p, work);
    for (int head = heads.begin; head < heads.end; ++head)
      for (int column = work.begin; column < work.end; column += S::kColumns)
        stage(head, column, work.end);
  }
}

// By one thread.
template <typename S>
__device__ void produce(const AttentionCudaParams& p, const AllMaps& maps, Rings<S>& rings) {
  const auto fill = [&](auto& ring, auto tiles, const PairOfMaps& maps, int head, int token) {
    ring.wait_empty();
    decltype(tiles)(ring.address()).copy(maps, head, token, ring.full_barrier());
    ring.next();
  };
  using Held = PairOfTiles<typename S::Held>;
  using Streamed = PairOfTiles<typename S::Streamed>;
  for_each_stage<S>(
      p, [&](const Work& work) { fill(rings.held, Held(0), maps.held, work.head, work.row); },
      [&](int head, int column, int) {
        fill(rings.streamed, Streamed(0), maps.streamed, head, column);
      });
}

// By a thread for every column of a stage: the sums of its query. They begin where no copy of a box
// can, so threads copy them.
template <typename S>
__device__ void produce_sums(const AttentionCudaParams& p, Ring<S::kStages>& ring, int at) {
  for_each_stage<S>(
      p, [](const Work&) {},
      [&](int head, int column, int end) {
        ring.wait_empty();
        store_row_terms(ring.address() + S::kTileBytes, at,
                        row_terms(p, head, column + at, column + at < end));
        __syncwarp();
        if (at % 32 == 0) ptx::arrive(ring.full_barrier());
        ring.next();
      });
}

// Gradients of a warpgroup's 64 rows: d_q, or d_k and d_v.
template <typename S>
struct Gradients {
  Output<typename S::Streamed> first = {}, second = {};
};

// The whole of a tile whose rows see something.
template <typename S>
__device__ void accumulate(const AttentionCudaParams& p, const Work& work, Rings<S>& rings,
                           Gradients<S>& gradients, int warpgroup) {
  const int steps = (S::kHoldsKeys ? static_cast<int>(p.heads / p.kv_heads) : 1) * work.blocks;
  const int group_row = warpgroup * kGroupRows;
  const int warp_row = group_row + threadIdx.x % kWarpgroup / 32 * 16;
  const float scale = p.softmax_scale * kLog2e;
  typename S::Scores scores, d_weights;
  uint32_t operand[S::kColumns / 16][4];
  RowTerms sums[2];
  if constexpr (!S::kHoldsKeys) load_row_terms(sums, p, work, warp_row);
  rings.held.wait_full();
  const PairOfTiles<typename S::Held> held(rings.held.address());
  for (int step = 0, block = 0; step < steps; ++step) {
    const int column = work.begin + block * S::kColumns;
    const PairOfTiles<typename S::Streamed> streamed(rings.streamed.address());
    const uint32_t streamed_sums = rings.streamed.address() + S::kTileBytes;
    const auto for_each_chunk = [&](auto&& body) {
#pragma unroll
      for (int n = 0; n < S::kColumns / 8; ++n) {
        const int at = 8 * n + threadIdx.x % 4 * 2;
        if constexpr (S::kHoldsKeys) load_row_terms(sums, streamed_sums, at);
        body(n, column + at);
      }
    };
    rings.streamed.wait_full();
    start_scores<S::type>(scores, held.first, group_row, streamed.first);
    start_scores<S::type>(d_weights, held.second, group_row, streamed.second);
    ptx::wait_products<1>(scores);
    for_each_chunk([&](int n, int) { weigh<S::kHoldsKeys>(scores[0][n], sums, scale); });
    if (block < work.full_begin || block >= work.full_end) {
      const RowSpans seen(S::kHoldsKeys ? p.keys : p.queries, work, warp_row);
      for_each_chunk([&](int n, int at) { hide(scores[0][n], seen, at); });
    }
    const int tail = work.end - column;
    if (tail < S::kColumns) {
      streamed.first.clear_tail(tail, warpgroup);
      if constexpr (S::kHoldsKeys) streamed.second.clear_tail(tail, warpgroup);
    }
    if constexpr (S::kHoldsKeys) {
      round_weights<S::type>(operand, scores);
      start_output<S::type>(gradients.second, operand, streamed.second);
    }
    ptx::wait_products<S::kHoldsKeys>(d_weights);
    for_each_chunk(
        [&](int n, int) { differentiate<S::kHoldsKeys>(d_weights[0][n], scores[0][n], sums); });
    if constexpr (S::kHoldsKeys) wait_output<0>(gradients.second);  // which reads the operand
    round_weights<S::type>(operand, d_weights);
    start_output<S::type>(gradients.first, operand, streamed.first);
    wait_output<0>(gradients.first);
    rings.streamed.release();
    block = block + 1 < work.blocks ? block + 1 : 0;  // of the next head
  }
  rings.held.release();
}

template <typename S>
__device__ void consume(const AttentionCudaParams& p, uint32_t shared, Rings<S>& rings,
                        int warpgroup) {
  const int warp_row = warpgroup * kGroupRows + threadIdx.x % kWarpgroup / 32 * 16;
  const int64_t heads = S::kHoldsKeys ? p.kv_heads : p.heads;
  const float scaled[1][2] = {{p.softmax_scale, p.softmax_scale}}, once[1][2] = {{1, 1}};
  for (int index = blockIdx.x;; index += gridDim.x) {
    const Work work = find_tile<S>(p, index);
    if (work.rows == 0) return;
    Gradients<S> gradients;
    if (work.blocks > 0) accumulate<S>(p, work, rings, gradients, warpgroup);
    const auto store = [&](void* target, const auto& gradient, const float (&factor)[1][2]) {
      store_output<S::type>(static_cast<uint16_t*>(target) + (work.row * heads + work.head) * p.dim,
                            heads * p.dim, typename S::Shared{shared + S::kOutputAt}, warp_row,
                            work.rows, p.dim, gradient, factor);
    };
    store(S::kHoldsKeys ? p.d_k : p.d_q, gradients.first, scaled);
    if constexpr (S::kHoldsKeys) store(p.d_v, gradients.second, once);
  }
}

template <typename S>
__global__ void __launch_bounds__(kThreads, 1)
    attention_backward_wgmma(const __grid_constant__ AttentionCudaParams p,
                             const __grid_constant__ AllMaps maps) {
  const uint32_t shared = (ptx::shared_memory() + 1023) & ~1023u;
  Rings<S> rings(shared);
  if (threadIdx.x == 0) {
    rings.held.init();
    rings.streamed.init(1 + (S::kHoldsKeys ? S::kColumns / 32 : 0));  // the warps that copy sums
    ptx::fence_barriers();
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / kWarpgroup;
  static_assert(have_registers(24, 240));
  if (warpgroup == 0) {
    ptx::give_registers<24>();
    if (threadIdx.x == 0) produce<S>(p, maps, rings);
    const int at = static_cast<int>(threadIdx.x) - 32;
    if (S::kHoldsKeys && 0 <= at && at < S::kColumns) produce_sums<S>(p, rings.streamed, at);
  } else {
    ptx::take_registers<240>();
    consume<S>(p, shared, rings, warpgroup - 1);
  }
}

template <typename S>
void run(const AttentionCudaParams& p, Queue queue) {
  const auto maps_of = [&](bool keys, auto tile) -> PairOfMaps {
    using Tile = decltype(tile);
    const int64_t token = p.heads * p.dim;
    if (keys)
      return {make_maps<Tile>(p, queue, p.k, p.keys.size, p.kv_heads, p.k_token, p.k_head),
              make_maps<Tile>(p, queue, p.v, p.keys.size, p.kv_heads, p.v_token, p.v_head)};
    return {make_maps<Tile>(p, queue, p.q, p.queries.size, p.heads, p.q_token, p.q_head),
            make_maps<Tile>(p, queue, p.d_out, p.queries.size, p.heads, token, p.dim)};
  };
  const AllMaps maps{maps_of(S::kHoldsKeys, typename S::Held{}),
                     maps_of(!S::kHoldsKeys, typename S::Streamed{})};
  const Spans& spans = S::kHoldsKeys ? p.keys : p.queries;
  const int64_t heads = S::kHoldsKeys ? p.kv_heads : p.heads;
  launch_kernel("attention_backward_wgmma", attention_backward_wgmma<S>,
                count_blocks(count_work(spans, S::kRows, S::kRows, heads), queue), kThreads,
                S::kSharedBytes, p, queue, maps);
}

template <DType type>
void backward(const AttentionCudaParams& p, Queue queue) {
  visit_dim_sm90a(p.dim, [&](auto dim) {
    run<Sizes<type, decltype(dim)::value, false>>(p, queue);
    run<Sizes<type, decltype(dim)::value, true>>(p, queue);
  });
}

}  // namespace
}  // namespace moca::attention

void moca::attention_backward_sm90a(const AttentionCudaParams& p, Queue queue) {
  if (p.dtype == DType::bfloat16)
    attention::backward<DType::bfloat16>(p, queue);
  else
    attention::backward<DType::float16>(p, queue);
}

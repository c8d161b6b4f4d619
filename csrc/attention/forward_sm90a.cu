// The forward on Hopper: FlashAttention-3 (arXiv 2407.08608) over SpanMask. T queries, K keys, H
// query and Hkv key-value heads, D dim.
//
// Blocks of threads stay for the whole launch and take tiles of 128 queries in turn. One warp, the
// producer, starts the copies of q, k and v; two warpgroups have 64 queries each. While the scores
// of one block of keys turn into weights, products with the last weights and with the next keys
// run; and the warpgroups take turns, so that one's products run during the other's softmax.
//
// In shared memory a tile lies in parts of 64 columns (rows of 128 bytes, swizzled over them); the
// last 16 columns of D = 80 lie in a part of their own (rows of 32 bytes). Columns past D are 0.
#include "attention/softmax.cuh"
#include "attention/tile.cuh"
#include "common/ptx_sm90a.cuh"

namespace moca::attention {
namespace {

constexpr int kWide = 64, kNarrow = 16;  // columns of a part
constexpr int kWarpgroup = 128, kConsumers = 2;

template <DType type_, int kDim_>
struct Sizes {
  static constexpr DType type = type_;
  static constexpr int kDim = kDim_;
  static constexpr int kWideParts = kDim / kWide;
  static constexpr bool kHasNarrow = kDim % kWide != 0;
  static_assert(kDim == kWideParts * kWide + kHasNarrow * kNarrow);
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  static constexpr int kGroupRows = 64;
  static constexpr int kRows = kConsumers * kGroupRows;
  static constexpr int kKeys = 128;
  static constexpr int kStages = 2;
  static constexpr int kQueryBytes = kRows * kDim * 2, kKeyBytes = kKeys * kDim * 2;
  using Output = SharedTile<kRows, kDim>;
  // Offsets in shared memory, from a multiple of 1024: the swizzle is of addresses.
  static constexpr int kKeysAt = kQueryBytes, kValuesAt = kKeysAt + kStages * kKeyBytes;
  static constexpr int kOutputAt = kValuesAt + kStages * kKeyBytes;
  static constexpr int kBarriersAt = kOutputAt + Output::kBytes;
  static constexpr int kSharedBytes = kBarriersAt + (2 + 4 * kStages) * 8 + 1024;
};

// Maps of the parts of 64 columns, and of the part of 16.
struct Maps {
  TensorMap wide, narrow;
};

struct AllMaps {
  Maps q, k, v;
};

// A ring of stages: what fills and empties them meet at its barriers.
template <int kStages>
struct Ring {
  uint32_t data, full, empty;  // addresses of the first stage, and of its barriers
  int bytes;                   // of a stage
  int stage = 0, round = 0;

  __device__ Ring(uint32_t data, uint32_t barriers, int bytes)
      : data(data), full(barriers), empty(barriers + 8 * kStages), bytes(bytes) {}

  __device__ uint32_t address() const { return data + stage * bytes; }
  __device__ uint32_t full_barrier() const { return full + 8 * stage; }
  __device__ uint32_t empty_barrier() const { return empty + 8 * stage; }
  __device__ void wait_full() const { ptx::wait_barrier(full_barrier(), round & 1); }
  __device__ void wait_empty() const { ptx::wait_barrier(empty_barrier(), (round & 1) ^ 1); }

  __device__ void next() {
    if (++stage == kStages) {
      stage = 0;
      ++round;
    }
  }

  // This warp has done with the stage.
  __device__ void release() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::arrive(empty_barrier());
    next();
  }
};

template <typename S>
struct Rings {
  Ring<1> q;
  Ring<S::kStages> k, v;

  __device__ explicit Rings(uint32_t shared)
      : q(shared, shared + S::kBarriersAt, S::kQueryBytes),
        k(shared + S::kKeysAt, shared + S::kBarriersAt + 16, S::kKeyBytes),
        v(shared + S::kValuesAt, shared + S::kBarriersAt + 16 + 16 * S::kStages, S::kKeyBytes) {}

  // By one thread: the producer arrives at `full`, all consumers' warps at `empty`.
  __device__ void init() const {
    const uint32_t barrier = q.full;
    for (int ring = 0, i = 0; ring < 3; ++ring) {
      const int stages = ring == 0 ? 1 : S::kStages;
      for (int end = i + stages; i < end; ++i) ptx::init_barrier(barrier + 8 * i, 1);
      for (int end = i + stages; i < end; ++i)
        ptx::init_barrier(barrier + 8 * i, kConsumers * kWarpgroup / 32);
    }
    ptx::fence_barriers();
  }
};

// Fills a stage with kRows rows of one head, from `token`.
template <typename S, int kRows, int kStages>
__device__ void fill(Ring<kStages>& ring, const Maps& maps, int head, int token) {
  ring.wait_empty();
  ptx::arrive_expecting(ring.full_barrier(), ring.bytes);
#pragma unroll
  for (int part = 0; part < S::kWideParts; ++part)
    ptx::copy_box(ring.address() + part * kRows * kWide * 2, maps.wide, part * kWide, head, token,
                  ring.full_barrier());
  if constexpr (S::kHasNarrow)
    ptx::copy_box(ring.address() + S::kWideParts * kRows * kWide * 2, maps.narrow,
                  S::kWideParts * kWide, head, token, ring.full_barrier());
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
    if (work.blocks > 0) fill<S, S::kRows>(rings.q, maps.q, work.head, work.row);
    for (int block = 0; block < work.blocks; ++block) {
      const int key = work.begin + block * S::kKeys;
      fill<S, S::kKeys>(rings.k, maps.k, work.head / group, key);
      fill<S, S::kKeys>(rings.v, maps.v, work.head / group, key);
    }
  }
}

// A tile of which a product takes rows from `row`, columns from 16 step: K-major.
template <typename S, int kRows>
__device__ uint64_t rows_operand(uint32_t tile, int row, int step) {
  constexpr int kSteps = kWide / 16;
  const uint32_t part = tile + step / kSteps * kRows * kWide * 2;
  if (S::kHasNarrow && step / kSteps == S::kWideParts)
    return ptx::operand<32>(part + row * kNarrow * 2, 8 * kNarrow * 2);
  return ptx::operand<128>(part + row * kWide * 2 + step % kSteps * 32, 8 * kWide * 2);
}

// Starts scores = q k^T, of this warpgroup's rows.
template <typename S>
__device__ void start_scores(float (&scores)[1][S::kKeys / 8][4], uint32_t queries, uint32_t keys,
                             int row) {
  ptx::begin_products();
#pragma unroll
  for (int step = 0; step < S::kDim / 16; ++step)
    ptx::multiply<S::type>(scores[0], rows_operand<S, S::kRows>(queries, row, step),
                           rows_operand<S, S::kKeys>(keys, 0, step), step > 0);
  ptx::commit_products();
}

template <typename S>
struct Output {
  float wide[1][S::kWideParts * kWide / 8][4], narrow[1][kNarrow / 8][4];
};

// Starts output += weights v.
template <typename S>
__device__ void start_output(Output<S>& output, const uint32_t (&weights)[S::kKeys / 16][4],
                             uint32_t values) {
  ptx::begin_products();
#pragma unroll
  for (int step = 0; step < S::kKeys / 16; ++step) {
    ptx::multiply<S::type>(
        output.wide[0], weights[step],
        ptx::operand<128>(values + step * 16 * kWide * 2, 8 * kWide * 2, S::kKeys * kWide * 2));
    if constexpr (S::kHasNarrow)
      ptx::multiply<S::type>(
          output.narrow[0], weights[step],
          ptx::operand<32>(values + S::kKeys * S::kWideParts * kWide * 2 + step * 16 * kNarrow * 2,
                           8 * kNarrow * 2));
  }
  ptx::commit_products();
}

template <typename S>
__device__ void wait_output(Output<S>& output) {
  ptx::wait_products<0>(output.wide);
  if constexpr (S::kHasNarrow) ptx::wait_products<0>(output.narrow);
}

// Weights as the operand a of products with v.
template <typename S>
__device__ void round_weights(uint32_t (&weights)[S::kKeys / 16][4],
                              const float (&scores)[1][S::kKeys / 8][4]) {
#pragma unroll
  for (int step = 0; step < S::kKeys / 16; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = &scores[0][2 * step + i / 2][i % 2 * 2];
      weights[step][i] = ptx::pack<S::type>(pair[0], pair[1]);
    }
}

// Rows of v from `rows` on become 0: other documents' values, which may be NaN. Both warpgroups
// write the same, and each waits for itself.
template <typename S>
__device__ void clear_tail(uint32_t values, int rows, int warpgroup) {
  const int thread = threadIdx.x % kWarpgroup;
  for (int part = 0; part < S::kWideParts; ++part)
    for (int i = rows * 8 + thread; i < S::kKeys * 8; i += kWarpgroup)
      ptx::store_shared(values + part * S::kKeys * kWide * 2 + i * 16, uint4{0, 0, 0, 0});
  if constexpr (S::kHasNarrow)
    for (int i = rows * 2 + thread; i < S::kKeys * 2; i += kWarpgroup)
      ptx::store_shared(values + S::kWideParts * S::kKeys * kWide * 2 + i * 16, uint4{0, 0, 0, 0});
  ptx::fence_stores();
  ptx::sync_named(3 + warpgroup, kWarpgroup);
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
                       Softmax<1>& softmax, Output<S>& output, int warpgroup, float scale) {
  const int group_row = warpgroup * S::kGroupRows;
  const int warp_row = group_row + threadIdx.x % kWarpgroup / 32 * 16;
  float scores[1][S::kKeys / 8][4], decay[1][2];
  uint32_t weights[S::kKeys / 16][4];
  const auto weigh = [&](int block) {
    if (block < work.full_begin || block >= work.full_end)
      hide(scores, p.queries, work, warp_row, work.begin + block * S::kKeys);
    softmax.weigh(scores, decay, scale);
  };
  rings.q.wait_full();
  rings.k.wait_full();
  start_scores<S>(scores, rings.q.address(), rings.k.address(), group_row);
  ptx::wait_products<0>(scores);
  rings.k.release();
  weigh(0);
  round_weights<S>(weights, scores);
  for (int block = 1; block < work.blocks; ++block) {
    rings.k.wait_full();
    take_turn(warpgroup);
    start_scores<S>(scores, rings.q.address(), rings.k.address(), group_row);
    rings.v.wait_full();
    start_output<S>(output, weights, rings.v.address());
    pass_turn(warpgroup);
    ptx::wait_products<1>(scores);
    rings.k.release();
    weigh(block);
    wait_output(output);
    rings.v.release();
    rescale(output.wide, decay);
    if constexpr (S::kHasNarrow) rescale(output.narrow, decay);
    round_weights<S>(weights, scores);
  }
  rings.q.release();
  rings.v.wait_full();
  const int tail = work.end - work.begin - (work.blocks - 1) * S::kKeys;
  if (tail < S::kKeys) clear_tail<S>(rings.v.address(), tail, warpgroup);
  start_output<S>(output, weights, rings.v.address());
  wait_output(output);
  rings.v.release();
}

template <typename S>
__device__ void store_output(const AttentionCudaParams& p, const Work& work, uint32_t shared,
                             const Softmax<1>& softmax, const Output<S>& output, int warp_row,
                             float scale) {
  float factor[1][2], all[1][S::kDim / 8][4];
  softmax.finish(p, work, factor, warp_row, scale);
#pragma unroll
  for (int n = 0; n < S::kDim / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      all[0][n][i] = n < S::kWideParts * 8 ? output.wide[0][n][i] : output.narrow[0][n % 2][i];
  auto* out = static_cast<uint16_t*>(p.out) + (work.row * p.heads + work.head) * p.dim;
  store_rows<S::type>(out, p.heads * p.dim, typename S::Output{shared + S::kOutputAt}, warp_row,
                      work.rows, static_cast<int>(p.dim) / 8, all, factor);
}

template <typename S>
__device__ void consume(const AttentionCudaParams& p, uint32_t shared, Rings<S>& rings,
                        int warpgroup) {
  const int warp_row = warpgroup * S::kGroupRows + threadIdx.x % kWarpgroup / 32 * 16;
  const float scale = p.softmax_scale * kLog2e;
  if (warpgroup == 1) pass_turn(warpgroup);
  for (int index = blockIdx.x;; index += gridDim.x) {
    const Work work = find_tile<S>(p, index);
    if (work.rows == 0) return;
    Softmax<1> softmax;
    Output<S> output = {};
    if (work.blocks > 0) attend<S>(p, work, rings, softmax, output, warpgroup, scale);
    store_output<S>(p, work, shared, softmax, output, warp_row, scale);
  }
}

template <typename S>
__global__ void __launch_bounds__(S::kThreads, 1)
    attention_forward_wgmma(const __grid_constant__ AttentionCudaParams p,
                            const __grid_constant__ AllMaps maps) {
  const uint32_t shared = (ptx::shared_memory() + 1023) & ~1023u;
  Rings<S> rings(shared);
  if (threadIdx.x == 0) rings.init();
  __syncthreads();
  const int warpgroup = threadIdx.x / kWarpgroup;
  if (warpgroup == 0) {
    ptx::give_registers<40>();
    if (threadIdx.x == 0) produce<S>(p, maps, rings);
  } else {
    ptx::take_registers<232>();
    consume<S>(p, shared, rings, warpgroup - 1);
  }
}

// Maps of `rows` rows of a (tokens, heads, D) tensor.
template <typename S>
Maps make_maps(const AttentionCudaParams& p, const void* data, int64_t tokens, int64_t heads,
               int64_t token_stride, int64_t head_stride, int rows) {
  TensorBox box{data, tokens, heads, p.dim, token_stride, head_stride, rows, kWide, p.dtype};
  Maps maps{make_tensor_map(box), {}};
  if constexpr (S::kHasNarrow) {
    box.columns = kNarrow;
    maps.narrow = make_tensor_map(box);
  }
  return maps;
}

template <typename S>
void run(const AttentionCudaParams& p, Queue queue) {
  const AllMaps maps{make_maps<S>(p, p.q, p.queries.size, p.heads, p.q_token, p.q_head, S::kRows),
                     make_maps<S>(p, p.k, p.keys.size, p.kv_heads, p.k_token, p.k_head, S::kKeys),
                     make_maps<S>(p, p.v, p.keys.size, p.kv_heads, p.v_token, p.v_head, S::kKeys)};
  int multiprocessors = 1;
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, queue.device);
  const int64_t work = count_work(p.queries, S::kRows, S::kRows, p.heads);
  launch_kernel("attention_forward_wgmma", attention_forward_wgmma<S>,
                work < multiprocessors ? work : multiprocessors, S::kThreads, S::kSharedBytes, p,
                queue, maps);
}

template <DType type>
void forward(const AttentionCudaParams& p, Queue queue) {
  if (p.dim <= 64) return run<Sizes<type, 64>>(p, queue);
  if (p.dim <= 80) return run<Sizes<type, 80>>(p, queue);
  return run<Sizes<type, 128>>(p, queue);
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

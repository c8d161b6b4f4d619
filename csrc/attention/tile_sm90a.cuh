// What Hopper's kernels share: tiles as copies write them and products read them, rings of stages
// that a producer fills and consumers empty, products of a warpgroup.
#pragma once

#include "attention/tile.cuh"
#include "common/ptx_sm90a.cuh"

namespace moca::attention {

constexpr int kWide = 64, kNarrow = 16;  // columns of a part
constexpr int kWarpgroup = 128, kConsumers = 2;
constexpr int kGroupRows = 64;  // of a tile of rows, each consumer has so many
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;

// Registers of a thread: at launch, the most that so many threads can have. The warpgroups then
// give and take some; what was not given would be waited for for ever.
constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
constexpr bool have_registers(int producer, int consumer) {
  return producer + kConsumers * consumer <= (1 + kConsumers) * kLaunchRegisters;
}

// Maps of the parts of 64 columns, and of the part of 16.
struct Maps {
  TensorMap wide, narrow;
};

// kRows rows of kDim columns in shared memory, in parts of 64 columns (rows of 128 bytes, swizzled
// over them); the last 16 columns of D = 80 lie in a part of their own (rows of 32 bytes). Columns
// past D are 0. It starts at a multiple of 1024: the swizzle is of addresses.
template <int kRows_, int kDim_>
struct SwizzledTile {
  static constexpr int kRows = kRows_, kDim = kDim_;
  static constexpr int kWideParts = kDim / kWide;
  static constexpr bool kHasNarrow = kDim % kWide != 0;
  static_assert(kDim == kWideParts * kWide + kHasNarrow * kNarrow);
  static constexpr int kPartBytes = kRows * kWide * 2;
  static constexpr int kBytes = kRows * kDim * 2;
  static_assert(kBytes % 1024 == 0);

  static constexpr int kNarrowAt = kWideParts * kPartBytes;

  uint32_t base;

  // Starts its copy from one head, from row `token`; `barrier` counts kBytes.
  __device__ void copy(const Maps& maps, int head, int token, uint32_t barrier) const {
#pragma unroll
    for (int part = 0; part < kWideParts; ++part)
      ptx::copy_box(base + part * kPartBytes, maps.wide, part * kWide, head, token, barrier);
    if constexpr (kHasNarrow)
      ptx::copy_box(base + kNarrowAt, maps.narrow, kWideParts * kWide, head, token, barrier);
  }

  // Of a product over columns, its 16 from 16 step, of rows from `row`: K-major.
  __device__ uint64_t rows_operand(int row, int step) const {
    constexpr int kSteps = kWide / 16;
    if (kHasNarrow && step / kSteps == kWideParts)
      return ptx::operand<32>(base, kNarrowAt + row * kNarrow * 2, 8 * kNarrow * 2);
    return ptx::operand<128>(
        base, step / kSteps * kPartBytes + row * kWide * 2 + step % kSteps * 32, 8 * kWide * 2);
  }

  // Of a product over rows, its 16 from 16 step, of the columns of all wide parts, or of the narrow
  // one: MN-major.
  __device__ uint64_t wide_operand(int step) const {
    return ptx::operand<128>(base, step * 16 * kWide * 2, 8 * kWide * 2, kPartBytes);
  }
  __device__ uint64_t narrow_operand(int step) const {
    return ptx::operand<32>(base, kNarrowAt + step * 16 * kNarrow * 2, 8 * kNarrow * 2);
  }

  // Rows from `rows` on become 0: other documents' values, which may be NaN. Both warpgroups write
  // the same, and each waits for itself.
  __device__ void clear_tail(int rows, int warpgroup) const {
    const int thread = threadIdx.x % kWarpgroup;
    for (int part = 0; part < kWideParts; ++part)
      for (int i = rows * 8 + thread; i < kRows * 8; i += kWarpgroup)
        ptx::store_shared(base + part * kPartBytes + i * 16, uint4{0, 0, 0, 0});
    if constexpr (kHasNarrow)
      for (int i = rows * 2 + thread; i < kRows * 2; i += kWarpgroup)
        ptx::store_shared(base + kNarrowAt + i * 16, uint4{0, 0, 0, 0});
    ptx::fence_stores();
    ptx::sync_named(3 + warpgroup, kWarpgroup);
  }
};

// A ring of stages: what fills and empties them meet at its barriers.
template <int kStages>
struct Ring {
  uint32_t data, full, empty;  // addresses of the first stage, and of its barriers
  int bytes;                   // of a stage
  int stage = 0, round = 0;
  static constexpr int kBarrierBytes = 2 * kStages * 8;

  __device__ Ring(uint32_t data, uint32_t barriers, int bytes)
      : data(data), full(barriers), empty(barriers + 8 * kStages), bytes(bytes) {}

  // By one thread: a producer arrives `arrivals` times at `full`, all consumers' warps at `empty`.
  __device__ void init(int arrivals = 1) const {
    for (int i = 0; i < kStages; ++i) {
      ptx::init_barrier(full + 8 * i, arrivals);
      ptx::init_barrier(empty + 8 * i, kConsumers * kWarpgroup / 32);
    }
  }

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

// Starts scores = a b^T, of this warpgroup's rows of a and all rows of b, as a group of products.
template <DType type, int kColumns, typename A, typename B>
__device__ void start_scores(float (&scores)[1][kColumns][4], const A& a, int row, const B& b) {
  static_assert(8 * kColumns == B::kRows && A::kDim == B::kDim);
  ptx::begin_products();
#pragma unroll
  for (int step = 0; step < A::kDim / 16; ++step)
    ptx::multiply<type>(scores[0], a.rows_operand(row, step), b.rows_operand(0, step), step > 0);
  ptx::commit_products();
}

// 64 rows of a warpgroup; of the narrow part where there is one.
template <typename Tile>
struct Output {
  float wide[1][Tile::kWideParts * kWide / 8][4], narrow[1][kNarrow / 8][4];
};

// Starts output += weights b, as a group of products.
template <DType type, typename Tile, int kSteps>
__device__ void start_output(Output<Tile>& output, const uint32_t (&weights)[kSteps][4],
                             const Tile& b) {
  static_assert(16 * kSteps == Tile::kRows);
  ptx::begin_products();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    ptx::multiply<type>(output.wide[0], weights[step], b.wide_operand(step));
    if constexpr (Tile::kHasNarrow)
      ptx::multiply<type>(output.narrow[0], weights[step], b.narrow_operand(step));
  }
  ptx::commit_products();
}

template <int kGroups, typename Tile>
__device__ void wait_output(Output<Tile>& output) {
  ptx::wait_products<kGroups>(output.wide);
  if constexpr (Tile::kHasNarrow) ptx::wait_products<kGroups>(output.narrow);
}

// Weights, as lanes hold scores, as the operand a of products.
template <DType type, int kColumns>
__device__ void round_weights(uint32_t (&operand)[kColumns / 2][4],
                              const float (&weights)[1][kColumns][4]) {
#pragma unroll
  for (int step = 0; step < kColumns / 2; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = &weights[0][2 * step + i / 2][i % 2 * 2];
      operand[step][i] = ptx::pack<type>(pair[0], pair[1]);
    }
}

// Writes a warp's 16 rows from `warp_row` of a tile's output to `target` (the tile's first row),
// through those of `shared`.
template <DType type, typename Tile, typename Shared>
__device__ void store_output(uint16_t* target, int64_t token, const Shared& shared, int warp_row,
                             int rows, int64_t dim, const Output<Tile>& output,
                             const float (&factor)[1][2]) {
  float all[1][Tile::kDim / 8][4];
#pragma unroll
  for (int n = 0; n < Tile::kDim / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      all[0][n][i] = n < Tile::kWideParts * 8 ? output.wide[0][n][i] : output.narrow[0][n % 2][i];
  store_rows<type>(target, token, shared, warp_row, rows, static_cast<int>(dim) / 8, all, factor);
}

// Maps of `rows` rows of a (tokens, heads, D) tensor.
template <typename Tile>
Maps make_maps(const AttentionCudaParams& p, Queue queue, const void* data, int64_t tokens,
               int64_t heads, int64_t token_stride, int64_t head_stride) {
  TensorBox box{data,        tokens,      heads, p.dim,   token_stride,
                head_stride, Tile::kRows, kWide, p.dtype, queue.device};
  Maps maps{make_tensor_map(box), {}};
  if constexpr (Tile::kHasNarrow) {
    box.columns = kNarrow;
    maps.narrow = make_tensor_map(box);
  }
  return maps;
}

// Blocks of threads that stay for the whole launch: one for each multiprocessor, or fewer.
inline int64_t count_blocks(int64_t work, Queue queue) {
  int multiprocessors = 1;
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, queue.device);
  return work < multiprocessors ? work : multiprocessors;
}

// Calls body(integral constant) for the smallest of Hopper's dims that holds D.
template <typename Body>
void visit_dim_sm90a(int64_t dim, Body&& body) {
  if (dim <= 64) return body(Dim<64>{});
  if (dim <= 80) return body(Dim<80>{});
  return body(Dim<128>{});
}

}  // namespace moca::attention

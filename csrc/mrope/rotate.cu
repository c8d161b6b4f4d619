// Every element of q and k is read and written once. A block has a token; each thread turns a few
// neighbouring pairs of one head. Angles are read again for every head, from the cache.
#include "common/cuda.h"
#include "common/cuda_device.h"
#include "mrope/mrope.h"

namespace moca {
namespace {

constexpr int kThreads = 256;  // of a block, at most

// The row of the tables that a pair turns by: time, height, width.
__device__ int row_of_pair(const MropeParams& p, int64_t pair) {
  if (p.interleaved) {
    const int row = pair % 3;
    return (row == 1 && pair < 3 * p.height) || (row == 2 && pair < 3 * p.width) ? row : 0;
  }
  return pair < p.time ? 0 : pair < p.time + p.height ? 1 : 2;
}

// Adds to `out` the N entries at `from` whose pair turns by `row`.
template <typename T, int N>
__device__ void pick(const T* from, const int (&rows)[N], int row, float (&out)[N]) {
  bool any = false;
#pragma unroll
  for (int n = 0; n < N; ++n) any |= rows[n] == row;
  if (!any) return;
  const Pack<T, N> values = load<N>(from);
#pragma unroll
  for (int n = 0; n < N; ++n)
    if (rows[n] == row) out[n] = as_float(values.lane[n]);
}

// N entries of a table from element `at` of its first row on, each out of its own row.
template <typename Table, int N>
__device__ void read_table(const MropeParams& p, const void* table, int64_t at,
                           const int (&rows)[N], float (&out)[N]) {
  const Table* from = static_cast<const Table*>(table) + at;
  pick(from, rows, 0, out);
  if (!p.sections) return;
  const int64_t row = p.tokens * p.dim;
  pick(from + row, rows, 1, out);
  pick(from + 2 * row, rows, 2, out);
}

// Turns N pairs of one head of x, from `pair` on. In the backward the second dim's sine is the
// first's, and both change sign.
template <typename T, typename Table, int N>
__device__ void turn(const MropeParams& p, int64_t token, int64_t pair, const T* x, T* out) {
  const int64_t half = p.dim / 2, at = token * p.dim + pair;
  int rows[N];
#pragma unroll
  for (int n = 0; n < N; ++n) rows[n] = p.sections ? row_of_pair(p, pair + n) : 0;
  const Pack<T, N> first = load<N>(x + pair), second = load<N>(x + half + pair);
  float cos1[N], cos2[N], sin1[N], sin2[N];
  read_table<Table>(p, p.cos, at, rows, cos1);
  read_table<Table>(p, p.cos, at + half, rows, cos2);
  read_table<Table>(p, p.sin, p.inverse ? at + half : at, rows, sin1);
  read_table<Table>(p, p.sin, p.inverse ? at : at + half, rows, sin2);
  const float sign = p.inverse ? -1.0f : 1.0f;
  Pack<T, N> first_out, second_out;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const float x1 = as_float(first.lane[n]), x2 = as_float(second.lane[n]);
    first_out.lane[n] = rounded<T>(x1 * cos1[n] - x2 * (sign * sin1[n]));
    second_out.lane[n] = rounded<T>(x2 * cos2[n] + x1 * (sign * sin2[n]));
  }
  store(out + pair, first_out);
  store(out + half + pair, second_out);
}

template <typename T, typename Table, int N>
__global__ void __launch_bounds__(kThreads) rotate(MropeParams p) {
  const int64_t token = blockIdx.x;
  const int packs = static_cast<int>(p.dim / 2 / N);
  const int items = static_cast<int>(p.heads + p.kv_heads) * packs;
  for (int item = threadIdx.x; item < items; item += blockDim.x) {
    const int64_t head = item / packs, pair = int64_t{item % packs} * N;
    if (head < p.heads) {
      const T* x = static_cast<const T*>(p.q) + token * p.q_stride + head * p.dim;
      turn<T, Table, N>(p, token, pair, x,
                        static_cast<T*>(p.q_out) + (token * p.heads + head) * p.dim);
    } else {
      const int64_t other = head - p.heads;
      const T* x = static_cast<const T*>(p.k) + token * p.k_stride + other * p.dim;
      turn<T, Table, N>(p, token, pair, x,
                        static_cast<T*>(p.k_out) + (token * p.kv_heads + other) * p.dim);
    }
  }
}

template <typename T, typename Table, int N>
void launch_rotate(const MropeParams& p, Queue queue) {
  const int64_t items = (p.heads + p.kv_heads) * (p.dim / 2 / N);
  const int64_t threads = ceil_div(items, kWarp) * kWarp;
  launch({"mrope",
          {{"T", p.tokens}, {"H", p.heads}, {"Hkv", p.kv_heads}, {"D", p.dim}},
          queue,
          dim3(items > 0 ? static_cast<unsigned>(p.tokens) : 0),
          dim3(static_cast<unsigned>(threads < kThreads ? threads : kThreads))},
         rotate<T, Table, N>, p);
}

// Whether N pairs can be read and written at a time, up to 16 bytes of q and k.
template <int N>
bool fits(const MropeParams& p) {
  const auto multiple = [](int64_t size) { return size % N == 0; };
  return is_aligned(p.q) && is_aligned(p.k) && is_aligned(p.cos) && is_aligned(p.sin) &&
         is_aligned(p.q_out) && is_aligned(p.k_out) && multiple(p.dim / 2) &&
         multiple(p.q_stride) && multiple(p.k_stride);
}

template <typename T, typename Table>
void launch_widest(const MropeParams& p, Queue queue) {
  constexpr int kPack = 16 / sizeof(T);
  if (fits<kPack>(p))
    launch_rotate<T, Table, kPack>(p, queue);
  else if (fits<kPack / 2>(p))  // heads of 72 dims, of 36 pairs
    launch_rotate<T, Table, kPack / 2>(p, queue);
  else
    launch_rotate<T, Table, 1>(p, queue);
}

}  // namespace

void mrope_rotate_cuda(const MropeParams& p, Queue queue) {
  visit_cuda(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (p.table_dtype == p.dtype)
      launch_widest<T, T>(p, queue);
    else if (p.table_dtype == DType::float32)
      launch_widest<T, float>(p, queue);
    else
      throw std::invalid_argument("moca_fast: mrope: tables of another dtype, and not float32");
  });
}

}  // namespace moca

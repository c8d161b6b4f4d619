#include "common/binding.h"

#include <pybind11/stl.h>

#include <array>

#include "attention/attention.h"
#include "attention/cuda.h"
#include "attention/plan.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using Pair = std::array<int64_t, 2>;

moca::Spans spans(uintptr_t start, uintptr_t end, uintptr_t tiles, int64_t size,
                  int64_t max_tiles) {
  return {moca::pointer<const int32_t>(start), moca::pointer<const int32_t>(end),
          moca::pointer<const moca::Tile>(tiles), size, max_tiles};
}

// Kernels index by these without further checks.
void check(const moca::Spans& spans, int64_t num_keys) {
  moca::check_spans(spans.start, spans.end, spans.size, num_keys);
  int64_t row = 0;
  for (int64_t t = 0; t < spans.max_tiles; ++t) {
    const moca::Tile& tile = spans.tiles[t];
    if (tile.row_begin == tile.row_end) continue;
    moca::require(tile.row_begin == row && tile.row_end > row && tile.row_end <= spans.size,
                  "attention: the tiles do not cover the rows in order");
    row = tile.row_end;
    moca::require(
        tile.key_begin == spans.start[tile.row_begin] && tile.key_end == spans.end[row - 1],
        "attention: a tile's keys do not match its rows");
  }
  moca::require(row == spans.size, "attention: the tiles do not cover all rows");
}

moca::AttentionParams params(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse,
                             uintptr_t lse_rest, Pair q_strides, Pair k_strides, Pair v_strides,
                             const moca::Spans& queries, const moca::Spans& keys, int64_t heads,
                             int64_t kv_heads, int64_t dim, float softmax_scale, moca::DType dtype,
                             int threads) {
  moca::require(dim >= 1 && dim <= 256, "attention: bad dim");
  moca::require(kv_heads >= 1 && heads >= 1 && heads % kv_heads == 0, "attention: bad heads");
  check(queries, keys.size);
  check(keys, queries.size);
  moca::AttentionParams p{};
  p.q = moca::pointer<>(q);
  p.k = moca::pointer<>(k);
  p.v = moca::pointer<>(v);
  p.out = moca::pointer<>(out);
  p.lse = moca::pointer<float>(lse);
  p.lse_rest = moca::pointer<float>(lse_rest);
  p.q_strides = {q_strides[0], q_strides[1]};
  p.k_strides = {k_strides[0], k_strides[1]};
  p.v_strides = {v_strides[0], v_strides[1]};
  p.queries = queries;
  p.keys = keys;
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.dim = dim;
  p.softmax_scale = softmax_scale;
  p.dtype = dtype;
  p.threads = threads;
  return p;
}

#ifdef MOCA_CUDA_ARCHS
// What masks hold is in the device's memory: nothing of it is checked here.
void check_cuda_params(const moca::AttentionCudaParams& p) {
  moca::require(p.dim >= 16 && p.dim <= 256 && p.dim % 8 == 0, "attention: bad dim");
  moca::require(p.kv_heads >= 1 && p.heads >= 1 && p.heads % p.kv_heads == 0,
                "attention: bad heads");
  moca::require(p.dtype != moca::DType::float32, "attention: bad dtype");
  moca::require(p.softmax_scale > 0, "attention: bad softmax_scale");
  for (const int64_t stride : {p.q_token, p.q_head, p.k_token, p.k_head, p.v_token, p.v_head})
    moca::require(stride % 8 == 0, "attention: rows are not aligned");
  for (const void* data : {p.q, p.k, p.v, static_cast<const void*>(p.out)})
    moca::require(reinterpret_cast<uintptr_t>(data) % 16 == 0, "attention: rows are not aligned");
}

void bind_cuda(py::module_& m) {
  using moca::field;
  using Params = moca::AttentionCudaParams;
  moca::bind_params(m, "AttentionCudaParams", check_cuda_params, field("q", &Params::q),
                    field("k", &Params::k), field("v", &Params::v),
                    field("q_token", &Params::q_token), field("q_head", &Params::q_head),
                    field("k_token", &Params::k_token), field("k_head", &Params::k_head),
                    field("v_token", &Params::v_token), field("v_head", &Params::v_head),
                    field("out", &Params::out), field("lse", &Params::lse),
                    field("queries", &Params::queries), field("keys", &Params::keys),
                    field("tile_rows", &Params::tile_rows), field("heads", &Params::heads),
                    field("kv_heads", &Params::kv_heads), field("dim", &Params::dim),
                    field("softmax_scale", &Params::softmax_scale), field("dtype", &Params::dtype));
  m.def("attention_forward_cuda", [](const Params& p, moca::Queue queue) {
    py::gil_scoped_release release;
    moca::attention_forward_cuda(p, queue);
  });
  m.def(
      "attention_backward_cuda",
      [](Params p, uintptr_t d_out, uintptr_t d_lse, uintptr_t rows, uintptr_t d_q, uintptr_t d_k,
         uintptr_t d_v, moca::Queue queue) {
        p.d_out = moca::pointer<>(d_out);
        p.d_lse = moca::pointer<const float>(d_lse);
        p.rows = moca::pointer<moca::RowTerms>(rows);
        p.d_q = moca::pointer<>(d_q);
        p.d_k = moca::pointer<>(d_k);
        p.d_v = moca::pointer<>(d_v);
        py::gil_scoped_release release;
        moca::attention_backward_cuda(p, queue);
      },
      "params"_a, py::kw_only(), "d_out"_a, "d_lse"_a, "rows"_a, "d_q"_a, "d_k"_a, "d_v"_a,
      "queue"_a);
}
#endif

}  // namespace

MOCA_BINDING(attention, m) {
  py::class_<moca::Spans>(m, "Spans")
      .def(py::init(&spans), py::kw_only(), "start"_a, "end"_a, "tiles"_a, "size"_a, "max_tiles"_a);
  py::class_<moca::AttentionParams>(m, "AttentionParams")
      .def(py::init(&params), py::kw_only(), "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "lse_rest"_a,
           "q_strides"_a, "k_strides"_a, "v_strides"_a, "queries"_a, "keys"_a, "heads"_a,
           "kv_heads"_a, "dim"_a, "softmax_scale"_a, "dtype"_a, "threads"_a);
  m.def(
      "span_tiles",
      [](uintptr_t start, uintptr_t end, int64_t num_queries, int64_t num_keys, int64_t rows,
         uintptr_t tiles, int64_t max_tiles) {
        moca::require(rows >= 1, "attention: expected tiles of at least one row");
        const auto* starts = moca::pointer<const int32_t>(start);
        const auto* ends = moca::pointer<const int32_t>(end);
        moca::check_spans(starts, ends, num_queries, num_keys);
        moca::TilePlanner(starts, ends, rows, moca::pointer<moca::Tile>(tiles), max_tiles)
            .plan(num_queries);
      },
      py::kw_only(), "start"_a, "end"_a, "num_queries"_a, "num_keys"_a, "rows"_a, "tiles"_a,
      "max_tiles"_a);
  m.def("attention_forward", [](const moca::AttentionParams& p) {
    py::gil_scoped_release release;
    moca::attention_forward(p);
  });
  m.def(
      "attention_backward",
      [](moca::AttentionParams p, uintptr_t d_out, uintptr_t d_lse, uintptr_t delta, uintptr_t d_q,
         uintptr_t d_k, uintptr_t d_v) {
        p.d_out = moca::pointer<>(d_out);
        p.d_lse = moca::pointer<const float>(d_lse);
        p.delta = moca::pointer<float>(delta);
        p.d_q = moca::pointer<>(d_q);
        p.d_k = moca::pointer<>(d_k);
        p.d_v = moca::pointer<>(d_v);
        py::gil_scoped_release release;
        moca::attention_backward(p);
      },
      "params"_a, py::kw_only(), "d_out"_a, "d_lse"_a, "delta"_a, "d_q"_a, "d_k"_a, "d_v"_a);
#ifdef MOCA_CUDA_ARCHS
  bind_cuda(m);
#endif
}

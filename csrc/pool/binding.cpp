#include "common/binding.h"

#include "pool/pool.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

moca::PoolParams params(uintptr_t hidden, uintptr_t cu_seqlens, uintptr_t pooled, uintptr_t norm,
                        int64_t documents, int64_t tokens, int64_t dim, moca::DType dtype,
                        bool mean, bool normalize, int threads) {
  moca::require(documents >= 0 && tokens >= 0 && dim >= 0, "pool: bad sizes");
  moca::PoolParams p{};
  p.hidden = moca::pointer<>(hidden);
  p.cu_seqlens = moca::pointer<const int32_t>(cu_seqlens);
  p.pooled = moca::pointer<float>(pooled);
  p.norm = moca::pointer<float>(norm);
  p.documents = documents;
  p.tokens = tokens;
  p.dim = dim;
  p.dtype = dtype;
  p.mean = mean;
  p.normalize = normalize;
  p.threads = threads;
  return p;
}

}  // namespace

MOCA_BINDING(pool, m) {
  py::class_<moca::PoolParams>(m, "PoolParams")
      .def(py::init(&params), py::kw_only(), "hidden"_a, "cu_seqlens"_a, "pooled"_a, "norm"_a,
           "documents"_a, "tokens"_a, "dim"_a, "dtype"_a, "mean"_a, "normalize"_a, "threads"_a);
  m.def("pool_forward", [](const moca::PoolParams& p) {
    py::gil_scoped_release release;
    moca::pool_forward(p);
  });
  m.def("pool_backward", [](moca::PoolParams p, uintptr_t d_pooled, uintptr_t d_hidden) {
    p.d_pooled = moca::pointer<const float>(d_pooled);
    p.d_hidden = moca::pointer<>(d_hidden);
    py::gil_scoped_release release;
    moca::pool_backward(p);
  });
}

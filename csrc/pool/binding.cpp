#include "common/binding.h"

#include "pool/pool.h"

namespace py = pybind11;

MOCA_BINDING(pool, m) {
  using moca::field;
  using Params = moca::PoolParams;
  const auto check = [](const Params& p) {
    moca::require(p.documents >= 0 && p.tokens >= 0 && p.dim >= 0, "pool: bad sizes");
  };
  moca::bind_params(m, "PoolParams", check, field("hidden", &Params::hidden),
                    field("cu_seqlens", &Params::cu_seqlens), field("pooled", &Params::pooled),
                    field("norm", &Params::norm), field("documents", &Params::documents),
                    field("tokens", &Params::tokens), field("dim", &Params::dim),
                    field("dtype", &Params::dtype), field("mean", &Params::mean),
                    field("normalize", &Params::normalize), field("threads", &Params::threads));
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
#ifdef MOCA_CUDA_ARCHS
  m.def("pool_pieces", &moca::pool_pieces);
  m.def("pool_forward_cuda", [](const Params& p, uintptr_t sums, moca::Queue queue) {
    py::gil_scoped_release release;
    moca::pool_forward_cuda(p, moca::pointer<float>(sums), queue);
  });
  m.def("pool_backward_cuda",
        [](Params p, uintptr_t d_pooled, uintptr_t d_hidden, moca::Queue queue) {
          p.d_pooled = moca::pointer<const float>(d_pooled);
          p.d_hidden = moca::pointer<>(d_hidden);
          py::gil_scoped_release release;
          moca::pool_backward_cuda(p, queue);
        });
#endif
}

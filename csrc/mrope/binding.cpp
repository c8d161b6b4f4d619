#include "common/binding.h"

#include "mrope/mrope.h"

namespace py = pybind11;

MOCA_BINDING(mrope, m) {
  using moca::field;
  using Params = moca::MropeParams;
  const auto check = [](const Params& p) {
    const bool sizes = p.tokens >= 0 && p.heads >= 0 && p.kv_heads >= 0 && p.dim >= 0;
    moca::require(sizes && p.dim % 2 == 0, "mrope: bad sizes");
  };
  moca::bind_params(m, "MropeParams", check, field("q", &Params::q), field("k", &Params::k),
                    field("cos", &Params::cos), field("sin", &Params::sin),
                    field("q_out", &Params::q_out), field("k_out", &Params::k_out),
                    field("tokens", &Params::tokens), field("heads", &Params::heads),
                    field("kv_heads", &Params::kv_heads), field("dim", &Params::dim),
                    field("q_stride", &Params::q_stride), field("k_stride", &Params::k_stride),
                    field("dtype", &Params::dtype), field("table_dtype", &Params::table_dtype),
                    field("sections", &Params::sections), field("time", &Params::time),
                    field("height", &Params::height), field("width", &Params::width),
                    field("interleaved", &Params::interleaved), field("inverse", &Params::inverse),
                    field("threads", &Params::threads));
  m.def("mrope_rotate", [](const moca::MropeParams& p) {
    py::gil_scoped_release release;
    moca::mrope_rotate(p);
  });
#ifdef MOCA_CUDA_ARCHS
  m.def("mrope_rotate_cuda", [](const Params& p, moca::Queue queue) {
    py::gil_scoped_release release;
    moca::mrope_rotate_cuda(p, queue);
  });
#endif
}

#include "common/binding.h"

#include "linear_cross_entropy/linear_cross_entropy.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

moca::LinearCrossEntropyParams params(uintptr_t hidden, uintptr_t weight, uintptr_t bias,
                                      uintptr_t labels, uintptr_t index, uintptr_t lse,
                                      int64_t rows, int64_t tokens, int64_t vocabulary, int64_t dim,
                                      moca::DType dtype, int threads) {
  moca::require(rows >= 0 && tokens >= rows && vocabulary >= 0 && dim >= 0,
                "linear_cross_entropy: bad sizes");
  moca::LinearCrossEntropyParams p{};
  p.hidden = moca::pointer<>(hidden);
  p.weight = moca::pointer<>(weight);
  p.bias = moca::pointer<>(bias);
  p.labels = moca::pointer<const int64_t>(labels);
  p.index = moca::pointer<const int64_t>(index);
  p.lse = moca::pointer<double>(lse);
  p.rows = rows;
  p.tokens = tokens;
  p.vocabulary = vocabulary;
  p.dim = dim;
  p.dtype = dtype;
  p.threads = threads;
  return p;
}

}  // namespace

// An address of 0 stands for a bias that is absent or a gradient that is not needed.
MOCA_BINDING(linear_cross_entropy, m) {
  py::class_<moca::LinearCrossEntropyParams>(m, "LinearCrossEntropyParams")
      .def(py::init(&params), py::kw_only(), "hidden"_a, "weight"_a, "bias"_a, "labels"_a,
           "index"_a, "lse"_a, "rows"_a, "tokens"_a, "vocabulary"_a, "dim"_a, "dtype"_a,
           "threads"_a);
  m.def("linear_cross_entropy_forward", [](moca::LinearCrossEntropyParams p, uintptr_t loss) {
    p.loss = moca::pointer<float>(loss);
    py::gil_scoped_release release;
    moca::linear_cross_entropy_forward(p);
  });
  m.def("linear_cross_entropy_backward",
        [](moca::LinearCrossEntropyParams p, uintptr_t d_loss, uintptr_t d_hidden,
           uintptr_t d_weight, uintptr_t d_bias) {
          p.d_loss = moca::pointer<const float>(d_loss);
          p.d_hidden = moca::pointer<>(d_hidden);
          p.d_weight = moca::pointer<>(d_weight);
          p.d_bias = moca::pointer<>(d_bias);
          py::gil_scoped_release release;
          moca::linear_cross_entropy_backward(p);
        });
}

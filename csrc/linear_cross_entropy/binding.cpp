#include "common/binding.h"

#include "linear_cross_entropy/linear_cross_entropy.h"

namespace py = pybind11;

// An address of 0 stands for a bias that is absent or a gradient that is not needed.
MOCA_BINDING(linear_cross_entropy, m) {
  using moca::field;
  using Params = moca::LinearCrossEntropyParams;
  const auto check = [](const Params& p) {
    moca::require(p.rows >= 0 && p.tokens >= p.rows && p.vocabulary >= 0 && p.dim >= 0,
                  "linear_cross_entropy: bad sizes");
  };
  moca::bind_params(m, "LinearCrossEntropyParams", check, field("hidden", &Params::hidden),
                    field("weight", &Params::weight), field("bias", &Params::bias),
                    field("labels", &Params::labels), field("index", &Params::index),
                    field("lse", &Params::lse), field("rows", &Params::rows),
                    field("tokens", &Params::tokens), field("vocabulary", &Params::vocabulary),
                    field("dim", &Params::dim), field("dtype", &Params::dtype),
                    field("threads", &Params::threads));
  m.def("linear_cross_entropy_forward", [](moca::LinearCrossEntropyParams p, uintptr_t loss) {
    p.loss = moca::pointer<float>(loss);
    py::gil_scoped_release release;
    moca::linear_cross_entropy_forward(p);
  });
  const auto with_gradients = [](Params p, uintptr_t d_loss, uintptr_t d_hidden, uintptr_t d_weight,
                                 uintptr_t d_bias) {
    p.d_loss = moca::pointer<const float>(d_loss);
    p.d_hidden = moca::pointer<>(d_hidden);
    p.d_weight = moca::pointer<>(d_weight);
    p.d_bias = moca::pointer<>(d_bias);
    return p;
  };
  m.def("linear_cross_entropy_backward",
        [=](const Params& given, uintptr_t d_loss, uintptr_t d_hidden, uintptr_t d_weight,
            uintptr_t d_bias) {
          const Params p = with_gradients(given, d_loss, d_hidden, d_weight, d_bias);
          py::gil_scoped_release release;
          moca::linear_cross_entropy_backward(p);
        });
  m.def("linear_cross_entropy_with_gradients",
        [=](const Params& given, int64_t held, uintptr_t loss, uintptr_t d_loss, uintptr_t d_hidden,
            uintptr_t d_weight, uintptr_t d_bias) {
          Params p = with_gradients(given, d_loss, d_hidden, d_weight, d_bias);
          moca::require(held > 0 || p.rows == 0,
                        "linear_cross_entropy: held: expected a number above 0");
          moca::require(held >= p.rows || p.dtype == moca::DType::float32,
                        "linear_cross_entropy: held: expected all rows where gradients are not "
                        "float32");
          p.held = held;
          p.loss = moca::pointer<float>(loss);
          py::gil_scoped_release release;
          moca::linear_cross_entropy_with_gradients(p);
        });
}

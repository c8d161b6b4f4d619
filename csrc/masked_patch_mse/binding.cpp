#include "common/binding.h"

#include "masked_patch_mse/masked_patch_mse.h"

namespace py = pybind11;

MOCA_BINDING(masked_patch_mse, m) {
  using moca::field;
  using Params = moca::MaskedPatchMseParams;
  const auto check = [](const Params& p) {
    moca::require(p.rows >= 0 && p.row_size >= 1 && p.num_patches >= 0,
                  "masked_patch_mse: bad sizes");
  };
  moca::bind_params(m, "MaskedPatchMseParams", check, field("pred", &Params::pred),
                    field("patches", &Params::patches), field("index", &Params::index),
                    field("rows", &Params::rows), field("row_size", &Params::row_size),
                    field("num_patches", &Params::num_patches),
                    field("pred_dtype", &Params::pred_dtype),
                    field("patches_dtype", &Params::patches_dtype),
                    field("normalize", &Params::normalize), field("threads", &Params::threads));
  m.def("masked_patch_mse_forward", [](moca::MaskedPatchMseParams p, uintptr_t row_loss) {
    p.row_loss = moca::pointer<float>(row_loss);
    py::gil_scoped_release release;
    moca::masked_patch_mse_forward(p);
  });
  m.def("masked_patch_mse_backward",
        [](moca::MaskedPatchMseParams p, uintptr_t d_loss, uintptr_t d_pred) {
          p.d_loss = moca::pointer<const float>(d_loss);
          p.d_pred = moca::pointer<>(d_pred);
          py::gil_scoped_release release;
          moca::masked_patch_mse_backward(p);
        });
#ifdef MOCA_CUDA_ARCHS
  m.def("masked_patch_mse_forward_cuda", [](Params p, uintptr_t row_loss, moca::Queue queue) {
    p.row_loss = moca::pointer<float>(row_loss);
    py::gil_scoped_release release;
    moca::masked_patch_mse_forward_cuda(p, queue);
  });
  m.def("masked_patch_mse_backward_cuda",
        [](Params p, uintptr_t d_loss, uintptr_t d_pred, moca::Queue queue) {
          p.d_loss = moca::pointer<const float>(d_loss);
          p.d_pred = moca::pointer<>(d_pred);
          py::gil_scoped_release release;
          moca::masked_patch_mse_backward_cuda(p, queue);
        });
#endif
}

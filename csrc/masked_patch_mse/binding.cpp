#include "common/binding.h"

#include "masked_patch_mse/masked_patch_mse.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

moca::MaskedPatchMseParams params(uintptr_t pred, uintptr_t patches, uintptr_t index, int64_t rows,
                                  int64_t row_size, int64_t num_patches, moca::DType pred_dtype,
                                  moca::DType patches_dtype, bool normalize, int threads) {
  moca::require(rows >= 0 && row_size >= 1 && num_patches >= 0, "masked_patch_mse: bad sizes");
  moca::MaskedPatchMseParams p{};
  p.pred = moca::pointer<>(pred);
  p.patches = moca::pointer<>(patches);
  p.index = moca::pointer<const int64_t>(index);
  p.rows = rows;
  p.row_size = row_size;
  p.num_patches = num_patches;
  p.pred_dtype = pred_dtype;
  p.patches_dtype = patches_dtype;
  p.normalize = normalize;
  p.threads = threads;
  return p;
}

}  // namespace

MOCA_BINDING(masked_patch_mse, m) {
  py::class_<moca::MaskedPatchMseParams>(m, "MaskedPatchMseParams")
      .def(py::init(&params), py::kw_only(), "pred"_a, "patches"_a, "index"_a, "rows"_a,
           "row_size"_a, "num_patches"_a, "pred_dtype"_a, "patches_dtype"_a, "normalize"_a,
           "threads"_a);
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
}

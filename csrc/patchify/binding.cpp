#include "common/binding.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "patchify/patchify.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using Three = std::array<float, 3>;
using Strides = std::array<int64_t, 3>;

moca::PatchifyParams params(uintptr_t image, uintptr_t patches, int64_t height, int64_t width,
                            Strides strides, int64_t patch, int64_t merge, int64_t frames,
                            Three mean, Three std, moca::DType dtype, int threads) {
  moca::require(patch >= 1 && merge >= 1 && frames >= 1, "patchify: bad patch sizes");
  moca::require(
      height >= 0 && width >= 0 && height % (patch * merge) == 0 && width % (patch * merge) == 0,
      "patchify: the image is no whole number of merged patches");
  moca::PatchifyParams p{};
  p.image = moca::pointer<const uint8_t>(image);
  p.patches = moca::pointer<>(patches);
  p.height = height;
  p.width = width;
  p.row_stride = strides[0];
  p.column_stride = strides[1];
  p.channel_stride = strides[2];
  p.patch = patch;
  p.merge = merge;
  p.frames = frames;
  std::copy(mean.begin(), mean.end(), p.mean);
  std::copy(std.begin(), std.end(), p.std);
  p.dtype = dtype;
  p.threads = threads;
  return p;
}

}  // namespace

MOCA_BINDING(patchify, m) {
  py::class_<moca::PatchifyParams>(m, "PatchifyParams")
      .def(py::init(&params), py::kw_only(), "image"_a, "patches"_a, "height"_a, "width"_a,
           "strides"_a, "patch"_a, "merge"_a, "frames"_a, "mean"_a, "std"_a, "dtype"_a,
           "threads"_a);
  m.def("patchify_forward", [](const moca::PatchifyParams& p) {
    py::gil_scoped_release release;
    moca::patchify_forward(p);
  });
}

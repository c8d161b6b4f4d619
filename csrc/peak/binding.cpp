#include "common/binding.h"

#include <numeric>

#include "peak/peak.h"

namespace py = pybind11;
using namespace py::literals;

MOCA_BINDING(peak, m) {
  m.def(
      "peak",
      [](int64_t steps, bool bfloat16, int threads) {
        moca::require(steps >= 0 && threads >= 1, "peak: bad sizes");
        std::vector<double> flops(threads);
        {
          py::gil_scoped_release release;
          moca::peak({steps, bfloat16, flops.data(), threads});
        }
        return std::accumulate(flops.begin(), flops.end(), 0.0);
      },
      py::kw_only(), "steps"_a, "bfloat16"_a, "threads"_a,
      "Does multiply-adds in registers; returns how many floating-point operations that were.");
}

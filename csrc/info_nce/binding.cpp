#include "common/binding.h"

#include "info_nce/info_nce.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

moca::InfoNceParams params(uintptr_t query, uintptr_t document, uintptr_t target,
                           uintptr_t temperature, uintptr_t hard_negatives, uintptr_t query_ids,
                           uintptr_t document_ids, uintptr_t lse, int64_t queries,
                           int64_t documents, int64_t hard, int64_t dim, moca::DType dtype,
                           int threads) {
  moca::require(queries >= 0 && documents >= 0 && hard >= 0 && dim >= 0, "info_nce: bad sizes");
  moca::require(query_ids == 0 || document_ids != 0 || documents == 0,
                "info_nce: query ids without document ids");
  moca::InfoNceParams p{};
  p.query = moca::pointer<>(query);
  p.document = moca::pointer<>(document);
  p.target = moca::pointer<const int64_t>(target);
  p.temperature = moca::pointer<const float>(temperature);
  p.hard_negatives = moca::pointer<>(hard_negatives);
  p.query_ids = moca::pointer<const int64_t>(query_ids);
  p.document_ids = moca::pointer<const int64_t>(document_ids);
  p.lse = moca::pointer<double>(lse);
  p.queries = queries;
  p.documents = documents;
  p.hard = hard;
  p.dim = dim;
  p.dtype = dtype;
  p.threads = threads;
  return p;
}

}  // namespace

// An address of 0 stands for an input that is absent or a gradient that is not needed.
MOCA_BINDING(info_nce, m) {
  py::class_<moca::InfoNceParams>(m, "InfoNceParams")
      .def(py::init(&params), py::kw_only(), "query"_a, "document"_a, "target"_a, "temperature"_a,
           "hard_negatives"_a, "query_ids"_a, "document_ids"_a, "lse"_a, "queries"_a, "documents"_a,
           "hard"_a, "dim"_a, "dtype"_a, "threads"_a);
  m.def("info_nce_forward", [](moca::InfoNceParams p, uintptr_t loss) {
    p.loss = moca::pointer<float>(loss);
    py::gil_scoped_release release;
    moca::info_nce_forward(p);
  });
  m.def("info_nce_backward",
        [](moca::InfoNceParams p, uintptr_t d_loss, uintptr_t d_query, uintptr_t d_document,
           uintptr_t d_hard_negatives, uintptr_t d_temperature) {
          p.d_loss = moca::pointer<const float>(d_loss);
          p.d_query = moca::pointer<>(d_query);
          p.d_document = moca::pointer<>(d_document);
          p.d_hard_negatives = moca::pointer<>(d_hard_negatives);
          p.d_temperature = moca::pointer<float>(d_temperature);
          py::gil_scoped_release release;
          moca::info_nce_backward(p);
        });
}

#include "common/binding.h"

#include "info_nce/info_nce.h"

namespace py = pybind11;

// An address of 0 stands for an input that is absent or a gradient that is not needed.
MOCA_BINDING(info_nce, m) {
  using moca::field;
  using Params = moca::InfoNceParams;
  const auto check = [](const Params& p) {
    moca::require(p.queries >= 0 && p.documents >= 0 && p.hard >= 0 && p.dim >= 0,
                  "info_nce: bad sizes");
    moca::require(!p.query_ids || p.document_ids || p.documents == 0,
                  "info_nce: query ids without document ids");
  };
  moca::bind_params(m, "InfoNceParams", check, field("query", &Params::query),
                    field("document", &Params::document), field("target", &Params::target),
                    field("temperature", &Params::temperature),
                    field("hard_negatives", &Params::hard_negatives),
                    field("query_ids", &Params::query_ids),
                    field("document_ids", &Params::document_ids), field("lse", &Params::lse),
                    field("queries", &Params::queries), field("documents", &Params::documents),
                    field("hard", &Params::hard), field("dim", &Params::dim),
                    field("dtype", &Params::dtype), field("threads", &Params::threads));
  m.def("info_nce_forward", [](moca::InfoNceParams p, uintptr_t loss) {
    p.loss = moca::pointer<float>(loss);
    py::gil_scoped_release release;
    moca::info_nce_forward(p);
  });
  const auto with_gradients = [](Params p, uintptr_t d_loss, uintptr_t d_query,
                                 uintptr_t d_document, uintptr_t d_hard_negatives,
                                 uintptr_t d_temperature) {
    p.d_loss = moca::pointer<const float>(d_loss);
    p.d_query = moca::pointer<>(d_query);
    p.d_document = moca::pointer<>(d_document);
    p.d_hard_negatives = moca::pointer<>(d_hard_negatives);
    p.d_temperature = moca::pointer<float>(d_temperature);
    return p;
  };
  m.def("info_nce_backward",
        [=](const Params& given, uintptr_t d_loss, uintptr_t d_query, uintptr_t d_document,
            uintptr_t d_hard_negatives, uintptr_t d_temperature) {
          const Params p =
              with_gradients(given, d_loss, d_query, d_document, d_hard_negatives, d_temperature);
          py::gil_scoped_release release;
          moca::info_nce_backward(p);
        });
  m.def("info_nce_with_gradients", [=](const Params& given, int64_t held, uintptr_t loss,
                                       uintptr_t d_loss, uintptr_t d_query, uintptr_t d_document,
                                       uintptr_t d_hard_negatives, uintptr_t d_temperature) {
    Params p = with_gradients(given, d_loss, d_query, d_document, d_hard_negatives, d_temperature);
    moca::require(held > 0 || p.queries == 0, "info_nce: held: expected a number above 0");
    moca::require(held >= p.queries || p.dtype == moca::DType::float32,
                  "info_nce: held: expected all queries where gradients are not float32");
    p.held = held;
    p.loss = moca::pointer<float>(loss);
    py::gil_scoped_release release;
    moca::info_nce_with_gradients(p);
  });
}

// Which rows are taken together, and what they see: shared by forward and backward.
#pragma once

#include <algorithm>
#include <vector>

#include "attention/attention.h"
#include "attention/cpu_product.h"

namespace moca::MOCA_ISA {

// Rows [begin, end) of one document. Their keys lie in [key_begin, key_end), and are taken in
// blocks from key_begin on.
struct Slice {
  int64_t begin, end, key_begin, key_end;
};

// Calls body(slice) for each document of a tile, or slice of a document, in order; rows that see
// nothing are documents of their own.
template <typename Body>
void for_each_document(const Spans& spans, int64_t begin, int64_t end, Body&& body) {
  for (int64_t row = begin; row < end;) {
    int64_t stop = row + 1;
    while (stop < end && spans.start[stop] < spans.end[stop - 1] &&
           spans.start[stop] < spans.end[stop])
      ++stop;
    body(Slice{row, stop, spans.start[row], spans.end[stop - 1]});
    row = stop;
  }
}

// Columns [begin, end) of a block of keys, counted from its first: `begin` lies on a panel, so
// that a product starts there.
struct Columns {
  int64_t begin, end;
  int64_t vectors() const { return ceil_div(end - begin, kLanes); }
};

// What rows [first, last] see of keys [key_begin, key_end).
inline Columns visible_columns(const Spans& spans, int64_t first, int64_t last, int64_t key_begin,
                               int64_t key_end) {
  const int64_t begin = std::max<int64_t>(spans.start[first] - key_begin, 0);
  const int64_t end = std::min<int64_t>(spans.end[last], key_end) - key_begin;
  return {begin / kPanel * kPanel, end};
}

// Whether some row of a slice does not see all of its keys.
inline bool is_masked(const Spans& spans, const Slice& slice) {
  return spans.start[slice.end - 1] != spans.start[slice.begin] ||
         spans.end[slice.begin] != spans.end[slice.end - 1];
}

// The mask: columns outside [start, end) of a row of `size`, and the slack up to a whole panel,
// become `hidden`.
inline void mask_row(float* row, int64_t start, int64_t end, int64_t size, float hidden) {
  const int64_t whole = round_up(size, kPanel);
  const auto mask = [&](int64_t j) {
    const IntLanes column = kLaneNumbers + static_cast<int32_t>(j);
    const auto seen =
        (column >= static_cast<int32_t>(start)) & (column < static_cast<int32_t>(end));
    store(row + j, seen ? load(row + j) : broadcast(hidden));
  };
  for (int64_t j = 0; j < std::min(start, whole); j += kLanes) mask(j);
  for (int64_t j = std::max<int64_t>(end, 0) / kLanes * kLanes; j < whole; j += kLanes) mask(j);
}

// Weight 0 times a hidden NaN or infinity would be NaN: where there are such, rows go one by one.
template <typename T>
bool all_finite(const Head<T>& head, int64_t dim) {
  Lanes zero = {};
  for (int64_t i = head.begin; i < head.end; ++i)
    for (int64_t d = 0; d < dim; d += kLanes) zero += words_of<float>(head[i] + d, dim - d) * 0.0f;
  return sum_of(zero) == 0.0f;
}

}  // namespace moca::MOCA_ISA

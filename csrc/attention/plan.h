// The tile plan: which rows a task takes, and which keys they need. Host code, O(T).
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "attention/attention.h"

namespace moca {

// Throws unless start and end are non-decreasing with 0 <= start <= end <= num_keys.
inline void check_spans(const int32_t* start, const int32_t* end, int64_t size, int64_t num_keys) {
  int32_t last_start = 0, last_end = 0;
  for (int64_t i = 0; i < size; ++i) {
    if (start[i] < last_start || end[i] < last_end || start[i] > end[i] || end[i] > num_keys)
      throw std::invalid_argument(
          "moca_fast.attention: expected spans with non-decreasing ends inside 0 to " +
          std::to_string(num_keys) + ", got [" + std::to_string(start[i]) + ", " +
          std::to_string(end[i]) + ") at " + std::to_string(i));
    last_start = start[i];
    last_end = end[i];
  }
}

class TilePlanner {
 public:
  TilePlanner(const int32_t* start, const int32_t* end, int64_t rows, Tile* tiles,
              int64_t max_tiles)
      : start_(start), end_(end), rows_(rows), tiles_(tiles), max_tiles_(max_tiles) {}

  // Slices of long documents, and runs of whole short ones; never a mixture, so that what a long
  // document computes does not depend on its neighbours.
  void plan(int64_t size) {
    int64_t open = 0;  // first row of the tile that is being filled
    for (int64_t begin = 0; begin < size;) {
      const int64_t stop = document_end(begin, size);
      const bool is_long = stop - begin > rows_;
      if (is_long || stop - open > rows_) {
        add(open, begin);
        open = begin;
      }
      if (is_long) {
        for (int64_t row = begin; row < stop; row += rows_) add(row, std::min(row + rows_, stop));
        open = stop;
      }
      begin = stop;
    }
    add(open, size);
  }

 private:
  // Rows belong to one document as long as neighbours share a key.
  int64_t document_end(int64_t row, int64_t size) const {
    do ++row;
    while (row < size && start_[row] < end_[row - 1] && start_[row] < end_[row]);
    return row;
  }

  void add(int64_t begin, int64_t end) {
    if (begin == end) return;
    if (count_ == max_tiles_) throw std::logic_error("moca_fast.attention: too many tiles");
    const bool masked = start_[begin] != start_[end - 1] || end_[begin] != end_[end - 1];
    tiles_[count_++] = {static_cast<int32_t>(begin), static_cast<int32_t>(end), start_[begin],
                        end_[end - 1], masked};
  }

  const int32_t *start_, *end_;
  int64_t rows_;
  Tile* tiles_;
  int64_t max_tiles_, count_ = 0;
};

}  // namespace moca

// A byte has 256 values, so rescaling and normalising is one lookup, exact in any dtype. Every
// pixel is read once and every value written once, in the order of the patches.
#include <algorithm>
#include <array>

#include "common/parallel.h"
#include "common/simd.h"
#include "common/stream.h"
#include "patchify/patchify.h"

namespace moca::MOCA_ISA {
namespace {

constexpr int64_t kPatchesPerTask = 64;  // a quarter of a megabyte of float32 for 14 x 14 x 2

template <typename T>
using Table = std::array<std::array<T, 256>, 3>;

// What each byte of each channel becomes. The divisions and their order are those of the image
// processors of transformers, so that the values are theirs to the bit.
template <typename T>
Table<T> normalized_bytes(const PatchifyParams& p) {
  Table<T> table;
  for (int channel = 0; channel < 3; ++channel)
    for (int byte = 0; byte < 256; ++byte)
      table[channel][byte] =
          from_float<T>((static_cast<float>(byte) / 255.0f - p.mean[channel]) / p.std[channel]);
  return table;
}

// The upper left pixel of patch n: the merge x merge patches of a token are consecutive.
const uint8_t* first_pixel(const PatchifyParams& p, int64_t n) {
  const int64_t tokens_a_row = p.width / (p.patch * p.merge);
  const int64_t token = n / (p.merge * p.merge), inside = n % (p.merge * p.merge);
  const int64_t row = token / tokens_a_row * p.merge + inside / p.merge;
  const int64_t column = token % tokens_a_row * p.merge + inside % p.merge;
  return p.image + row * p.patch * p.row_stride + column * p.patch * p.column_stride;
}

// One patch, (3, frames, patch, patch): a still image is the same in every frame.
template <typename T>
void write_patch(const PatchifyParams& p, const Table<T>& table, const uint8_t* pixels, T* to) {
  const int64_t area = p.patch * p.patch;
  for (int channel = 0; channel < 3; ++channel) {
    const T* values = table[channel].data();
    const T* frame = to;
    for (int64_t y = 0; y < p.patch; ++y) {
      const uint8_t* from = pixels + y * p.row_stride + channel * p.channel_stride;
#pragma GCC unroll 8
      for (int64_t x = 0; x < p.patch; ++x, from += p.column_stride) *to++ = values[*from];
    }
    for (int64_t repeat = 1; repeat < p.frames; ++repeat) to = std::copy_n(frame, area, to);
  }
}

}  // namespace

void patchify_forward(const PatchifyParams& p) {
  visit(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Table<T> table = normalized_bytes<T>(p);
    const int64_t patches = (p.height / p.patch) * (p.width / p.patch);
    const int64_t size = 3 * p.frames * p.patch * p.patch;
    parallel_for(ceil_div(patches, kPatchesPerTask), p.threads, [&](int64_t task, int) {
      const int64_t begin = task * kPatchesPerTask,
                    end = std::min(patches, begin + kPatchesPerTask);
      ResultRows<T> rows(p.patches, patches, size, begin, end);
      for (int64_t n = begin; n < end; ++n) {
        write_patch(p, table, first_pixel(p, n), rows.begin_row(n));
        rows.end_row(n);
      }
    });
  });
}

}  // namespace moca::MOCA_ISA

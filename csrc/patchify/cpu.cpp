// A byte has 256 values, so rescaling and normalising is one lookup, exact in any dtype. Every
// pixel is read once and every value written once, in the order of the patches.
#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

#include "common/parallel.h"
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

// Patches [begin, end) of a result that is streamed: so many at a time as fill whole lines.
template <typename T>
void stream_patches(const PatchifyParams& p, const Table<T>& table, int64_t begin, int64_t end,
                    int64_t size) {
  const int64_t group = kLine / std::gcd(kLine, size * static_cast<int64_t>(sizeof(T)));
  std::vector<T> staged(group * size);
  for (int64_t n = begin; n < end; n += group) {
    const int64_t count = std::min(group, end - n);
    for (int64_t i = 0; i < count; ++i)
      write_patch(p, table, first_pixel(p, n + i), staged.data() + i * size);
    stream_bytes(static_cast<T*>(p.patches) + n * size, staged.data(), count * size * sizeof(T));
  }
  finish_streaming();
}

}  // namespace

void patchify_forward(const PatchifyParams& p) {
  visit(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Table<T> table = normalized_bytes<T>(p);
    const int64_t patches = (p.height / p.patch) * (p.width / p.patch);
    const int64_t size = 3 * p.frames * p.patch * p.patch;
    const bool streamed = patches * size * static_cast<int64_t>(sizeof(T)) >= kStreamed;
    const int64_t tasks = (patches + kPatchesPerTask - 1) / kPatchesPerTask;
    parallel_for(tasks, p.threads, [&](int64_t task, int) {
      const int64_t begin = task * kPatchesPerTask,
                    end = std::min(patches, begin + kPatchesPerTask);
      if (streamed) return stream_patches(p, table, begin, end, size);
      for (int64_t n = begin; n < end; ++n)
        write_patch(p, table, first_pixel(p, n), static_cast<T*>(p.patches) + n * size);
    });
  });
}

}  // namespace moca::MOCA_ISA

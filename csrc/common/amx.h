// AMX: eight tile registers, each a matrix of 16 rows of 16 words, and a product out of packed
// operands that is made in them. Without AMX only TileRegisters and keep_tiles_awake are here,
// which then do nothing.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/words.h"

namespace moca::MOCA_ISA {

#ifdef __AMX_BF16__

constexpr int kTileSide = 16;  // rows of a tile register, and words of a row
static_assert(kTileSide == kLanes);

// While one lives, its thread has tile registers: every task that multiplies has one.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileRegisters() { asm volatile("tilerelease"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// The compiler's own intrinsics do not say that they read memory.
template <int kTile, typename T>
inline void load_tile(const T* from, int64_t pitch) {
  const int64_t bytes = pitch * sizeof(T);
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(bytes), "i"(kTile) : "memory");
}
template <int kTile>
inline void store_tile(float* to, int64_t pitch) {
  const int64_t bytes = pitch * sizeof(float);
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(bytes), "i"(kTile) : "memory");
}
template <int kTile>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
// sum[i][j] += the dot products of the pairs a[i][k] and b[k][j], k in order.
template <int kSum, int kA, int kB>
inline void multiply_add_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}

// A product of up to 32 rows, which lie `a_pitch` words apart, kDepthStep words at a time, each
// step `a_step` words after the other, and of up to 32 columns, whose words lie 32 apart.
struct TileProduct {
  const Bfloat16Pair* a;
  int64_t a_pitch, a_step;
  const Bfloat16Pair* b;
  int64_t steps;
};

// c = or += a . b for whole tiles: R down, N across. All four sums stay in registers.
template <int R, int N>
inline void multiply_whole_tiles(const TileProduct& x, float* c, int64_t pitch, bool accumulate) {
  constexpr int64_t kPanel = 2 * kTileSide;
  float* const below = c + kTileSide * pitch;
  if (accumulate) {
    load_tile<0>(c, pitch);
    if constexpr (N == 2) load_tile<1>(c + kTileSide, pitch);
    if constexpr (R == 2) load_tile<2>(below, pitch);
    if constexpr (R == 2 && N == 2) load_tile<3>(below + kTileSide, pitch);
  } else {
    clear_tile<0>();
    if constexpr (N == 2) clear_tile<1>();
    if constexpr (R == 2) clear_tile<2>();
    if constexpr (R == 2 && N == 2) clear_tile<3>();
  }
  const Bfloat16Pair *a = x.a, *b = x.b;
  for (int64_t step = 0; step < x.steps; ++step, a += x.a_step, b += kTileSide * kPanel) {
    load_tile<6>(b, kPanel);
    load_tile<4>(a, x.a_pitch);
    multiply_add_tiles<0, 4, 6>();
    if constexpr (N == 2) {
      load_tile<7>(b + kTileSide, kPanel);
      multiply_add_tiles<1, 4, 7>();
    }
    if constexpr (R == 2) {
      load_tile<5>(a + kTileSide * x.a_pitch, x.a_pitch);
      multiply_add_tiles<2, 5, 6>();
      if constexpr (N == 2) multiply_add_tiles<3, 5, 7>();
    }
  }
  store_tile<0>(c, pitch);
  if constexpr (N == 2) store_tile<1>(c + kTileSide, pitch);
  if constexpr (R == 2) store_tile<2>(below, pitch);
  if constexpr (R == 2 && N == 2) store_tile<3>(below + kTileSide, pitch);
}

// The same for up to 32 rows and columns: a and b have whole tiles, c only what is asked for.
inline void multiply_tiles(int64_t rows, int64_t cols, const TileProduct& x, float* c,
                           int64_t pitch, bool accumulate) {
  constexpr int kSide = 2 * kTileSide;
  const bool tall = rows > kTileSide, wide = cols > kTileSide;
  const auto multiply = tall   ? wide ? multiply_whole_tiles<2, 2> : multiply_whole_tiles<2, 1>
                        : wide ? multiply_whole_tiles<1, 2>
                               : multiply_whole_tiles<1, 1>;
  if (rows % kTileSide == 0 && cols % kTileSide == 0) return multiply(x, c, pitch, accumulate);
  alignas(64) float spill[kSide * kSide];
  for (int64_t i = 0; i < rows && accumulate; ++i)
    std::copy_n(c + i * pitch, cols, spill + i * kSide);
  multiply(x, spill, kSide, accumulate);
  for (int64_t i = 0; i < rows; ++i) std::copy_n(spill + i * kSide, cols, c + i * pitch);
}

#else

struct TileRegisters {
  TileRegisters() {}  // not trivial: a variable of this type is not an unused one
};

#endif

// The unit that multiplies tiles sleeps after about 0.4 us without a product, and takes 0.3 us to
// wake. Between products of such words, a product of whatever the registers hold keeps it awake.
template <typename Word>
inline void keep_tiles_awake() {
#ifdef __AMX_BF16__
  if constexpr (kInTiles<Word>) multiply_add_tiles<0, 4, 6>();
#endif
}

}  // namespace moca::MOCA_ISA

// The exponential of vectors.
#pragma once

#include "common/simd.h"

namespace moca::MOCA_ISA {

// exp(x) for x up to 88, as the exponent of a softmax always is, to about one unit in the last
// place; 0 below -87.33 (no subnormals); NaN stays NaN. x = n log 2 + r with |r| <= log(2) / 2,
// and a polynomial in r.
inline Lanes exp_lanes(Lanes x) {
  constexpr float kLog2E = 1.44269504088896341f;
  constexpr float kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;  // exact n * kLog2High
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const Lanes shifted = x * kLog2E + kRound;
  const Lanes n = shifted - kRound;
  const Lanes r = (x - n * kLog2High) - n * kLog2Low;
  Lanes y = r * (1.0f / 5040.0f) + 1.0f / 720.0f;
  y = y * r + 1.0f / 120.0f;
  y = y * r + 1.0f / 24.0f;
  y = y * r + 1.0f / 6.0f;
  y = y * r + 0.5f;
  y = y * (r * r) + r + 1.0f;
  const IntLanes exponent = (reinterpret_cast<IntLanes>(shifted) - (0x4b400000 - 127)) << 23;
  y *= reinterpret_cast<Lanes>(exponent);
  return x < -87.33f ? Lanes{} : y;
}

// The same for weights that are rounded to bfloat16: off by no more than 2^-17 of the value.
inline Lanes exp_for_bfloat16(Lanes x) {
  constexpr float kLog2E = 1.44269504088896341f, kLog2 = 0.693147180559945309f;
  constexpr float kRound = 12582912.0f;
  const Lanes shifted = x * kLog2E + kRound;
  const Lanes r = x - (shifted - kRound) * kLog2;
  Lanes y = r * 0.04127737f + 0.16753601f;  // minimax, with exp(0) = 1
  y = y * r + 0.50005126f;
  y = y * (r * r) + r + 1.0f;
  const IntLanes exponent = (reinterpret_cast<IntLanes>(shifted) - (0x4b400000 - 127)) << 23;
  y *= reinterpret_cast<Lanes>(exponent);
  return x < -87.33f ? Lanes{} : y;
}

}  // namespace moca::MOCA_ISA

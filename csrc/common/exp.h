// The exponential of one float32, in a form that compilers vectorise, and of Lanes.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "common/simd.h"

namespace moca::MOCA_ISA {

// exp(x) to about one unit in the last place; 0 below -87.33 (no subnormals); NaN stays NaN. X is
// float or Lanes, I the integers of its width. With kLarge infinity above 88.72; without it x is at
// most 88, as the exponent of a softmax always is. x = n log 2 + r with |r| <= log(2) / 2, and a
// polynomial in r.
template <bool kLarge, typename X, typename I>
inline X exponential(X x) {
  constexpr float kLog2E = 1.44269504088896341f;
  constexpr float kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;  // exact n * kLog2High
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const X shifted = x * kLog2E + kRound;
  const X n = shifted - kRound;
  const X r = (x - n * kLog2High) - n * kLog2Low;
  X y = r * (1.0f / 5040.0f) + 1.0f / 720.0f;
  y = y * r + 1.0f / 120.0f;
  y = y * r + 1.0f / 24.0f;
  y = y * r + 1.0f / 6.0f;
  y = y * r + 0.5f;
  y = y * r * r + r + 1.0f;
  I bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const I whole = bits - 0x4b400000;
  // 2^n in two factors where n may be 128, which has no float of its own.
  const I half = kLarge ? whole >> 1 : whole;
  const I factor_bits = (half + 127) << 23;
  X factor;
  std::memcpy(&factor, &factor_bits, sizeof factor);
  y = y * factor;
  if constexpr (kLarge) {
    const I rest_bits = (whole - half + 127) << 23;
    std::memcpy(&factor, &rest_bits, sizeof factor);
    y = y * factor;
    y = x > 88.7228390f ? X{} + std::numeric_limits<float>::infinity() : y;
  }
  return x < -87.33f ? X{} : y;
}

inline float exp_lane(float x) { return exponential<true, float, int32_t>(x); }
inline Lanes exp_lanes(Lanes x) { return exponential<false, Lanes, IntLanes>(x); }

}  // namespace moca::MOCA_ISA

// The exponential in a form that compilers vectorise.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace moca::MOCA_ISA {

// exp(x) to about one unit in the last place; 0 below -87.33 (no subnormals), infinity above
// 88.72; NaN stays NaN. x = n log 2 + r with |r| <= log(2) / 2, and a polynomial in r.
inline float exp_lane(float x) {
  constexpr float kLog2E = 1.44269504088896341f;
  constexpr float kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;  // exact n * kLog2High
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const float shifted = x * kLog2E + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * kLog2High) - n * kLog2Low;
  float y = 1.0f / 5040.0f;
  y = y * r + 1.0f / 720.0f;
  y = y * r + 1.0f / 120.0f;
  y = y * r + 1.0f / 24.0f;
  y = y * r + 1.0f / 6.0f;
  y = y * r + 0.5f;
  y = y * r * r + r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  // 2^n in two factors, for n = 128 has no float of its own.
  const int32_t whole = bits - 0x4b400000, half = whole >> 1;
  const int32_t low_bits = (half + 127) << 23, high_bits = (whole - half + 127) << 23;
  float low, high;
  std::memcpy(&low, &low_bits, sizeof low);
  std::memcpy(&high, &high_bits, sizeof high);
  y = y * low * high;
  y = x < -87.33f ? 0.0f : y;
  return x > 88.7228390f ? std::numeric_limits<float>::infinity() : y;
}

}  // namespace moca::MOCA_ISA
